"""Python's garbage collector, out of the way where many small objects are made: there it is half of the time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No automatic collection inside; afterwards the collector is as it was.

    Only on the main thread: a save in the background must not keep the training beside it from collecting its garbage.
    """
    if not gc.isenabled() or threading.current_thread() is not threading.main_thread():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
