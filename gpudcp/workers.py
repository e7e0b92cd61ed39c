"""Threads for a while, that do what they are given in its order; and who gives it does it where there can be none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class _ThisThread(threading.local):
    until_given_back: ExitStack | None = None


_this_thread = _ThisThread()


def until_given_back() -> ExitStack | None:
    """Where the job at hand borrows the thread of who gave it, there being none: what is left when the job is done.

    What a job sets for its thread, for all that this will do, goes there then. None: the thread is a worker's.
    """
    return _this_thread.until_given_back


class Workers:
    """Up to ``count`` threads, from the start until the context is left.

    Not a ThreadPoolExecutor: from Python 3.12 on no thread can be started once the interpreter exits, when a background
    save may still be at work. Such a pool then raises from ``submit``, and may do what was submitted all the same.

    On leaving, what has not begun is cancelled, and what has is waited for.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for number in range(count):
            thread = threading.Thread(target=self._work, name=f"{name}_{number}")
            try:
                thread.start()
            except RuntimeError:  # at the interpreter's exit, or the system has no more
                break
            self._threads.append(thread)

    def submit(self, act: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Have it done; without a thread it has been done when this returns."""
        future: Future[_Result] = Future()
        if self._threads:
            self._jobs.put((future, act, args))
        else:
            outer = _this_thread.until_given_back
            try:
                with ExitStack() as _this_thread.until_given_back:
                    _do(future, act, args)
            finally:
                _this_thread.until_given_back = outer
        return future

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while (job := self._jobs.get_nowait()) is not None:
                job[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(*job)
            del job  # it may be long until the next one, and it holds memory


def _do(future: Future[Any], act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = act(*args)
    except BaseException as error:
        future.set_exception(error)
        del future  # the error's traceback holds this frame
    else:
        future.set_result(result)
