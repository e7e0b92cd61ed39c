"""Where the items of an open checkpoint lie: from DCP's metadata or, where it does not say, from the envelope."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from gpudcp._dcp import ItemExtras, item_extras
from gpudcp.boxes import row_major_strides
from gpudcp.columns import CheckpointColumns
from gpudcp.errors import CorruptCheckpointError, MissingKeyError, PlanError, TransferError, UnsafeCheckpointError
from gpudcp.files.base import FileReader
from gpudcp.formats.archive import StoredTensor, read_stored_tensor
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable
from gpudcp.records import ItemRecords
from gpudcp.views import ColumnMetadata


class StoredItem(NamedTuple):
    """One item's range of a file, checked: inside the directory and, once the file is open, inside the file."""

    fqn: str
    path: str
    byte_offset: int
    nbytes: int
    transforms: tuple[str, ...]
    extras: ItemExtras


class StoredItems:
    """The storage records of one checkpoint, looked up by storage index and checked on the way."""

    def __init__(self, metadata: Metadata, directory: str) -> None:
        records = metadata.storage_data
        if not isinstance(records, Mapping):
            raise CorruptCheckpointError(f"{directory}: the metadata has no storage_data", path=directory)
        self._records: Mapping[Any, Any] = records
        self._tensors = metadata.state_dict_metadata
        self._directory = directory
        self._safe_paths: set[str] = set()
        self._metadata = metadata

    @cached_property
    def _columns(self) -> tuple[CheckpointColumns, ItemRecords] | None:
        metadata = self._metadata
        if not (isinstance(metadata, ColumnMetadata) and metadata.is_unchanged) or metadata.row_records is None:
            return None
        return metadata.columns, metadata.row_records

    @cached_property
    def _rows(self) -> _Rows | None:
        return None if self._columns is None else _Rows(*self._columns)

    @cached_property
    def _by_fqn(self) -> dict[str, tuple[MetadataIndex, Any]]:
        # Most tensors are one item: found by name at a third of the cost of hashing a MetadataIndex, which is Python.
        records = self._records
        by_fqn = {index.fqn: (index, info) for index, info in records.items() if isinstance(index, MetadataIndex)}
        return by_fqn if len(by_fqn) == len(records) else {}

    def checked_paths(self, paths: Iterable[str]) -> set[str]:
        """These, all inside the directory.

        Raises:
            UnsafeCheckpointError: one of them is not.
        """
        found = set(paths)
        for path in found:
            self._check_inside(path, "")
        return found

    def paths(self, items: Sequence[ReadItem]) -> set[str]:
        """The files, relative to the directory, that these items need."""
        return {self.find(item.storage_index).path for item in items}

    def likely_paths(self, items: Sequence[ReadItem]) -> set[str]:
        """The same, found at once where there are as many items as records: it may name files that are not needed."""
        records = self._records
        if self._columns is not None:
            rows = self._columns[1]
            if len(rows.path_ids) == len(items):  # a load of everything, most of the time
                return self.checked_paths(rows.paths[path_id] for path_id in np.unique(rows.path_ids).tolist())
        elif len(records) == len(items):
            found = {getattr(info, "relative_path", None) for info in records.values()}
            if all(isinstance(path, str) for path in found):
                return self.checked_paths(map(str, found))
        return self.paths(items)

    def find(self, index: MetadataIndex) -> StoredItem:
        """The item's place.

        Raises:
            MissingKeyError: the checkpoint has no such item.
            CorruptCheckpointError: its record is no record.
            UnsafeCheckpointError: its file lies outside the directory.
        """
        if self._rows is not None and (place := self._rows.find(index)) is not None:
            if place.path not in self._safe_paths:
                self._check_inside(place.path, index.fqn)
            return place
        known = self._by_fqn.get(index.fqn)
        info = known[1] if known is not None and known[0].offset == index.offset else self._records.get(index)
        if info is None:
            raise MissingKeyError(f"{self._directory}: no item {index.fqn!r} at offset {index.offset}")
        try:
            path, start, nbytes = info.relative_path, info.offset, info.length
            extras = item_extras(info)
            transforms = () if info.transform_descriptors is None else tuple(info.transform_descriptors)
        except (AttributeError, TypeError, ValueError) as err:
            raise CorruptCheckpointError(f"{self._directory}: {index.fqn}: {err}", fqn=index.fqn) from None
        if not (type(path) is str and type(start) is type(nbytes) is int and start >= 0 and nbytes >= 0):
            raise CorruptCheckpointError(
                f"{self._directory}: {index.fqn}: the storage record is {info!r:.200}", fqn=index.fqn
            )
        if path not in self._safe_paths:
            self._check_inside(path, index.fqn)
        return StoredItem(index.fqn, path, start, nbytes, transforms, extras)

    def chunk_sizes(self, index: MetadataIndex) -> tuple[int, ...] | None:
        """The sizes of the saved chunk that a storage index names; None where only the file says them.

        A load planner may have renamed the entries of its metadata; what is stored has its old name still.
        """
        tensor = self._tensors.get(index.fqn)
        if tensor is None:
            return None
        if not isinstance(tensor, TensorStorageMetadata):
            raise CorruptCheckpointError(
                f"{self._directory}: {index.fqn}: is no tensor in this checkpoint", fqn=index.fqn
            )
        chunks, hint = tensor.chunks, index.index
        if hint is not None and 0 <= hint < len(chunks) and chunks[hint].offsets == index.offset:
            return chunks[hint].sizes
        for chunk in chunks:
            if chunk.offsets == index.offset:
                return chunk.sizes
        raise CorruptCheckpointError(
            f"{self._directory}: {index.fqn}: no chunk at offset {index.offset}", fqn=index.fqn
        )

    def _check_inside(self, path: str, fqn: str) -> None:
        if os.path.isabs(path) or "\0" in path or ".." in path.split("/") or not path:
            raise UnsafeCheckpointError(
                f"{self._directory}: {fqn}: the file {path!r} lies outside the checkpoint", refused=path
            )
        self._safe_paths.add(path)


