"""CheckpointManager: the checkpoints of a run, one directory a step. Which are kept, which is the newest good one."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from concurrent import futures
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from gpudcp.api import BackgroundSave, async_save, load, save
from gpudcp.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PlanError,
    TransferError,
)
from gpudcp.files.commit import is_committed, remove_checkpoint
from gpudcp.options import Options
from gpudcp.ranks import Ranks

_logger = logging.getLogger("gpudcp")

_STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_GOOD, _BAD, _HOPELESS = range(3)
# Of a TransferError: bytes that are not there, or cannot be read any more. What is not permitted is so everywhere.
_BAD_ERRNOS = (None, errno.EIO, errno.ENODATA, errno.ESTALE)


class CheckpointManager:
    """Saves steps of a run below one directory, keeps the newest and every n-th, and restores the newest good one.

    A step is a directory ``step-00001000`` that holds an ordinary DCP checkpoint. All ranks of the group make the same
    calls together; its rank 0 looks for steps and removes them, so ``root`` is a directory that all of them see.

    Args:
        root: where the steps are; made at the first save.
        keep_last: how many of the newest steps stay; None: all.
        keep_every: steps that are multiples of it stay for good; None: no others.
        options: of every save and restore; see `gpudcp.Options`.
        process_group, no_dist: as for `gpudcp.save`.

    Raises:
        PlanError: a number to keep is less than 1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        options: Options | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
    ) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and (type(value) is not int or value < 1):
                raise PlanError(f"CheckpointManager({name}={value!r}): must be None or an integer of at least 1")
        self.root = os.path.abspath(root)  # steps are removed in the background, wherever the process is by then
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.options = options or Options()
        self._group = process_group
        self._no_dist = no_dist
        self._last: BackgroundSave | None = None

    def path(self, step: int) -> str:
        """The directory of a step."""
        return os.path.join(self.root, f"step-{step:08d}")

    def save(self, step: int, state_dict: dict[str, Any], *, planner: SavePlanner | None = None) -> Metadata:
        """Save a step, then remove the steps that need not be kept. Saving a step again replaces it.

        Raises:
            GpuDcpError: as `gpudcp.save`; nothing has been removed.
        """
        metadata = save(state_dict, self._path_to_save(step), planner=planner, **self._where())
        if self._ranks().is_coordinator:
            self._remove_others(step)
        return metadata

    def async_save(
        self, step: int, state_dict: dict[str, Any], *, planner: SavePlanner | None = None
    ) -> BackgroundSave:
        """The same in the background: see `gpudcp.async_save`. Steps are removed when this one is committed."""
        response = async_save(state_dict, self._path_to_save(step), planner=planner, **self._where())

        def remove_others(upload: Any) -> None:
            if upload.succeeded:
                self._remove_others(step)

        if self._ranks().is_coordinator:
            response.add_done_callback(remove_others)
        self._last = response
        return response

    def wait(self) -> None:
        """Wait for the last `async_save`; raises what it raised."""
        if self._last is not None:
            self._last.result()

    def remove(self, step: int) -> None:
        """Remove a step: one that a run has left behind by going back to an earlier one, say. All ranks call this.

        Of a step that is a link only the link goes: what it leads to is somebody's own.

        Raises:
            CheckpointNotFoundError: there is no such step.
            GpuDcpError: it cannot be removed.
        """

        def act(_: Any) -> None:
            if (path := self._found().get(step)) is None:
                raise CheckpointNotFoundError(f"{self.root}: no step {step}")
            if os.path.islink(path):
                os.unlink(path)
            else:
                remove_checkpoint(path, fsync=self.options.fsync)

        self._settle()
        self._ranks().reduce_broadcast("remove", list, act)

    def steps(self) -> list[int]:
        """The steps that are committed, in order; the same on every rank. A save in the background is waited for."""
        self._settle()
        return self._ranks().reduce_broadcast("steps", list, lambda _: self._committed())

    def latest(self) -> int | None:
        """The newest step that is committed; the same on every rank. Whether it is good, only reading it tells."""
        return max(self.steps(), default=None)

    def restore(
        self, state_dict: dict[str, Any], step: int | None = None, *, planner: LoadPlanner | None = None
    ) -> int:
        """Load a step into ``state_dict``, as `gpudcp.load` does; return which.

        Args:
            state_dict: says what to load, and takes it.
            step: this very step. None: the newest good one; what is incomplete or corrupt is passed over, with a
                warning in the log, on all ranks if it is on one.
            planner: for the load; with several steps to try, it is used for each.

        Raises:
            CheckpointNotFoundError: there is no step at all: the run has not saved yet.
            CorruptCheckpointError: there are steps, and none is good.
            GpuDcpError: as `gpudcp.load`, where another step would not help, or ``step`` was asked for by name.
        """
        if step is not None:
            load(state_dict, self.path(step), planner=planner, **self._where())
            return step
        tried: dict[int, BaseException] = {}
        # Listed again: while one was tried, a run that goes on may have saved a newer one and removed the others.
        while left := [number for number in self.steps() if number not in tried]:
            candidate = left[-1]
            error = self._attempt(state_dict, candidate, planner)
            if error is None:
                return candidate
            _logger.warning("%s: passed over: %s", self.path(candidate), error)
            tried[candidate] = error
        if tried:
            each = "; ".join(f"step {number}: {error}" for number, error in tried.items())
            raise CorruptCheckpointError(f"{self.root}: no good checkpoint: {each}", path=self.root)
        raise CheckpointNotFoundError(f"{self.root}: no checkpoint")

    def _attempt(self, state_dict: dict[str, Any], step: int, planner: LoadPlanner | None) -> BaseException | None:
        """Why a step is no good, on any rank; raises what another step would not cure."""
        error: BaseException | None = None
        try:
            load(state_dict, self.path(step), planner=planner, **self._where())
        except BaseException as raised:
            error = raised
        own = _GOOD if error is None else _BAD if _is_of_this_step(error) else _HOPELESS
        worst = self._ranks().reduce_broadcast("restore", lambda: own, lambda verdicts: max(verdicts))
        if worst == _HOPELESS:
            raise error or CheckpointBusyError(f"{self.path(step)}: another rank could not load it")
        if worst == _BAD and error is None:
            return CorruptCheckpointError("another rank could not read it", path=self.path(step))
        return error

    def _path_to_save(self, step: int) -> str:
        """The step's directory, when all ranks mean the same step."""

        def checked() -> int:
            if type(step) is not int or step < 0:
                raise PlanError(f"step={step!r}: must be an integer of at least 0")
            return step

        def agreed(steps: list[int]) -> int | None:
            if len({*steps}) > 1:
                raise PlanError(f"the ranks save different steps: {sorted({*steps})}")
            return max(self._committed(), default=None)

        newest = self._ranks().reduce_broadcast("step", checked, agreed)
        if newest is not None and newest > step:
            _logger.warning(
                "%s: saved below step %d, which stays the newest: remove it, if the run went back",
                self.path(step),
                newest,
            )
        return self.path(step)

    def _settle(self) -> None:
        """Wait for the last background save, however it ends: what it raised is for who asks for it."""
        if self._last is not None:
            futures.wait([self._last.upload_completion])

    def _where(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._no_dist, "options": self.options}

    def _ranks(self) -> Ranks:
        alone = self._no_dist or not (dist.is_available() and dist.is_initialized())
        return Ranks(self._group, no_dist=alone)

    def _found(self) -> dict[int, str]:
        """The directories of steps, committed or not."""
        names: Sequence[str] = ()
        with suppress(FileNotFoundError):
            names = os.listdir(self.root)
        matches = ((_STEP_NAME.fullmatch(name), name) for name in names)
        return {int(match[1]): os.path.join(self.root, name) for match, name in matches if match is not None}

    def _committed(self) -> list[int]:
        return sorted(step for step, path in self._found().items() if is_committed(path))

    def _remove_others(self, saved: int) -> None:
        """Remove committed steps that need not be kept, and what older saves left behind that never was committed.

        Never the step that was just saved, whatever its number: it is the one that is known to be good. What goes wrong
        is logged: the save has succeeded.
        """
        try:
            found = self._found()
            spare = self._spare(found, saved)
        except OSError as err:
            _logger.warning("%s: no step was removed: %s", self.root, err)
            return
        for path in spare:
            self._try_to_remove(path)

    def _try_to_remove(self, path: str) -> None:
        try:
            remove_checkpoint(path, fsync=self.options.fsync)
        except (OSError, CheckpointBusyError) as err:
            _logger.warning("%s: not removed: %s", path, err)

    def _spare(self, found: dict[int, str], saved: int) -> list[str]:
        committed = self._committed()
        kept = {saved, *(committed if self.keep_last is None else committed[-self.keep_last :])}
        spare = []
        for step, path in found.items():
            is_unfinished = step not in committed and step < saved
            is_spare = step in committed and step not in kept and (self.keep_every is None or step % self.keep_every)
            # What a link leads to is somebody's own, such as the checkpoint that this run started from.
            if (is_unfinished or is_spare) and not os.path.islink(path):
                spare.append(path)
        return spare


def _is_of_this_step(error: BaseException) -> bool:
    """Whether another step may be better: this one is no checkpoint, or no good one.

    Anything else is about the state dict, the options or the machine, and every step would fail.
    """
    if isinstance(error, TransferError):
        return error.errno in _BAD_ERRNOS
    return isinstance(error, (CheckpointNotFoundError, CorruptCheckpointError))
