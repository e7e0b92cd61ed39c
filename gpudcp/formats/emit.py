"""Assemble the pickle of a checkpoint's Metadata from columns, without making its objects.

The C pickler writes everything that is shared (names, classes, planner data) once, into its memo; its STOP is turned
into a POP. What follows are fixed-width records that fetch from that memo, so NumPy fills all records of a kind, block
by block. Unpickled, the result is equal, field by field, to what ``pickle.dumps(metadata)`` gives, and no two entries
share a mutable object. Opcodes: Python's pickletools, protocol 4.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
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
from gpudcp.arrays import NONE, Column, Int64, distinct_numbers
from gpudcp.formats.content import Content, all_are, content_of
from gpudcp.formats.opcoderows import GET, ROWS_AT_ONCE, Numbers, Rows, fetched, get, integers
from gpudcp.records import ItemRecords
from gpudcp.sizes import SizeTable

_PUT = b"r"  # LONG_BINPUT, then the memo index as 4 bytes
_NEW = b")\x81"  # EMPTY_TUPLE NEWOBJ: an instance of the class below, without calling it
_STATE = b"}("  # EMPTY_DICT MARK: the state, up to _BUILD
_BUILD = b"ub"  # SETITEMS BUILD
_CALL = b"\x85R"  # TUPLE1 REDUCE: what is below, called with what is above
_NONE = b"N"
_SET = b"s"  # SETITEM
_APPEND = b"a"
_POP = b"0"
_MEMOIZE = b"\x94"


class Emitted(NamedTuple):
    """A pickle whose length is known before it is made."""

    nbytes: int
    parts: Iterator[bytes | memoryview]


def emit_metadata(metadata: Metadata, records: ItemRecords) -> Emitted | None:
    """The pickle of ``metadata`` with these storage records as its ``storage_data``, made as its parts are asked for.

    Returns None for a Metadata with values that only a pickler knows how to write.
    """
    if not all_are((metadata.version, metadata.storage_meta), str, StorageMeta, type(None)):
        return None
    content = content_of(metadata)
    if content is None:
        return None
    names = dict.fromkeys(content.names)
    names.update(dict.fromkeys(records.indices.names.fqns))
    if not all_are(names, str):
        return None
    # What every record fetches comes first: an index below 256 takes one byte.
    shared: list[Any] = [_WORDS, _CLASSES, records.dtypes, metadata.storage_meta, metadata.version]
    shared += [content.states, records.paths]
    memo = _Memo(shared, list(names), None if metadata.planner_data is None else dict(metadata.planner_data))
    # Of offsets those that a record has: so that the same records give the same bytes.
    used, offset_ids = distinct_numbers(records.indices.offset_ids)
    sizes = SizeTable.joined([content.sizes, records.indices.offsets[used]])
    if int(sizes.values.min(initial=0)) < 0:
        return None
    emitter = _Emitter(memo, sizes)
    body: list[bytes | Rows | _EntryRows] = [
        *emitter.sizes(),
        emitter.get(Metadata) + _NEW + _STATE,
        emitter.get_word("state_dict_metadata") + b"}",
        emitter.entries(content),
        emitter.get_word("planner_data") + memo.planner_data,
        emitter.get_word("storage_data") + b"}",
        *emitter.records(records, offset_ids + len(content.sizes)),
        emitter.get_word("storage_meta") + emitter.get_or_none(metadata.storage_meta),
        emitter.get_word("version") + emitter.get_or_none(metadata.version) + _BUILD,
        b".",
    ]
    nbytes = sum(len(each) if isinstance(each, bytes) else each.nbytes for each in body)
    # A frame, because a file object without peek() is otherwise read opcode by opcode.
    start = memo.pickled + b"\x95" + nbytes.to_bytes(8, "little")
    parts = ([each] if isinstance(each, bytes) else each.blocks() for each in body)
    return Emitted(len(start) + nbytes, chain([start], chain.from_iterable(parts)))


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
    torch.Size,
)


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
        self.names = {name: self.indices[id(name)] for name in names if id(name) in self.indices}
        own = [name for name in names if name not in self.names]
        self.names.update((name, number) for number, name in enumerate(own, start=end + 1))
        self.planner_data = b"N" if planner_data is None else get(end + 1 + len(own))
        for value in (own, planner_data):
            buffer.seek(0)
            buffer.truncate()
            pickler.dump(value)
            parts.append(buffer.getvalue())
        self.end = end + 1 + len(own) + parts[-1].count(_MEMOIZE)
        """An index from which on none is taken: of other bytes than opcodes too many are counted."""
        # Each dump ends in STOP; POP instead leaves the stack as it was, and the memo full.
        self.pickled = b"".join(part[:-1] + _POP for part in parts)


class _EntryRows:
    """Each tensor's head, chunks and tail, and each object's row, in the order of the names."""

    def __init__(self, content: Content, heads: Rows, chunks: Rows, objects: Rows, tail: bytes) -> None:
        self._content = content
        self._heads, self._chunks, self._objects, self._tail = heads, chunks, objects, tail
        self.nbytes = heads.nbytes + chunks.nbytes + objects.nbytes + len(tail) * len(content.counts)

    def blocks(self) -> Iterator[bytes]:
        """All bytes, of some thousand chunks or entries at once."""
        is_tensor, counts = self._content.is_tensor, self._content.counts
        stops = np.cumsum(counts)
        # How much of tensors, objects and chunks is done; a block ends where enough of them are full.
        ntensors, nobjects, nchunks, start = 0, 0, 0, 0
        tensors_before = np.concatenate([[0], np.cumsum(is_tensor)])
        while start < len(is_tensor):
            last = int(np.searchsorted(stops, nchunks + ROWS_AT_ONCE, side="right"))
            end = int(np.searchsorted(tensors_before, max(last, ntensors + 1), side="right")) - 1
            end = max(start + 1, min(end, start + ROWS_AT_ONCE))
            until = int(tensors_before[end])
            chunk_end = int(stops[until - 1]) if until else 0
            yield b"".join(self._woven(start, end, (ntensors, until), (nobjects, end - until), (nchunks, chunk_end)))
            start, ntensors, nobjects, nchunks = end, until, end - until, chunk_end

    def _woven(
        self, start: int, end: int, tensors: tuple[int, int], objects: tuple[int, int], chunks: tuple[int, int]
    ) -> Iterator[bytes | memoryview]:
        heads, every_object = iter(self._heads.block(*tensors)), iter(self._objects.block(*objects))
        every_chunk = self._chunks.block(*chunks).reshape(-1).data
        nbytes = iter((self._content.counts[slice(*tensors)] * self._chunks.width).tolist())
        at = 0
        for is_tensor in self._content.is_tensor[start:end].tolist():
            if is_tensor:
                before, at = at, at + next(nbytes)
                yield next(heads).data
                yield every_chunk[before:at]
                yield self._tail
            else:
                yield next(every_object).data


class _Emitter:
    """Fixed-width records over the memo."""

    def __init__(self, memo: _Memo, sizes: SizeTable) -> None:
        self._memo = memo.indices
        self._names = memo.names
        self._words = {word: word for word in _WORDS}
        # Sizes are memorised behind everything else, one after the other.
        first, numbers = sizes.distinct()
        is_size = sizes.ndims[first] != NONE
        self._distinct = first[is_size]
        self._size_table = sizes
        self._sizes = (memo.end + np.cumsum(is_size) - 1)[numbers].astype("<u4")
        """The index of each size; of what is None, any: it is masked by the form of its record."""

    def get(self, value: Any) -> bytes:
        return get(self._memo[id(value)])

    def get_word(self, word: str) -> bytes:
        return self.get(self._words[word])

    def get_or_none(self, value: Any) -> bytes:
        return _NONE if value is None else self.get(value)

    def _gets(self, values: Sequence[Any]) -> Column:
        """The memo indices of these objects."""
        return np.fromiter(map(self._memo.__getitem__, map(id, values)), dtype="<u4", count=len(values))

    def sizes(self) -> Iterator[Rows]:
        """Every size once: made, memorised and dropped."""
        ndims = self._size_table.ndims[self._distinct]
        for ndim in np.nonzero(np.bincount(ndims))[0].tolist():
            rows = self._distinct[ndims == ndim]
            begin, end = _TUPLES[ndim] if ndim < len(_TUPLES) else (b"(", b"t")
            numbers = (integers(self._size_table.values[rows, dim]) for dim in range(ndim))
            puts = self._sizes[rows]
            yield Rows(
                range(len(rows)),
                self.get(torch.Size) + begin, *chain.from_iterable(numbers), end + _CALL + _PUT,
                Numbers("<u4", puts.__getitem__), _POP,
            )  # fmt: skip

    def entries(self, content: Content) -> _EntryRows:
        """The entries of ``state_dict_metadata``, in its order, for the dict below them."""
        n, is_tensor = len(content.names), content.is_tensor
        names = np.fromiter(map(self._names.__getitem__, content.names), dtype="<u4", count=n)
        heads = Rows(
            range(len(content.counts)),
            GET, Numbers("<u4", names[is_tensor].__getitem__), self.get(TensorStorageMetadata) + _NEW + _STATE,
            self.get_word("properties") + self.get(TensorProperties) + _NEW,
            *fetched(self._gets(content.states), content.state_ids), b"b",
            self.get_word("size"), *fetched(self._sizes, content.size_ids), self.get_word("chunks") + b"]",
        )  # fmt: skip
        chunks = Rows(
            range(len(content.chunk_sizes)),
            self.get(ChunkStorageMetadata) + _NEW + _STATE,
            self.get_word("offsets"), *fetched(self._sizes, content.chunk_offsets),
            self.get_word("sizes"), *fetched(self._sizes, content.chunk_sizes), _BUILD + _APPEND,
        )  # fmt: skip
        objects = Rows(
            range(n - len(content.counts)),
            GET, Numbers("<u4", names[~is_tensor].__getitem__), self.get(BytesStorageMetadata) + _NEW + _SET,
        )  # fmt: skip
        return _EntryRows(content, heads, chunks, objects, _BUILD + _SET)

    def records(self, records: ItemRecords, offset_ids: Int64) -> Iterator[Rows]:
        """The entries of ``storage_data`` for the dict below them, those of one form after the other.

        Args:
            records: all of them.
            offset_ids: of each, the number of its offset among the sizes.
        """
        indices = records.indices
        names = np.fromiter(map(self._names.__getitem__, indices.names.fqns), dtype="<u4", count=len(indices.names))
        paths, dtypes = self._gets(records.paths), self._gets(records.dtypes)
        has_offset = (self._size_table.ndims != NONE)[offset_ids]
        form = (has_offset.view(np.uint8) << 3) | ((indices.hints != NONE).view(np.uint8) << 2)
        form |= ((records.payload_offsets >= 0).view(np.uint8) << 1) | (records.crcs >= 0).view(np.uint8)
        for kind in range(16):
            rows = np.nonzero(form == kind)[0]
            if not len(rows):
                continue
            payload: tuple[Any, ...] = (_NONE + _NONE,)
            if kind & 2:
                payload = (*integers(records.payload_offsets), *fetched(dtypes, records.dtype_ids))
            yield Rows(
                range(len(form)) if len(rows) == len(form) else rows,
                self.get(MetadataIndex) + _NEW + _STATE + self.get_word("index"),
                *(integers(indices.hints) if kind & 4 else (_NONE,)),
                self.get_word("fqn"), *fetched(names, indices.name_ids),
                *((self.get_word("offset"), *fetched(self._sizes, offset_ids)) if kind & 8 else ()),
                _BUILD + self.get(StorageInfo) + _NEW + _STATE,
                self.get_word("relative_path"), *fetched(paths, records.path_ids),
                self.get_word("offset"), *integers(records.byte_offsets),
                self.get_word("length"), *integers(records.nbytes),
                self.get_word("gpudcp"), *payload, *(integers(records.crcs) if kind & 1 else (_NONE,)),
                b"\x87" + _BUILD + _SET,
            )  # fmt: skip


_TUPLES = ((b")", b""), (b"", b"\x85"), (b"", b"\x86"), (b"", b"\x87"))
"""What stands before and behind the items of a tuple of none, one, two, three."""