class _Rows:
    """The rows of a checkpoint's columns as lists: looked up by an index and its hint, without making any object."""

    def __init__(self, columns: CheckpointColumns, records: ItemRecords) -> None:
        self._numbers = columns.numbers
        self._first_rows = columns.first_rows.tolist()
        offsets = list(records.indices.offsets)
        self._offsets = [offsets[number] for number in records.indices.offset_ids.tolist()]
        self._paths = [records.paths[number] for number in records.path_ids.tolist()]
        self._starts, self._nbytes = records.byte_offsets.tolist(), records.nbytes.tolist()
        self._payloads, self._crcs = records.payload_offsets.tolist(), records.crcs.tolist()
        self._dtypes = [*records.dtypes, None]
        self._dtype_ids = records.dtype_ids.tolist()

    def find(self, index: MetadataIndex) -> StoredItem | None:
        """The item's place; None where the hint is not right: then the index has to be searched for."""
        number = self._numbers.get(index.fqn)
        if number is None:
            return None
        row = self._first_rows[number] + (index.index or 0)
        if not self._first_rows[number] <= row < self._first_rows[number + 1] or self._offsets[row] != index.offset:
            return None
        payload, crc = self._payloads[row], self._crcs[row]
        extras = ItemExtras(
            None if payload < 0 else payload, self._dtypes[self._dtype_ids[row]], None if crc < 0 else crc
        )
        return StoredItem(index.fqn, self._paths[row], self._starts[row], self._nbytes[row], (), extras)


def check_range(item: StoredItem, file: FileReader) -> None:
    """That the item's range lies inside its file.

    Raises:
        TransferError: the file is too short.
    """
    if item.byte_offset + item.nbytes > file.nbytes:
        raise TransferError(
            f"{file.path}: {item.fqn}: needs bytes {item.byte_offset} to {item.byte_offset + item.nbytes}, "
            f"the file has {file.nbytes}",
            path=file.path,
            byte_offset=item.byte_offset,
            expected_nbytes=item.nbytes,
            moved_nbytes=max(0, file.nbytes - item.byte_offset),
        )


