"""The first launch of a kernel is told apart from the transfer that pays for it."""

from __future__ import annotations

import pytest

from gpudcp.executors import compiling
from gpudcp.executors.compiling import first_launch_apart
from gpudcp.report import Stopwatch


def test_only_the_first_launch_of_a_kernel_is_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process, not in the transfer: the second save pays nothing."""
    monkeypatch.setattr(compiling, "_launched", set())
    first, second = Stopwatch(), Stopwatch()
    for stopwatch in (first, second):
        for kernel in (("pack", "a"), ("pack", "b"), ("pack", "a")):
            with stopwatch.phase("pack"), first_launch_apart(stopwatch, *kernel):
                pass
    assert set(first.seconds) == {"pack", "compile"}
    assert set(second.seconds) == {"pack"}
