"""Saves in the background: one thread, at most one save in flight, and no failure that nobody hears of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from gpudcp._dcp import group_timeout, new_gloo_group
from gpudcp.cudadriver import relax_stream_capture
from gpudcp.ranks import Ranks

_logger = logging.getLogger("gpudcp")


class UploadFuture(Future[Metadata]):
    """The Metadata of a checkpoint that is being written; it knows whether somebody has heard how that ended."""

    was_heard = False

    @property
    def succeeded(self) -> bool:
        """Whether the checkpoint is committed; asking so is not hearing of a failure."""
        return self.done() and super().exception() is None

    def result(self, timeout: float | None = None) -> Metadata:
        """The Metadata, when the checkpoint is committed; raises what the save raised."""
        self.exception(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save raised."""
        error = super().exception(timeout)
        self.was_heard = True  # not where the wait timed out, even if it ends in that instant
        return error


class BackgroundSaves:
    """The saves that this process has begun and not yet ended: at most one, and the next one waits for it.

    The interpreter waits for a save in flight before it exits, which succeeds where the ranks' group still lives.
    """

    def __init__(self) -> None:
        self._waits_at_exit = False
        self._last: UploadFuture | None = None
        self._guard = threading.Lock()
        self.calls = threading.RLock()
        """Held from waiting for the save before until the next one begins: their snapshots share their memory."""

    def wait(self) -> None:
        """Wait for the save in flight, however it ends."""
        last = self._last
        if last is not None and not threading.current_thread().name.startswith(_THREAD_NAME):
            futures.wait([last])

    def forget_in_child(self) -> None:
        """What is in flight is the parent's, and the thread stayed there."""
        self.__init__()  # type: ignore[misc]

    def settle(self) -> None:
        """Wait for the save in flight; raises what it raised, unless somebody has heard of that."""
        last = self._last
        if last is None or threading.current_thread().name.startswith(_THREAD_NAME):
            return
        error = None if last.was_heard and last.done() else last.exception()
        if self._last is last:
            self._last = None
        if error is not None:
            raise error

    def begin(self, act: Callable[[], Metadata], place: str, *, give_up: Callable[[], None]) -> UploadFuture:
        """Run ``act`` in the background. What was begun before must have ended: see `settle`.

        Args:
            act: the save.
            place: where it goes, for the log.
            give_up: called where ``act`` cannot be, before the error is raised.
        """
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        future = UploadFuture()
        # All ranks save together, so no rank can take its part back: ``cancel()`` returns False.
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                    relax_stream_capture()
                future.set_result(act())
            except BaseException as error:
                _logger.error("%s: a background save failed: %s: %s", place, type(error).__name__, error)
                future.set_exception(error)

        thread = threading.Thread(target=run, name=_THREAD_NAME)
        with self._guard:
            if not self._waits_at_exit:
                # Private, but the one hook before Python refuses new work to every thread pool, which a save needs.
                threading._register_atexit(self.wait)  # type: ignore[attr-defined]
                self._waits_at_exit = True
            # Known before it runs: whatever interrupts this call, the next snapshot waits for it.
            self._last = future
            try:
                thread.start()
            except BaseException as error:
                if thread.ident is None:  # it will never run, as at the interpreter's exit
                    self._last = None
                    future.set_exception(error)
                    give_up()
                raise
        return future


_THREAD_NAME = "gpudcp-async"


def group_for_background(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A gloo group of the same ranks, which no other thread uses; made once, by all ranks of the group together.

    A collective of training and one of a background save on one gloo group wait for each other until the timeout.

    Raises:
        GpuDcpError: the ranks of the group do not answer; making a group would wait for them.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    key: tuple[Any, ...] = (dist.group.WORLD, ranks)
    for other in [other for other in _groups if other[0] is not key[0]]:
        del _groups[other]  # of a world that was destroyed
    known = _groups.get(key)
    if known is None:
        own = group or dist.group.WORLD
        assert own is not None
        # Over the caller's own group, which hears of a rank that has died.
        name = Ranks(group, no_dist=False).reduce_broadcast("background group", list, lambda _: f"gpudcp-{uuid4().hex}")
        known = _groups[key] = new_gloo_group(ranks, name, group_timeout(own))
    return known


_groups: dict[tuple[Any, ...], dist.ProcessGroup] = {}
