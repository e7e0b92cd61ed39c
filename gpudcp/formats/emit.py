"""Assemble the pickle of a checkpoint's Metadata from columns, without making its objects.

The C pickler writes everything that is shared (names, sizes, classes, planner data) once, into its memo; its STOP is
turned into a POP. What follows are fixed-width records that fetch from that memo, so NumPy fills all records of a kind
at once. Unpickled, the result is equal, field by field, to what ``pickle.dumps(metadata)`` gives, and no two entries
share a mutable object. Opcodes: Python's pickletools, protocol 4.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gpudcp._dcp import StorageInfo
from gpudcp.arrays import NONE, distinct_numbers, distinct_rows
from gpudcp.columns import CheckpointColumns, properties_key
from gpudcp.records import ItemRecords
from gpudcp.views import ColumnMetadata

_GET = b"j"  # LONG_BINGET, then the memo index as 4 bytes
_GET_BYTE = b"h"  # BINGET, then the memo index as 1 byte
_NEW = b")\x81"  # EMPTY_TUPLE NEWOBJ: an instance of the class below, without calling it
_STATE = b"}("  # EMPTY_DICT MARK: the state, up to _BUILD
_BUILD = b"ub"  # SETITEMS BUILD
_NONE = b"N"
_SET = b"s"  # SETITEM
_APPEND = b"a"

_ROWS_AT_ONCE = 1 << 12
"""Filled column by column while they are in the core's cache."""

Column = NDArray[Any]


def emit_metadata(metadata: Metadata, records: ItemRecords) -> list[bytes | memoryview] | None:
    """The pickle of ``metadata`` with these storage records as its ``storage_data``, in parts to be written in turn.

    Returns None for a Metadata with values that only a pickler knows how to write.
    """
    if not _all_are((metadata.version, metadata.storage_meta), str, StorageMeta, type(None)):
        return None
    entries = _entries_of(metadata)
    if entries is None:
        return None
    names = dict.fromkeys(entries.names)
    names.update(dict.fromkeys(records.indices.names.fqns))
    if not _all_are(names, str):
        return None
    sizes = entries.sizes  # one object for all equal ones: what the memo knows them by
    record_offsets = _unified(records.indices.offsets, sizes)

    # What every record fetches comes first: an index below 256 takes one byte.
    shared: list[Any] = [_WORDS, _CLASSES, list(sizes), entries.states, records.paths, records.dtypes]
    shared += [metadata.storage_meta, metadata.version]
    memo = _Memo(shared, list(names), None if metadata.planner_data is None else dict(metadata.planner_data))
    emitter = _Emitter(memo)
    body: list[bytes | memoryview] = [
        emitter.get(Metadata) + _NEW + _STATE,
        emitter.get_word("state_dict_metadata") + b"}",
        emitter.entries(entries),
        emitter.get_word("planner_data") + memo.planner_data,
        emitter.get_word("storage_data") + b"}",
        *emitter.records(records, record_offsets),
        emitter.get_word("storage_meta") + emitter.get_or_none(metadata.storage_meta),
        emitter.get_word("version") + emitter.get_or_none(metadata.version) + _BUILD,
        b".",
    ]
    # A frame, because a file object without peek() is otherwise read opcode by opcode.
    return [memo.pickled, b"\x95" + sum(map(len, body)).to_bytes(8, "little"), *body]


class _Entries(NamedTuple):
    """``state_dict_metadata`` as columns: tables of what is shared, and numbers into them."""

    names: Sequence[str]
    is_tensor: NDArray[np.bool_]
    sizes: dict[torch.Size, torch.Size]
    states: list[Any]
    """Of TensorProperties."""
    state_ids: Column
    """Of each tensor."""
    tensor_sizes: list[torch.Size]
    tensor_size_ids: Column
    counts: Column
    """Chunks of each tensor."""
    chunk_offsets: list[torch.Size]
    chunk_sizes: list[torch.Size]
    chunk_ids: Column
    """Of each chunk, into both tables."""


