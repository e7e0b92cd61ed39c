"""What kernels cost when a process launches them for the first time, shown apart from the transfer that pays for it."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpudcp.report import Stopwatch

_launched: set[Hashable] = set()


def first_launch_apart(stopwatch: Stopwatch, *kernel: Hashable) -> AbstractContextManager[Any]:
    """Around a launch: its time is the phase ``compile`` if this process has not launched such a kernel before.

    Triton compiles then, or finds what it compiled in its cache on disk. The launch itself is asynchronous.
    """
    if kernel in _launched:
        return nullcontext()
    _launched.add(kernel)
    return stopwatch.phase("compile")