def stored_tensor(item: StoredItem, sizes: tuple[int, ...] | None, window: Window) -> StoredTensor | None:
    """How the item's tensor lies in its file; None: not as one strided payload, so torch.load must read it.

    ``sizes`` are those of the metadata, if it has the tensor.

    Raises:
        CorruptCheckpointError: the item contradicts the metadata.
    """
    path = window.file.path
    offset, dtype, crc = item.extras
    if sizes is None or offset is None or dtype is None:
        found = read_stored_tensor(
            window.read, byte_offset=item.byte_offset, nbytes=item.nbytes, path=path, fqn=item.fqn
        )
        if found is not None and sizes is not None and found.sizes != sizes:
            raise CorruptCheckpointError(
                f"{path}: {item.fqn}: the file holds shape {found.sizes}, the metadata says {tuple(sizes)}",
                path=path,
                fqn=item.fqn,
            )
        return None if found is None or found.is_conj or found.is_neg else found
    nbytes, strides = _row_major(sizes, dtype)
    if nbytes is None:
        raise CorruptCheckpointError(
            f"{path}: {item.fqn}: the metadata speaks of a payload of {dtype}, which has none", path=path, fqn=item.fqn
        )
    if offset < item.byte_offset or offset + nbytes > item.byte_offset + item.nbytes:
        raise CorruptCheckpointError(
            f"{path}: {item.fqn}: a payload of {nbytes} bytes at byte {offset} lies outside its item, "
            f"{item.nbytes} bytes at {item.byte_offset}",
            path=path,
            fqn=item.fqn,
        )
    return StoredTensor(offset, nbytes, crc, dtype, sizes, strides, 0, False, False)


@lru_cache(maxsize=4096)
def _row_major(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[int | None, tuple[int, ...]]:
    """Bytes and strides of a contiguous tensor; no bytes for dtypes that are never saved as a plain payload."""
    is_plain = is_savable(dtype) and dtype not in QUANTIZED_DTYPES
    return prod(sizes) * dtype.itemsize if is_plain else None, row_major_strides(sizes)


def check_box(item: ReadItem, sizes: tuple[int, ...]) -> None:
    """That a read item asks for a box inside the saved chunk.

    Raises:
        PlanError: it does not.
    """
    offsets, lengths = item.storage_offsets, item.lengths
    if lengths == sizes and len(offsets) == len(sizes) and not any(offsets):
        return
    if len(offsets) != len(sizes) or len(lengths) != len(sizes):
        raise PlanError(
            f"{item.storage_index.fqn}: offsets {tuple(offsets)}, lengths {tuple(lengths)} of a chunk {tuple(sizes)}"
        )
    for offset, length, size in zip(offsets, lengths, sizes, strict=True):
        if offset < 0 or length < 0 or offset + length > size:
            raise PlanError(
                f"{item.storage_index.fqn}: offsets {tuple(offsets)}, lengths {tuple(lengths)} leave a chunk of "
                f"{tuple(sizes)}"
            )


def is_object(item: ReadItem) -> bool:
    """Whether the item is read as bytes."""
    return item.type == LoadItemType.BYTE_IO


class Window:
    """Small reads of one file in ascending order, served from blocks: a directory and a pickle for each item."""

    _BLOCK_NBYTES = 32 << 10

    def __init__(self, file: FileReader) -> None:
        self.file = file
        self.nbytes = 0
        """Bytes read of the file."""
        self._start = 0
        self._block = memoryview(b"")

    def read(self, byte_offset: int, nbytes: int) -> memoryview:
        """Exactly these bytes of the file."""
        if not (self._start <= byte_offset and byte_offset + nbytes <= self._start + len(self._block)):
            available = max(nbytes, min(self._BLOCK_NBYTES, self.file.nbytes - byte_offset))
            block = memoryview(bytearray(available))
            self.file.read(block, byte_offset)
            self.nbytes += available
            self._start, self._block = byte_offset, block
        position = byte_offset - self._start
        return self._block[position : position + nbytes]
