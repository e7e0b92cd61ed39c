"""GpuStorageReader: DCP checkpoints, ours or stock's, read by chunk plans, each payload's checksum verified."""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import uuid
from collections.abc import Collection, Sequence
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from gpudcp.boxes import row_major_strides
from gpudcp.chunkplan.load import (
    READ_GAP_NBYTES,
    LoadChunkPlan,
    PayloadCheck,
    ReadRequest,
    plan_load,
    whole_payload_request,
)
from gpudcp.collector import collector_paused
from gpudcp.columns import NONE, ItemRecords, distinct_rows
from gpudcp.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    TransferError,
)
from gpudcp.executors.select import choose_executor
from gpudcp.files.commit import metadata_file_name
from gpudcp.files.posix import PosixReader
from gpudcp.formats import checksum
from gpudcp.formats import index as index_format
from gpudcp.formats.dtypes import QUANTIZED_DTYPES
from gpudcp.formats.metadata import TRAILER_NBYTES, decode_metadata, identity_of
from gpudcp.options import Options
from gpudcp.report import Stopwatch, TransferReport
from gpudcp.storage.places import directory_of, is_directory_id
from gpudcp.storage.stored import StoredItem, StoredItems, Window, check_box, check_range, is_object, stored_tensor
from gpudcp.storage.targets import PlannerTarget, load_whole_item
from gpudcp.views import ColumnMetadata, ReadItems

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
        self._files = _OpenFiles(self.path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the checkpoint read last and, if a path is given, point the reader there."""
        if checkpoint_id:
            self.path = directory_of(checkpoint_id)
        self._metadata = self._metadata_error = None
        self._files.close()
        self._files = _OpenFiles(self.path)

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
            with open(path, "rb") as file:
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
            with open(path, "rb") as file:
                return index_format.decode_index(file.read(), path=path, nbytes=identity[0], crc=identity[1])
        except FileNotFoundError:
            return None
        except (OSError, CorruptCheckpointError) as err:
            _logger.warning("%s: cannot be read, so the slower .metadata is: %s", path, err)
            return None

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the metadata that the plans are made of."""
        self._metadata = metadata
        self._files.close()  # of a load that went no further
        self.report = None

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Open the files that the plan needs: from here on they stay readable, whatever a newer save removes."""
        self._open_files(plan.items)
        return dataclasses.replace(plan, storage_data=_save_id(self._known_metadata()))

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
        executor, reason = choose_executor(self.options)
        stored = StoredItems(self._known_metadata(), self.path)
        self._open_needed(stored, plan.items)
        with stopwatch.phase("plan"):
            needs = _Needs(self._files, self.options)
            if (records := self._row_records(plan.items)) is None:
                needs.add_items(plan.items, stored)
            else:
                needs.add_rows(plan.items, records, stored)  # type: ignore[arg-type]
            chunk_plan = needs.chunk_plan()
        executor.load(chunk_plan, PlannerTarget(plan.items, planner), self._files.get, stopwatch)
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
            files="posix buffered",
            checksum=self._checksum_used(chunk_plan, needs),
            reasons=(reason, "buffered reads: any alignment, straight into the destination"),
        )
        _logger.info("%s", self.report)

    def _row_records(self, items: Sequence[ReadItem]) -> ItemRecords | None:
        """What stands in the files for each row that the items speak of, if they are columns of this very metadata."""
        metadata = self._known_metadata()
        if not (isinstance(items, ReadItems) and items.is_unchanged and isinstance(metadata, ColumnMetadata)):
            return None
        return metadata.row_records if items.checkpoint is metadata.columns and metadata.is_unchanged else None

    def _checksum_used(self, plan: LoadChunkPlan, needs: _Needs) -> str:
        if self.options.verify == "off":
            return "off: Options(verify='off')"
        return f"{checksum.LIBRARY}: {len(plan.checks)} of {needs.npayloads} payloads verified"

    @property
    def checkpoint_id(self) -> str:
        """The directory."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a path on a mounted file system."""
        return is_directory_id(checkpoint_id)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": _OpenFiles(self.path), "_metadata": None}


class _Needs:
    """What a load plan needs of the files: boxes of strided payloads, and items that are read whole."""

    def __init__(self, files: _OpenFiles, options: Options) -> None:
        self.whole_items: list[tuple[int, StoredItem]] = []
        self.payload_nbytes = 0
        self.envelope_nbytes = 0
        self.npayloads = 0
        self._files = files
        self._options = options
        self._requests: list[ReadRequest] = []
        self._checks: list[PayloadCheck] = []
        self._last_payload = ("", -1)

    def add_items(self, items: Sequence[ReadItem], stored: StoredItems) -> None:
        """Items by what their storage index says."""
        self._add_each(range(len(items)), items, stored)

    def _add_each(self, positions: Sequence[int], items: Sequence[ReadItem], stored: StoredItems) -> None:
        places = [stored.find(item.storage_index) for item in items]
        # In file order, so that envelopes are read in passing.
        order = sorted(range(len(items)), key=lambda number: places[number][1:3])
        path, window = "", None
        for number in order:
            place = places[number]
            if window is None or place.path != path:
                path = place.path
                self.envelope_nbytes += 0 if window is None else window.nbytes
                window = Window(self._files.get(path))
            check_range(place, window.file)
            self._add(positions[number], items[number], place, stored, window)
        self.envelope_nbytes += 0 if window is None else window.nbytes

    def add_rows(self, items: ReadItems, records: ItemRecords, stored: StoredItems) -> None:
        """Items that are rows of the checkpoint's own columns: all at once."""
        checkpoint, rows = items.checkpoint, items.rows
        path_ids, starts, nbytes = records.path_ids[rows], records.byte_offsets[rows], records.nbytes[rows]
        payloads, crcs = records.payload_offsets[rows], records.crcs[rows]
        sizes = checkpoint.boxes[checkpoint.row_boxes[rows], 1]
        itemsizes = np.array([*(dtype.itemsize for dtype in records.dtypes), 0], dtype=np.int64)[
            records.dtype_ids[rows]
        ]
        payload_nbytes = sizes.prod(axis=1) * itemsizes
        file_nbytes = np.zeros(len(records.paths), dtype=np.int64)
        for path_id in np.unique(path_ids).tolist():
            file_nbytes[path_id] = self._files.get(records.paths[path_id]).nbytes
        is_payload = (items.ndims != NONE) & (payloads >= 0)
        is_outside = starts + nbytes > file_nbytes[path_ids]
        is_wrong = is_payload & ((payloads < starts) | (payloads + payload_nbytes > starts + nbytes))
        is_wrong |= is_payload & _of_dtypes(records, QUANTIZED_DTYPES)[records.dtype_ids[rows]]
        # What is wrong, or no payload, goes the way of items: it finds the words, or reads them whole.
        others = np.nonzero(~is_payload | is_outside | is_wrong)[0].tolist()
        self._add_each(others, [items[position] for position in others], stored)
        at = np.nonzero(is_payload & ~is_outside & ~is_wrong)[0]
        paths, dtypes = records.paths, records.dtypes
        names = [paths[path_id] for path_id in path_ids[at].tolist()]
        # A few shapes are shared by all: each is made once.
        table = np.concatenate([items.ndims[at, None], sizes[at], items.boxes[at, 1], items.boxes[at, 2]], axis=1)
        first, shape_ids = distinct_rows(table)
        dims = sizes.shape[1]
        shapes = [
            (row_major_strides(tuple(row[:n])), tuple(row[dims : dims + n]), tuple(row[2 * dims : 2 * dims + n]))
            for n, *row in table[first].tolist()
        ]
        self._requests += [
            ReadRequest(position, path, payload, dtypes[dtype_id], strides, 0, offsets, lengths)
            for position, path, payload, dtype_id, (strides, offsets, lengths) in zip(
                at.tolist(),
                names,
                payloads[at].tolist(),
                records.dtype_ids[rows][at].tolist(),
                [shapes[shape_id] for shape_id in shape_ids.tolist()],
                strict=True,
            )
        ]
        self.payload_nbytes += int((items.boxes[at, 2].prod(axis=1) * itemsizes[at]).sum())
        _, first = np.unique(rows[at], return_index=True)
        checked = at[first[payload_nbytes[at[first]] > 0]]
        self.npayloads += len(checked)
        checked = checked[crcs[checked] >= 0]
        fqns = items.fqns
        self._checks += [
            PayloadCheck(paths[path_id], payload, length, crc, fqns[name])
            for path_id, payload, length, crc, name in zip(
                path_ids[checked].tolist(),
                payloads[checked].tolist(),
                payload_nbytes[checked].tolist(),
                crcs[checked].tolist(),
                items.name_ids[checked].tolist(),
                strict=True,
            )
        ]

    def _add(self, position: int, item: ReadItem, place: StoredItem, stored: StoredItems, window: Window) -> None:
        if item.type is LoadItemType.BYTE_IO or place.transforms:
            self.whole_items.append((position, place))
            return
        sizes = stored.chunk_sizes(item.storage_index)
        lengths = item.lengths
        if lengths != sizes or any(item.storage_offsets) or len(item.storage_offsets) != len(sizes):
            check_box(item, sizes)
        tensor = stored_tensor(place, sizes, window)
        if tensor is None:
            self.whole_items.append((position, place))
            return
        payload_offset, payload_nbytes, crc, dtype, _, strides, storage_offset, _, _ = tensor
        path = place.path
        self._requests.append(
            ReadRequest(position, path, payload_offset, dtype, strides, storage_offset, item.storage_offsets, lengths)
        )
        self.payload_nbytes += lengths.numel() * dtype.itemsize
        # Items of one payload follow each other, in file order.
        if payload_nbytes and (payload_offset != self._last_payload[1] or path != self._last_payload[0]):
            self._last_payload = (path, payload_offset)
            self.npayloads += 1
            if crc is not None:
                self._checks.append(PayloadCheck(path, payload_offset, payload_nbytes, crc, place.fqn))

    def chunk_plan(self) -> LoadChunkPlan:
        checks = [] if self._options.verify == "off" else self._checks
        plan = self._plan(self._requests, checks)
        if self._options.verify == "full" and (unchecked := set(checks).difference(plan.checks)):
            plan = self._plan([*self._requests, *map(whole_payload_request, sorted(unchecked))], checks)
        return plan

    def _plan(self, requests: list[ReadRequest], checks: list[PayloadCheck]) -> LoadChunkPlan:
        return plan_load(requests, checks, slab_nbytes=self._options.slab_nbytes, gap_nbytes=READ_GAP_NBYTES)


class _OpenFiles:
    """The checkpoint's open files, by relative path: as many as the process may have, and of the rest those used last.

    A file that is passed over for others is closed when the last read of it, which may be in flight, lets go of it.
    """

    _PASSING_FILES = 8

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._kept: dict[str, PosixReader] = {}
        self._passing: dict[str, PosixReader] = {}

    def open(self, paths: set[str]) -> None:
        """Open them all, as far as the process's limit on open files allows; the rest is opened when it is needed."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for path in sorted(paths) if limit == resource.RLIM_INFINITY else sorted(paths)[: limit // 2]:
            if path not in self._kept:
                self._kept[path] = self._opened(path)

    def get(self, path: str) -> PosixReader:
        """The open file.

        Raises:
            CheckpointNotFoundError: it does not exist.
        """
        file = self._kept.get(path) or self._passing.get(path)
        if file is None:
            file = self._passing[path] = self._opened(path)
            if len(self._passing) > self._PASSING_FILES:
                del self._passing[next(iter(self._passing))]
        return file

    def _opened(self, path: str) -> PosixReader:
        return PosixReader(os.path.join(self._directory, path))

    def close(self) -> None:
        for file in (*self._kept.values(), *self._passing.values()):
            file.close()
        self._kept.clear()
        self._passing.clear()


def _of_dtypes(records: ItemRecords, dtypes: Collection[torch.dtype]) -> NDArray[np.bool_]:
    """Whether each of the records' dtypes is one of these; False for NONE, which is the last of the table."""
    return np.array([*(dtype in dtypes for dtype in records.dtypes), False], dtype=bool)


def _save_id(metadata: Metadata) -> str | None:
    return getattr(metadata.storage_meta, "save_id", None)
