"""The garbage collector is out of the way inside, as it was outside, and never at the cost of another thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from gpudcp.collector import collector_paused


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_enabled else gc.disable)()


def test_the_collector_is_paused_inside_and_runs_again_afterwards() -> None:
    """Two pauses, one in the other, end with the outer one."""
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    """Training loops switch it off themselves."""
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_an_error_inside_ends_the_pause() -> None:
    """A save that fails must not leave the process without a collector."""
    with pytest.raises(KeyboardInterrupt), collector_paused():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_a_background_thread_pauses_nothing() -> None:
    """A save in the background must not keep the training beside it from collecting its garbage."""
    seen: list[bool] = []

    def save() -> None:
        with collector_paused():
            seen.append(gc.isenabled())

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert seen == [True]
    assert gc.isenabled()