def _entries_of(metadata: Metadata) -> _Entries | None:
    if isinstance(metadata, ColumnMetadata) and metadata.is_unchanged:
        return _entries_of_columns(metadata.columns)
    if type(metadata) is not Metadata or type(metadata.planner_data) not in (dict, type(None)):
        return None
    values = list(metadata.state_dict_metadata.values())
    if not _all_are(values, TensorStorageMetadata, BytesStorageMetadata):
        return None
    tensors = [value for value in values if type(value) is TensorStorageMetadata]
    if not _all_are(map(attrgetter("properties"), tensors), TensorProperties):
        return None
    if not _all_are(map(attrgetter("chunks"), tensors), list):
        return None
    chunks = list(chain.from_iterable(map(attrgetter("chunks"), tensors)))
    if not _all_are(chunks, ChunkStorageMetadata):
        return None
    found_sizes = map(attrgetter("size"), tensors), map(attrgetter("offsets"), chunks), map(attrgetter("sizes"), chunks)
    if not _all_are(chain(*found_sizes), torch.Size):
        return None
    sizes: dict[torch.Size, torch.Size] = {}
    numbers: dict[Any, int] = {}
    states: list[Any] = []
    return _Entries(
        names=list(metadata.state_dict_metadata),
        is_tensor=np.array([type(value) is TensorStorageMetadata for value in values], dtype=bool),
        sizes=sizes,
        states=states,
        state_ids=np.array([_state_number(tensor.properties, numbers, states) for tensor in tensors], dtype=np.int64),
        tensor_sizes=_unified(map(attrgetter("size"), tensors), sizes),
        tensor_size_ids=np.arange(len(tensors)),
        counts=np.array([len(tensor.chunks) for tensor in tensors], dtype=np.int64),
        chunk_offsets=_unified(map(attrgetter("offsets"), chunks), sizes),
        chunk_sizes=_unified(map(attrgetter("sizes"), chunks), sizes),
        chunk_ids=np.arange(len(chunks)),
    )


