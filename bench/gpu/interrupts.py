"""A pytest plugin: an interrupt ends the run, though who is interrupted makes an ordinary error of it.

Stock DCP turns the KeyboardInterrupt of a rank into a CheckpointException, and pytest would go on with the next test.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import suppress
from types import FrameType

import pytest

_came: list[int] = []


def pytest_configure() -> None:
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual):
        return

    def note(number: int, frame: FrameType | None) -> None:
        _came.append(number)
        usual(number, frame)

    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGINT, note)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _came:
        item.session.shouldstop = "interrupted"
    return report
