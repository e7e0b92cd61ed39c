"""GpuStorageWriter: an ordinary DCP checkpoint, written by chunk plans and committed atomically."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from gpudcp.chunkplan.save import SaveFilePlan, plan_save
from gpudcp.collector import collector_paused
from gpudcp.errors import CheckpointBusyError, CheckpointExistsError, PlanError
from gpudcp.executors.base import Executor
from gpudcp.executors.remote import RemoteExecutor, WriterProcess
from gpudcp.executors.select import Selection, select
from gpudcp.files.base import FileWriter
from gpudcp.files.commit import (
    DirectoryLock,
    data_file_name,
    draw_save_id,
    make_directory,
    metadata_file_name,
    metadata_names,
)
from gpudcp.files.posix import fsync_directory
from gpudcp.files.ways import open_writer
from gpudcp.formats.metadata import VERSION
from gpudcp.items import WriteItems
from gpudcp.options import Options
from gpudcp.records import ItemRecords
from gpudcp.report import Stopwatch, TransferReport
from gpudcp.storage.committing import commit
from gpudcp.storage.learning import learn
from gpudcp.storage.places import directory_of, is_directory_id
from gpudcp.storage.results import WriteResults, written_records
from gpudcp.storage.sources import PlannerSource, literal_data
from gpudcp.views import ANNOUNCEMENT, StorageData

_logger = logging.getLogger("gpudcp")

_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveTicket:
    """What the coordinator gives each rank, in its plan's ``storage_data``: its number, and the id of this save."""

    rank: int
    save_id: str


