"""GpuStorageReader: DCP checkpoints, ours or stock's, read by chunk plans, each payload's checksum verified."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from gpudcp.chunkplan.load import (
    LoadChunkPlan,
)
from gpudcp.collector import collector_paused
from gpudcp.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    PlanError,
    TransferError,
)
from gpudcp.executors.base import Executor
from gpudcp.executors.select import select
from gpudcp.files.commit import metadata_file_name
from gpudcp.files.regular import open_regular
from gpudcp.formats import index as index_format
from gpudcp.formats.metadata import TRAILER_NBYTES, decode_metadata, identity_of
from gpudcp.items import KeptItems, ReadItems
from gpudcp.options import Options
from gpudcp.planners.overrides import are_untouched
from gpudcp.records import ItemRecords
from gpudcp.report import Stopwatch, TransferReport
from gpudcp.storage.learning import learn
from gpudcp.storage.needs import Needs
from gpudcp.storage.openfiles import OpenFiles
from gpudcp.storage.places import directory_of, is_directory_id
from gpudcp.storage.stored import StoredItems, is_object
from gpudcp.storage.targets import PlannerTarget, load_whole_item
from gpudcp.views import ColumnMetadata

_logger = logging.getLogger("gpudcp")


class GpuStorageReader(StorageReader):
    """Reads DCP checkpoints from a directory, ours and stock torch's.

    Use it as ``gpudcp.load(..., storage_reader=reader)`` or ``dcp.load(..., storage_reader=reader)``.

    A load that fails has changed some of the tensors it was given, and perhaps some objects inside nested dicts: treat
    the state dict as lost, and load again.

    Args:
        path: the checkpoint's directory.
        options: see `gpudcp.Options`.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or it names a file that does not exist.
        CorruptCheckpointError: a checksum, a range or a shape is wrong.
        UnsafeCheckpointError: reading it would run code or leave the directory.
        CheckpointBusyError: a newer checkpoint replaced it while it was read.
        TransferError: a read failed or came short.
    """

    def __init__(self, path: str | os.PathLike[str], *, options: Options | None = None) -> None:
        super().__init__()
        self.path = directory_of(path)
        self.options = options or Options()
        self.report: TransferReport | None = None
        """This rank's last transfer."""
        self._rank: int | None = None
        self._metadata: Metadata | None = None
        self._metadata_error: Exception | None = None
        self._kept: list[ReadItem] | None = None
        self._files = OpenFiles(self.path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the checkpoint read last and, if a path is given, point the reader there."""
        if checkpoint_id:
            self.path = directory_of(checkpoint_id)
        self._metadata = self._metadata_error = None
        self._files.close()
        self._files = OpenFiles(self.path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """``.metadata`` or, for a rank given by keyword and only where there is none, that rank's own.

        DCP asks a second time, with the rank, whatever went wrong the first time: the first error is raised again.
        """
        self._rank = kwargs.get("rank")
        if self._rank is not None and self._metadata_error is not None:
            error, self._metadata_error = self._metadata_error, None
            if not isinstance(error, CheckpointNotFoundError):
                raise error
        try:
            metadata = self._read_metadata()
        except Exception as err:
            self._metadata_error = err
            raise
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = str(uuid.uuid4())
        return metadata

    def _read_metadata(self) -> Metadata:
        path = os.path.join(self.path, metadata_file_name(self._rank))
        try:
            with open(path, "rb", opener=open_regular) as file:
                if (indexed := self._read_index(file)) is not None:
                    return indexed
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFoundError(
                f"{self.path}: no checkpoint: {metadata_file_name(self._rank)} is missing"
            ) from None
        except OSError as err:
            raise TransferError(f"{path}: cannot be read: {err.strerror}", path=path, errno=err.errno) from err
        return decode_metadata(data, path=path, trust_pickle=self.options.trust_pickle)

    def _read_index(self, metadata_file: BinaryIO) -> ColumnMetadata | None:
        """The metadata from the index beside an open ``.metadata``, where there is one of that very file."""
        nbytes = metadata_file.seek(0, os.SEEK_END)
        metadata_file.seek(max(0, nbytes - TRAILER_NBYTES))
        identity = identity_of(metadata_file.read(), nbytes)
        metadata_file.seek(0)
        path = f"{metadata_file.name}{index_format.SUFFIX}"
        if identity is None:
            return None
        try:
            with open(path, "rb", opener=open_regular) as file:
                return index_format.decode_index(file.read(), path=path, nbytes=identity[0], crc=identity[1])
        except FileNotFoundError:
            return None
        except (OSError, CorruptCheckpointError) as err:
            _logger.warning("%s: cannot be read, so the slower .metadata is: %s", path, err)
            return None

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the metadata that the plans are made of."""
        self._metadata = metadata
        self._kept = None
        self._files.close()  # of a load that went no further
        self.report = None

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Open the files that the plan needs: from here on they stay readable, whatever a newer save removes.

        Items that only this rank needs stay here, and a stand-in travels.
        """
        self._open_files(plan.items)
        stay = getattr(plan.items, "stay_on_rank", False) and are_untouched(
            self, ("prepare_global_plan", "read_data"), GpuStorageReader
        )
        self._kept = plan.items if stay else None
        items = KeptItems() if stay else plan.items
        return dataclasses.replace(plan, items=items, storage_data=_save_id(self._known_metadata()))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that every rank has opened the same checkpoint."""
        if len(ids := {plan.storage_data for plan in plans}) > 1 and self._rank is None:
            raise CheckpointBusyError(
                f"{self.path}: a newer checkpoint was committed while the ranks opened this one: "
                f"they found {sorted(map(str, ids))}"
            )
        return plans

    def _known_metadata(self) -> Metadata:
        if self._metadata is None:
            raise CheckpointNotFoundError(f"{self.path}: the reader has not been set up with a checkpoint's metadata")
        return self._metadata

    def _open_files(self, items: Sequence[ReadItem]) -> None:
        """Open what the items need; where a file is gone because a newer save committed, what its metadata names."""
        stored = StoredItems(self._known_metadata(), self.path)
        try:
            self._open_needed(stored, items)
        except CheckpointNotFoundError as missing:
            newer = self._read_metadata()
            if _save_id(newer) == _save_id(self._known_metadata()):
                raise
            self._check_same_shapes(newer, items, missing)
            _logger.info("%s: a newer checkpoint replaced the one being read; reading the newer one", self.path)
            self._metadata = newer
            self._files.close()
            stored = StoredItems(newer, self.path)
            self._files.open(stored.paths(items))

    def _open_needed(self, stored: StoredItems, items: Sequence[ReadItem]) -> None:
        if (records := self._row_records(items)) is not None:
            used = np.unique(records.path_ids[items.rows])  # type: ignore[attr-defined]
            self._files.open(stored.checked_paths(records.paths[path_id] for path_id in used.tolist()))
            return
        try:
            self._files.open(stored.likely_paths(items))
        except CheckpointNotFoundError:
            self._files.open(stored.paths(items))

    def _check_same_shapes(self, newer: Metadata, items: Sequence[ReadItem], missing: Exception) -> None:
        planned = self._known_metadata().state_dict_metadata
        for fqn in {item.storage_index.fqn for item in items}:
            if newer.state_dict_metadata.get(fqn) != planned.get(fqn):
                raise CheckpointBusyError(
                    f"{self.path}: a newer checkpoint was committed during this load, and {fqn} is sharded otherwise "
                    "in it; load again"
                ) from missing

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the tensors that the planner resolves."""
        if isinstance(plan.items, KeptItems):
            if self._kept is None:
                raise PlanError(f"{self.path}: this plan's items were kept by another reader")
            plan = dataclasses.replace(plan, items=self._kept)
        try:
            with collector_paused():
                self._read_data(plan, planner)
        except CheckpointNotFoundError as missing:
            # A file that was opened only now, as not all could be open at once. Other ranks may have read on.
            if _save_id(self._read_metadata()) == _save_id(self._known_metadata()):
                raise
            raise CheckpointBusyError(
                f"{self.path}: a newer checkpoint was committed while this one was read; load again"
            ) from missing
        finally:
            self._files.close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_data(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        stopwatch = Stopwatch()
        stored = StoredItems(self._known_metadata(), self.path)
        with stopwatch.phase("plan"):
            target = PlannerTarget(plan.items, planner)
            selection = select(self.options, self.path, direction="read", devices=target.devices)
            executor = selection.executor
        self._files.read_by(selection.way)
        self._open_needed(stored, plan.items)
        with stopwatch.phase("plan"):
            needs = Needs(
                self._files,
                self.options,
                slab_nbytes=executor.slab_nbytes,
                large_apart=executor.reads_large_apart,
            )
            if (records := self._row_records(plan.items)) is None:
                needs.add_items(plan.items, stored)
            else:
                needs.add_rows(plan.items, records, stored)  # type: ignore[arg-type]
            chunk_plan = needs.chunk_plan()
        executor.load(chunk_plan, target, self._files.get, stopwatch)
        with stopwatch.phase("objects"):
            # Objects last: replacing them is what a failure should find undone.
            for position, item in sorted(needs.whole_items, key=lambda each: is_object(plan.items[each[0]])):
                load_whole_item(plan.items[position], item, self._files.get(item.path), planner, self.options)
        whole_nbytes = sum(item.nbytes for _, item in needs.whole_items)
        self.report = TransferReport(
            direction="load",
            path=self.path,
            nitems=len(plan.items),
            payload_nbytes=needs.payload_nbytes + whole_nbytes,
            file_nbytes=needs.envelope_nbytes + chunk_plan.nbytes + whole_nbytes,
            total_s=stopwatch.total_s(),
            phases_s=MappingProxyType(dict(stopwatch.seconds)),
            executor=executor.name,
            files=selection.files,
            checksum=self._checksum_used(chunk_plan, needs, executor),
            reasons=(*selection.reasons, *selection.notes),
        )
        _logger.info("%s", self.report)
        learn(self.report, selection)

    def _row_records(self, items: Sequence[ReadItem]) -> ItemRecords | None:
        """What stands in the files for each row that the items speak of, if they are columns of this very metadata."""
        metadata = self._known_metadata()
        if not (isinstance(items, ReadItems) and items.is_unchanged and isinstance(metadata, ColumnMetadata)):
            return None
        return metadata.row_records if items.checkpoint is metadata.columns and metadata.is_unchanged else None

    def _checksum_used(self, plan: LoadChunkPlan, needs: Needs, executor: Executor) -> str:
        if self.options.verify == "off":
            return "off: Options(verify='off')"
        return f"{executor.checksum}: {len(plan.checks)} of {needs.npayloads} payloads verified"

    @property
    def checkpoint_id(self) -> str:
        """The directory."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a path on a mounted file system."""
        return is_directory_id(checkpoint_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OpenFiles(self.path), "_metadata": None}


def _save_id(metadata: Metadata) -> str | None:
    return getattr(metadata.storage_meta, "save_id", None)