def _entries_of_columns(columns: CheckpointColumns) -> _Entries:
    is_tensor = columns.property_ids != NONE
    entries = np.nonzero(is_tensor)[0]
    sizes: dict[torch.Size, torch.Size] = {}
    numbers: dict[Any, int] = {}
    states: list[Any] = []
    state_ids = [_state_number(each, numbers, states) for each in columns.properties]
    ndims = columns.ndims[entries]
    counts = np.diff(columns.first_rows)[entries]
    rows = np.repeat(columns.first_rows[entries] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    # Boxes are padded: one box is another one for tensors of other dimensions.
    row_ndims = np.repeat(ndims, counts).astype(np.int64)
    keys = columns.row_boxes[rows].astype(np.int64) * (columns.boxes.shape[2] + 1) + row_ndims
    used, chunk_ids = distinct_numbers(keys)
    boxes = columns.boxes[used // (columns.boxes.shape[2] + 1)].tolist()
    used_ndims = (used % (columns.boxes.shape[2] + 1)).tolist()
    size_keys = np.concatenate([ndims[:, None], columns.sizes[entries]], axis=1)
    first, tensor_size_ids = distinct_rows(size_keys)
    return _Entries(
        names=columns.names.fqns,
        is_tensor=is_tensor,
        sizes=sizes,
        states=states,
        state_ids=np.array(state_ids, dtype=np.int64)[columns.property_ids[entries]] if state_ids else entries,
        tensor_sizes=_unified((torch.Size(size[:ndim]) for ndim, *size in size_keys[first].tolist()), sizes),
        tensor_size_ids=tensor_size_ids,
        counts=counts,
        chunk_offsets=_unified((torch.Size(box[0][:n]) for box, n in zip(boxes, used_ndims, strict=True)), sizes),
        chunk_sizes=_unified((torch.Size(box[1][:n]) for box, n in zip(boxes, used_ndims, strict=True)), sizes),
        chunk_ids=chunk_ids,
    )


_WORDS = (
    *("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"),
    *("properties", "size", "chunks", "offsets", "sizes"),
    *("fqn", "offset", "index", "relative_path", "length", "gpudcp"),
)
_CLASSES = (
    Metadata,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    MetadataIndex,
    StorageInfo,
)


def _all_are(values: Iterable[Any], *types: type) -> bool:
    """Whether each value is of one of these very types: of a subclass more would have to be written."""
    return set(map(type, values)) <= {*types}


def _state_number(properties: TensorProperties, numbers: dict[Any, int], states: list[Any]) -> int:
    """The number of the state that pickle asks these properties for, the same for equal ones."""
    number = numbers.setdefault(properties_key(properties), len(states))
    if number == len(states):
        states.append(properties.__getstate__())  # type: ignore[no-untyped-call]
    return number


def _unified(found: Iterable[Any], known: dict[Any, Any]) -> list[Any]:
    return [None if each is None else known.setdefault(each, each) for each in found]


class _Memo:
    """What the body fetches: pickled once by the C pickler, and known by its index in the unpickler's memo.

    The index of the few shared values is looked up. Names and planner data are many: their indices follow from the
    order in which the pickler memorises them.
    """

    def __init__(self, shared: list[Any], names: list[str], planner_data: dict[Any, Any] | None) -> None:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=4)
        pickler.dump(shared)
        self.indices = {key: index for key, (index, _) in pickler.memo.copy().items()}
        end = len(self.indices)
        parts = [buffer.getvalue()]
        # A name that is the same object as a shared value is fetched, not memorised again.
        self.numbers = {name: self.indices[id(name)] for name in names if id(name) in self.indices}
        names = [name for name in names if name not in self.numbers]
        self.numbers.update((name, number) for number, name in enumerate(names, start=end + 1))
        self.planner_data = b"N" if planner_data is None else _get(end + 1 + len(names))
        for value in (names, planner_data):
            buffer.seek(0)
            buffer.truncate()
            pickler.dump(value)
            parts.append(buffer.getvalue())
        # Each dump ends in STOP; POP instead leaves the stack as it was, and the memo full.
        self.pickled = b"".join(part[:-1] + b"0" for part in parts)


def _get(index: int) -> bytes:
    return _GET_BYTE + index.to_bytes(1, "little") if index < 256 else _GET + index.to_bytes(4, "little")


def _int(values: Column) -> tuple[bytes | Column, ...]:
    """An opcode and a column: non-negative integers in the fewest bytes that hold them all."""
    most = int(values.max(initial=0))
    if most < 1 << 16:
        return b"M", values.astype("<u2")  # BININT2
    if most < 1 << 31:
        return b"J", values.astype("<i4")  # BININT, which is signed
    if most < 1 << 32:
        return b"\x8a\x05", values.astype("<u4"), b"\0"  # LONG1 of 5 bytes, two's complement
    return b"\x8a\x08", values.astype("<i8")


class _Emitter:
    """Fixed-width records over the memo."""

    def __init__(self, memo: _Memo) -> None:
        self._memo = memo.indices
        self._numbers = memo.numbers
        self._words = {word: word for word in _WORDS}

    def get(self, value: Any) -> bytes:
        return _get(self._memo[id(value)])

    def get_word(self, word: str) -> bytes:
        return self.get(self._words[word])

    def get_or_none(self, value: Any) -> bytes:
        return _NONE if value is None else self.get(value)

    def column(self, values: Sequence[Any]) -> Column:
        """The memo indices of these objects."""
        return np.fromiter(map(self._memo.__getitem__, map(id, values)), dtype="<u4", count=len(values))

    def entries(self, entries: _Entries) -> bytes:
        """The entries of ``state_dict_metadata``, in its order, for the dict below them."""
        n, is_tensor = len(entries.names), entries.is_tensor
        keys = np.fromiter(map(self._numbers.__getitem__, entries.names), dtype="<u4", count=n)
        heads = _rows(
            _GET, keys[is_tensor], self.get(TensorStorageMetadata) + _NEW + _STATE,
            self.get_word("properties") + self.get(TensorProperties) + _NEW + _GET,
            self.column(entries.states)[entries.state_ids], b"b",
            self.get_word("size") + _GET, self.column(entries.tensor_sizes)[entries.tensor_size_ids],
            self.get_word("chunks") + b"]",
        )  # fmt: skip
        chunks = _rows(
            self.get(ChunkStorageMetadata) + _NEW + _STATE,
            self.get_word("offsets") + _GET, self.column(entries.chunk_offsets)[entries.chunk_ids],
            self.get_word("sizes") + _GET, self.column(entries.chunk_sizes)[entries.chunk_ids], _BUILD + _APPEND,
        )  # fmt: skip
        objects = _rows(_GET, keys[~is_tensor], self.get(BytesStorageMetadata) + _NEW + _SET)
        return b"".join(_woven(entries, heads, chunks, objects, _BUILD + _SET))

    def records(self, records: ItemRecords, offsets: list[Any]) -> list[memoryview]:
        """The entries of ``storage_data`` for the dict below them, those of one form after the other."""
        n, indices = len(records), records.indices
        numbers = map(self._numbers.__getitem__, indices.names.fqns)
        keys = np.fromiter(numbers, dtype="<u4", count=len(indices.names))[indices.name_ids]
        # What has no offset takes any number: it is masked by the form of its record.
        gets = self.column([records.paths if offset is None else offset for offset in offsets])
        offset_gets = gets[indices.offset_ids]
        has_offset = np.array([offset is not None for offset in offsets], dtype=bool)[indices.offset_ids]
        has_hint = indices.hints != NONE
        paths = self.column(records.paths)[records.path_ids]
        dtypes = self.column(records.dtypes)[records.dtype_ids] if records.dtypes else np.zeros(n, dtype="<u4")
        has_payload, has_crc = records.payload_offsets >= 0, records.crcs >= 0
        form = has_offset * 8 + has_hint * 4 + has_payload * 2 + has_crc
        parts = []
        for kind in np.nonzero(np.bincount(form))[0].tolist():
            at = form == kind
            payload: tuple[Any, ...] = (_NONE + _NONE,)
            if kind & 2:
                payload = (*_int(records.payload_offsets[at]), _GET, dtypes[at])
            parts.append(
                _rows(
                    self.get(MetadataIndex) + _NEW + _STATE + self.get_word("index"),
                    *(_int(indices.hints[at]) if kind & 4 else (_NONE,)),
                    self.get_word("fqn") + _GET, keys[at],
                    *((self.get_word("offset") + _GET, offset_gets[at]) if kind & 8 else ()),
                    _BUILD + self.get(StorageInfo) + _NEW + _STATE,
                    self.get_word("relative_path") + _GET, paths[at],
                    self.get_word("offset"), *_int(records.byte_offsets[at]),
                    self.get_word("length"), *_int(records.nbytes[at]),
                    self.get_word("gpudcp"), *payload, *(_int(records.crcs[at]) if kind & 1 else (_NONE,)),
                    b"\x87" + _BUILD + _SET,
                ).reshape(-1).data
            )  # fmt: skip
        return parts


def _rows(*parts: bytes | Column) -> NDArray[np.uint8]:
    """One row of bytes for each element of the columns: constants and little-endian columns side by side."""
    columns = [part for part in parts if isinstance(part, np.ndarray)]
    template, offsets = bytearray(), []
    for part in parts:
        if isinstance(part, np.ndarray):
            offsets.append(len(template))
        template += part if isinstance(part, bytes) else bytes(part.itemsize)
    nrows, width = max(map(len, columns), default=0), len(template)
    rows = np.empty(nrows, dtype=f"V{width}")
    formats = [column.dtype.newbyteorder("<") for column in columns]
    names = [str(number) for number in range(len(columns))]
    fields = rows.view(np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": width}))
    for first in range(0, nrows, _ROWS_AT_ONCE):
        block = slice(first, first + _ROWS_AT_ONCE)
        rows[block] = bytes(template)
        for name, column in zip(names, columns, strict=True):
            fields[name][block] = column[block]
    return rows.view(np.uint8).reshape(nrows, width)


def _woven(
    entries: _Entries, heads: Column, chunks: Column, objects: Column, tail: bytes
) -> Iterator[bytes | memoryview]:
    """Each tensor's head, chunks and tail, and each object's row, in the order of the names."""
    every_head, every_object = iter(heads), iter(objects)
    every_chunk = chunks.reshape(-1).data
    nbytes = iter((entries.counts * chunks.shape[1]).tolist())
    end = 0
    for is_tensor in entries.is_tensor.tolist():
        if is_tensor:
            start, end = end, end + next(nbytes)
            yield next(every_head).data
            yield every_chunk[start:end]
            yield tail
        else:
            yield next(every_object).data