class GpuStorageWriter(StorageWriter):
    """Writes DCP checkpoints into a directory; stock torch reads them.

    Use it as ``gpudcp.save(..., storage_writer=writer)`` or ``dcp.save(..., storage_writer=writer)``; it may be reused.

    Args:
        path: the checkpoint's directory; it is made if it does not exist.
        options: see `gpudcp.Options`.
        overwrite: replace a checkpoint that is there, or refuse to.

    Raises:
        CheckpointExistsError: there is a checkpoint, and ``overwrite=False``.
        CheckpointBusyError: another save into the directory is running.
        PlanError: a tensor cannot be saved as its plan says.
        TransferError: the disk is full, or a write failed.
    """

    def __init__(self, path: str | os.PathLike[str], *, options: Options | None = None, overwrite: bool = True) -> None:
        super().__init__()
        self.path = directory_of(path)
        self.options = options or Options()
        self.overwrite = overwrite
        self.report: TransferReport | None = None
        """This rank's last transfer."""
        self._rank: int | None = None
        self._use_collectives = True
        self._save_id = ""
        self._last_save_id = ""
        self._written: list[str] = []
        self._lock: DirectoryLock | None = None
        self._writer_process: WriterProcess | None = None
        self._is_beside_training = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Point the writer at another directory; without one nothing changes."""
        self._check_idle()
        if checkpoint_id:
            self.path = directory_of(checkpoint_id)

    @contextmanager
    def beside_training(self, process: WriterProcess | None) -> Iterator[None]:
        """Saves in this context share the cores with training; ``process``, if one is given, writes in place of this
        one."""
        self._writer_process, self._is_beside_training = process, True
        try:
            yield
        finally:
            self._writer_process, self._is_beside_training = None, False

    def _check_idle(self) -> None:
        if self._lock is not None and self._lock.is_of_another_thread:
            raise CheckpointBusyError(f"{self.path}: this writer is saving in another thread; wait for that save")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the directory and, on the coordinator, hold it until the save is committed."""
        self._rank = kwargs.get("rank")
        self._use_collectives = kwargs.get("use_collectives", True)
        self.report = None
        self._check_idle()
        self.release()  # a save that failed where no hook told the writer so may still hold its directory
        make_directory(self.path, fsync=self.options.fsync)
        if is_coordinator:
            self._lock = DirectoryLock.acquire(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse to overwrite, if so asked; without collectives every rank draws its own save id."""
        try:
            self._check_overwrite()
        except BaseException:
            self.release()
            raise
        if self._use_collectives:
            return plan
        self._save_id = draw_save_id()
        return dataclasses.replace(plan, storage_data=SaveTicket(rank=self._rank or 0, save_id=self._save_id))

    def _check_overwrite(self) -> None:
        names = metadata_names(self.path)
        whole = metadata_file_name(None)
        if not self._use_collectives:
            if whole in names:
                raise CheckpointExistsError(
                    f"{self.path}: holds a checkpoint that was saved with collectives ({whole}), which every load "
                    "would take instead of one saved without; remove it, or save elsewhere"
                )
            # No other rank's: those may be of this very save.
            names = [name for name in names if name == metadata_file_name(self._rank or 0)]
        if names and not self.overwrite:
            raise CheckpointExistsError(f"{self.path}: holds a checkpoint ({names[0]}), and overwrite=False")

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Draw the id of this save: here, because DCP calls nothing else on the coordinator at every save."""
        if not self._use_collectives:
            return plans
        self._save_id = draw_save_id()
        return [
            dataclasses.replace(plan, storage_data=SaveTicket(rank=rank, save_id=self._save_id))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write this rank's items; on return they are on stable storage, and nothing names them yet."""
        try:
            with collector_paused():
                results = self._write_data(plan, planner)
        except BaseException:
            self.release()
            raise
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def _write_data(self, plan: SavePlan, planner: SavePlanner) -> WriteResults:
        stopwatch = Stopwatch()
        if not isinstance(plan.storage_data, SaveTicket):
            raise PlanError(f"{self.path}: the plan's storage_data is {plan.storage_data!r}, not this writer's ticket")
        # Columns stay columns; anything else may be changed by the planner while it is asked.
        items = plan.items if isinstance(plan.items, WriteItems) else list(plan.items)
        with stopwatch.phase("objects"):
            literals = literal_data(items, planner, self.options)
        with stopwatch.phase("plan"):
            source = PlannerSource(items, planner)
            selection = select(
                self.options,
                self.path,
                direction="write",
                devices=source.devices,
                is_beside_training=self._is_beside_training,
            )
            executor, devices = selection.executor, selection.devices
            if self._writer_process is not None:
                executor, devices = self._remote(self._writer_process, selection), ()
            # A file is packed on one device; and writes through the page cache to one file wait for each other, so
            # every thread gets a file of its own.
            nrings = max(1, len(devices))
            nfiles = min(selection.threads, nrings * self.options.lanes // 2) if selection.way == "buffered" else 1
            names = self._unused_names(plan.storage_data, max(nrings, nfiles))
            groups = source.groups(devices)
            chunk_plan = plan_save(items, literals, paths=names, slab_nbytes=executor.slab_nbytes, groups=groups)

        def open_file(file: SaveFilePlan) -> FileWriter:
            path = os.path.join(self.path, file.path)
            return open_writer(path, selection.way, nbytes=file.nbytes, fsync=self.options.fsync)

        receipts = executor.save(chunk_plan, source, open_file, stopwatch)
        records = written_records(items, chunk_plan, receipts)
        self._written = records.paths
        with stopwatch.phase("fsync"):
            if self.options.fsync:
                fsync_directory(self.path)
        self.report = TransferReport(
            direction="save",
            path=self.path,
            nitems=len(items),
            payload_nbytes=chunk_plan.payload_nbytes,
            file_nbytes=chunk_plan.nbytes,
            total_s=stopwatch.total_s(),
            phases_s=MappingProxyType(dict(stopwatch.seconds)),
            executor=executor.name,
            files=selection.files,
            checksum=executor.checksum if self.options.checksum else "off: Options(checksum=False)",
            reasons=(*selection.reasons, *selection.notes),
        )
        _logger.info("%s", self.report)
        learn(self.report, selection)
        return WriteResults(records)

    def _remote(self, process: WriterProcess, selection: Selection) -> Executor:
        return RemoteExecutor(
            process,
            directory=os.path.abspath(self.path),  # the process may have been started in another one
            way=selection.way,
            fsync=self.options.fsync,
            slab_nbytes=selection.executor.slab_nbytes,
            lanes=self.options.lanes,
            threads=selection.threads,
            has_checksum=self.options.checksum,
        )

    def _unused_names(self, ticket: SaveTicket, nfiles: int) -> list[str]:
        """The data files' names. A planner that caches whole plans hands out the ticket of an earlier save."""
        save_id = draw_save_id() if ticket.save_id == self._last_save_id else ticket.save_id
        self._last_save_id = ticket.save_id
        while True:
            names = [data_file_name(ticket.rank, number, save_id) for number in range(nfiles)]
            if not any(os.path.lexists(os.path.join(self.path, name)) for name in names):
                return names
            save_id = draw_save_id()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: everything is on stable storage, so name it, then remove what the old checkpoint alone named."""
        try:
            with collector_paused():
                self._commit(metadata, results)
        finally:
            self.release()

    def _commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.version = VERSION
        records = ItemRecords.concatenated(_own_results(own).records for own in results)
        metadata.storage_data = StorageData(records)
        metadata.storage_meta = self.storage_meta()
        rank = None if self._use_collectives else self._rank
        if lost := [name for name in self._written if not os.path.exists(os.path.join(self.path, name))]:
            raise CheckpointBusyError(f"{self.path}: {', '.join(lost)} was removed before this save was committed")
        commit(self.path, metadata, records, rank=rank, fsync=self.options.fsync)

    def release(self) -> None:
        """Let the directory go. Safe to call at any time; a save that was not committed leaves the old checkpoint."""
        if self._lock is not None and not self._lock.is_of_another_thread:
            self._lock.release()
            self._lock = None

    def storage_meta(self) -> StorageMeta:
        """The checkpoint's id, as a string: Python 3.13 pickles paths in a way that 3.11 cannot read."""
        return StorageMeta(checkpoint_id=self.path, save_id=self._save_id or None, modules=[ANNOUNCEMENT])

    @property
    def checkpoint_id(self) -> str:
        """The directory."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a path on a mounted file system."""
        return is_directory_id(checkpoint_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_writer_process": None, "_is_beside_training": False}


def _own_results(results: Any) -> WriteResults:
    if not isinstance(results, WriteResults):
        raise PlanError(f"the write results of a rank are a {type(results).__name__}, not what this writer returned")
    return results
