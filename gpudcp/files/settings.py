"""A setting of the whole process: any number of calls go by it at once, and who changes it for a while is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

WAIT_S = 30.0
"""So long is waited for others. They take moments, or they hang in a file system or a driver."""


class ProcessSetting:
    """Somebody else's setting, behind a lock of our own.

    Whoever goes by it waits only while another thread has it changed, never for one that waits to change it: a call
    that hangs keeps the others from changing it, and from nothing else. A thread that has it changed, or goes by it,
    may go by it again: finalizers run in any thread, at any moment.
    """

    def __init__(
        self, name: str, get: Callable[[], Any], changed: Callable[[Any], AbstractContextManager[Any]]
    ) -> None:
        self._name = name
        self._get = get
        self._changed = changed
        """Gives the setting another value, and on leaving the one before."""
        self._condition = threading.Condition()
        self._calls: set[object] = set()
        self._owner: int | None = None
        self._found: Any = None

    @contextmanager
    def changed(self, value: Any) -> Iterator[None]:
        """The setting is ``value`` meanwhile, and for no call of another thread.

        Raises:
            TimeoutError: another thread's call hangs.
        """
        me = threading.get_ident()
        is_outermost = self._owner != me
        try:
            if is_outermost:
                with self._condition:
                    self._wait(lambda: self._owner is None and not self._calls)
                    self._owner = me
                self._found = self._get()
            with self._changed(value):
                yield
        finally:  # also of an interrupt between any two of these lines
            if is_outermost and self._owner == me:
                with self._condition:
                    self._owner = self._found = None
                    self._condition.notify_all()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The setting stays meanwhile what it is, or what this thread has changed it to.

        Raises:
            TimeoutError: another thread has changed it, and hangs.
        """
        call = object()
        try:
            if self._owner != threading.get_ident():
                with self._condition:
                    self._wait(lambda: self._owner is None)
                    self._calls.add(call)
            yield
        finally:
            with self._condition:
                self._calls.discard(call)
                self._condition.notify_all()

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """The setting is meanwhile as nobody here has changed it, though this thread may have; raises as `kept`."""
        with self.kept():
            is_own = self._owner == threading.get_ident() and self._found is not None
            with self._changed(self._found) if is_own else nullcontext():
                yield

    def _wait(self, is_free: Callable[[], bool]) -> None:
        if not self._condition.wait_for(is_free, WAIT_S):
            raise TimeoutError(f"{self._name}: another thread has been using it for {WAIT_S:g} s")
