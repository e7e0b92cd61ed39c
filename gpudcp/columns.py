"""Plans, metadata and what was written as struct-of-arrays: one row for each item, no object.

Boxes are held once: a plan's items are numbers into a table of templates, as thousands of tensors share a few shapes.
Tables pad boxes to the most dimensions that one of them has: offsets with 0, sizes and lengths with 1.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from gpudcp._dcp import ItemExtras, StorageInfo, storage_info

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Column = NDArray[Any]
Path = tuple[Any, ...]

_Hashes = NDArray[np.uint64]

NONE = -1
"""In a column of numbers: there is none."""


class Names:
    """The keys of a flat state dict, in order, and the path of each in the nested dict that it comes from.

    Pickled once compressed; unpickled once for each digest, as all ranks of a job mostly have the same keys.
    """

    __slots__ = ("_digest", "_packed", "fqns", "paths")

    def __init__(self, fqns: Sequence[str], paths: Mapping[str, Path] | None) -> None:
        self.fqns = tuple(fqns)
        self.paths = paths
        """None where the state dict was not flattened."""
        self._packed: bytes | None = None
        self._digest: bytes | None = None

    @property
    def packed(self) -> bytes:
        """Both, as compressed JSON."""
        if self._packed is None:
            nested = None
            if self.paths is not None:
                nested = {fqn: path for fqn, path in self.paths.items() if path != (fqn,)}
            self._packed = zlib.compress(json.dumps([self.fqns, nested]).encode(), 1)
        return self._packed

    @property
    def digest(self) -> bytes:
        """16 bytes that no other keys have."""
        if self._digest is None:
            self._digest = blake2b(self.packed, digest_size=16).digest()
        return self._digest

    def __len__(self) -> int:
        return len(self.fqns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _known_names, (self.digest, self.packed)

    @classmethod
    def unpacked(cls, packed: bytes) -> Names:
        """What `packed` gave."""
        fqns, nested = json.loads(zlib.decompress(packed))
        paths = None
        if nested is not None:
            paths = {fqn: (fqn,) for fqn in fqns} | {fqn: tuple(path) for fqn, path in nested.items()}
        names = cls(fqns, paths)
        names._packed = packed
        return names


_MOST_KNOWN = 64
_known: OrderedDict[bytes, Names] = OrderedDict()
_known_lock = Lock()


def _known_names(digest: bytes, packed: bytes) -> Names:
    with _known_lock:
        names = _known.get(digest)
        if names is None:
            names = _known[digest] = Names.unpacked(packed)
            names._digest = digest
            if len(_known) > _MOST_KNOWN:
                _known.popitem(last=False)
        return names


PackedArray = tuple[str, tuple[int, ...], bytes]


def pack_array(array: Column) -> PackedArray:
    """An array of integers in few bytes: the narrowest type that holds them, compressed."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    narrow = next(kind for kind in ("b", "h", "i", "q") if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return narrow, array.shape, zlib.compress(array.astype(narrow).tobytes(), 1)


def unpack_array(packed: PackedArray, dtype: type[Any]) -> Column:
    """The array, with elements of ``dtype``."""
    narrow, shape, data = packed
    return np.frombuffer(zlib.decompress(data), dtype=narrow).reshape(shape).astype(dtype)


def properties_key(properties: TensorProperties) -> tuple[Any, ...]:
    """What makes two TensorProperties equal, hashable."""
    return _PROPERTIES(properties)


_PROPERTIES = attrgetter("dtype", "layout", "requires_grad", "memory_format", "pin_memory")


def distinct_rows(table: Int64) -> tuple[Int64, Int64]:
    """First row of each distinct row of a table of integers, and the number of every row's among those."""
    hashes = _row_hashes(table)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(table[first[inverse]], table):  # two rows with one hash: one in 2^64 pairs
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _row_hashes(table: Int64) -> _Hashes:
    """64 well-mixed bits for each row."""
    hashes = np.full(len(table), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in table.T:
        hashes = _mixed(hashes ^ column.astype(np.uint64))
    return hashes


def _mixed(values: _Hashes) -> _Hashes:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


OBJECT, TENSOR, SHARD = 3, 2, 1
"""Kinds of items: BYTE_IO, TENSOR, SHARD."""


@dataclass(frozen=True, slots=True)
class Templates:
    """Distinct shapes of items: what is written of a tensor, but for its name. Row 0 to n-1.

    ``heads`` is n x 3: kind, number of the properties (NONE: an object), dimensions. ``boxes`` is n x 3 x D: the whole
    tensor's size, the chunk's offsets and its lengths, in elements.
    """

    heads: Int32
    boxes: Int64
    properties: tuple[TensorProperties, ...]

    @property
    def kinds(self) -> Int32:
        return self.heads[:, 0]

    @property
    def property_ids(self) -> Int32:
        return self.heads[:, 1]

    @property
    def ndims(self) -> Int32:
        return self.heads[:, 2]

    def __len__(self) -> int:
        return len(self.heads)

    def itemsizes(self) -> Int64:
        """Bytes of one element; 0 for objects."""
        sizes = np.array([each.dtype.itemsize for each in self.properties] + [0], dtype=np.int64)
        return sizes[self.property_ids]

    def nbytes(self) -> Int64:
        """Bytes of the chunk; 0 for objects."""
        nbytes: Int64 = self.boxes[:, 2].prod(axis=1) * self.itemsizes()
        return nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked_templates, (pack_array(self.heads), pack_array(self.boxes), self.properties)


def _unpacked_templates(heads: PackedArray, boxes: PackedArray, properties: tuple[TensorProperties, ...]) -> Templates:
    return Templates(unpack_array(heads, np.int32), unpack_array(boxes, np.int64), properties)


Sizes = tuple[int, ...]


class TemplateTable:
    """Collects templates, each once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._rows: list[tuple[int, int, Sizes, Sizes, Sizes]] = []
        self._property_ids: dict[Any, int] = {}
        self._properties: list[TensorProperties] = []
        self._templates: Templates | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def number(
        self, kind: int, properties: TensorProperties | None, size: Sizes, offsets: Sizes, lengths: Sizes
    ) -> int:
        """The template's number, a new one for what was not there yet."""
        key = (kind, None if properties is None else _PROPERTIES(properties), size, offsets, lengths)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._rows)
            property_id = NONE
            if properties is not None:
                property_id = self._property_ids.setdefault(key[1], len(self._properties))
                if property_id == len(self._properties):
                    self._properties.append(properties)
            self._rows.append((kind, property_id, tuple(size), tuple(offsets), tuple(lengths)))
            self._templates = None
        return number

    def templates(self) -> Templates:
        """All of them so far."""
        if self._templates is None:
            most = max((len(size) for _, _, size, _, _ in self._rows), default=0)
            heads = np.array([(kind, prop, len(size)) for kind, prop, size, _, _ in self._rows], dtype=np.int32)
            boxes = [
                (_padded(size, most, 1), _padded(offsets, most, 0), _padded(lengths, most, 1))
                for _, _, size, offsets, lengths in self._rows
            ]
            self._templates = Templates(
                heads.reshape(-1, 3),
                np.array(boxes, dtype=np.int64).reshape((len(self._rows), 3, most)),
                tuple(self._properties),
            )
        return self._templates


def _padded(values: Sizes, ndim: int, fill: int) -> list[int]:
    return [*values, *[fill] * (ndim - len(values))]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveColumns:
    """The items of a save plan: a name and a template each, and the number of its chunk in the global plan."""

    names: Names
    name_ids: Int32
    template_ids: Int32
    templates: Templates
    hints: Int32 | None = None
    """The chunk's number among those of its tensor; NONE for objects. None before the global plan."""

    def __len__(self) -> int:
        return len(self.name_ids)

    def indices(self) -> Indices:
        """The items' MetadataIndex, as columns."""
        return Indices(
            names=self.names,
            name_ids=self.name_ids,
            offsets=_offsets_of(self.templates),
            offset_ids=self.template_ids,
            hints=np.full(len(self), NONE, dtype=np.int64) if self.hints is None else self.hints.astype(np.int64),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        in_order = len(self.names) == len(self) and bool((self.name_ids == np.arange(len(self))).all())
        packed = (
            None if in_order else pack_array(self.name_ids),
            pack_array(self.template_ids),
            None if self.hints is None else pack_array(self.hints),
        )
        return _unpacked_columns, (self.names, packed, self.templates)


def _unpacked_columns(
    names: Names, packed: tuple[PackedArray | None, PackedArray, PackedArray | None], templates: Templates
) -> SaveColumns:
    name_ids, template_ids, hints = packed
    return SaveColumns(
        names=names,
        name_ids=np.arange(len(names), dtype=np.int32) if name_ids is None else unpack_array(name_ids, np.int32),
        template_ids=unpack_array(template_ids, np.int32),
        templates=templates,
        hints=None if hints is None else unpack_array(hints, np.int32),
    )


def _offsets_of(templates: Templates) -> list[torch.Size | None]:
    rows = zip(templates.heads.tolist(), templates.boxes[:, 1].tolist(), strict=True)
    return [None if kind == OBJECT else torch.Size(offsets[:ndim]) for (kind, _, ndim), offsets in rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Indices(Sequence[MetadataIndex]):
    """MetadataIndex by MetadataIndex: a name, an offset out of a table, a hint (NONE: none)."""

    names: Names
    name_ids: Int32
    offsets: list[torch.Size | None]
    offset_ids: Int32
    hints: Int64

    @classmethod
    def of(cls, indices: Iterable[MetadataIndex]) -> Indices:
        """From the objects."""
        every = list(indices)
        fqns: dict[str, int] = {}
        offsets: dict[torch.Size | None, int] = {}
        name_ids = [fqns.setdefault(index.fqn, len(fqns)) for index in every]
        offset_ids = [offsets.setdefault(index.offset, len(offsets)) for index in every]
        return cls(
            names=Names(list(fqns), None),
            name_ids=np.array(name_ids, dtype=np.int32),
            offsets=list(offsets),
            offset_ids=np.array(offset_ids, dtype=np.int32),
            hints=np.array([NONE if index.index is None else index.index for index in every], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.name_ids)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        hint = int(self.hints[row])
        return MetadataIndex(
            self.names.fqns[self.name_ids[row]], self.offsets[self.offset_ids[row]], None if hint == NONE else hint
        )

    def __iter__(self) -> Iterator[MetadataIndex]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def concatenated(cls, parts: Sequence[Indices]) -> Indices:
        """All rows, in order."""
        fqns: dict[str, int] = {}
        offsets: dict[torch.Size | None, int] = {}
        tables: dict[int, Int32] = {}
        for part in parts:
            if id(part.names) not in tables:
                numbers = [fqns.setdefault(fqn, len(fqns)) for fqn in part.names.fqns]
                tables[id(part.names)] = np.array(numbers, dtype=np.int32)
        return cls(
            names=parts[0].names if len(tables) == 1 else Names(list(fqns), None),
            name_ids=_joined([tables[id(part.names)][part.name_ids] for part in parts], np.int32),
            offset_ids=_joined(
                [_renumbered(part.offset_ids, part.offsets, offsets).astype(np.int32) for part in parts], np.int32
            ),
            offsets=list(offsets),
            hints=_joined([part.hints for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecords:
    """Where items stand in files: what ``storage_data`` of a checkpoint says, by row. NONE in a column means: none."""

    indices: Indices
    paths: list[str]
    path_ids: Int64
    byte_offsets: Int64
    nbytes: Int64
    payload_offsets: Int64
    dtypes: list[torch.dtype]
    dtype_ids: Int64
    crcs: Int64

    def __len__(self) -> int:
        return len(self.byte_offsets)

    def info(self, row: int) -> StorageInfo:
        """The row as the record that torch knows."""
        payload_offset, crc = int(self.payload_offsets[row]), int(self.crcs[row])
        has_payload = payload_offset >= 0
        extras = ItemExtras(
            payload_offset if has_payload else None,
            self.dtypes[int(self.dtype_ids[row])] if has_payload else None,
            crc if crc >= 0 else None,
        )
        path = self.paths[int(self.path_ids[row])]
        return storage_info(path, int(self.byte_offsets[row]), int(self.nbytes[row]), extras)

    @classmethod
    def concatenated(cls, parts: Iterable[ItemRecords]) -> ItemRecords:
        """All rows, in order."""
        every = list(parts)
        paths: dict[str, int] = {}
        dtypes: dict[torch.dtype, int] = {}
        return cls(
            indices=Indices.concatenated([part.indices for part in every]) if every else Indices.of([]),
            path_ids=_joined([_renumbered(part.path_ids, part.paths, paths) for part in every]),
            paths=list(paths),
            byte_offsets=_joined([part.byte_offsets for part in every]),
            nbytes=_joined([part.nbytes for part in every]),
            payload_offsets=_joined([part.payload_offsets for part in every]),
            dtype_ids=_joined([_renumbered(part.dtype_ids, part.dtypes, dtypes) for part in every]),
            dtypes=list(dtypes),
            crcs=_joined([part.crcs for part in every]),
        )

    def of_items(self, positions: Int64) -> ItemRecords:
        """The same by item, where ``indices`` are by item already and the other columns stand in another order.

        Args:
            positions: of the item of each row.
        """
        if bool((positions == np.arange(len(positions))).all()):
            return self
        rows = np.empty_like(positions)
        rows[positions] = np.arange(len(positions))
        return self._with_rows(self.indices, rows)

    def _with_rows(self, indices: Indices, rows: Int64) -> ItemRecords:
        return ItemRecords(
            indices=indices,
            paths=self.paths,
            path_ids=self.path_ids[rows],
            byte_offsets=self.byte_offsets[rows],
            nbytes=self.nbytes[rows],
            payload_offsets=self.payload_offsets[rows],
            dtypes=self.dtypes,
            dtype_ids=self.dtype_ids[rows],
            crcs=self.crcs[rows],
        )

    def reordered(self, rows: Int64) -> ItemRecords:
        """These rows, in this order."""
        own = self.indices
        indices = Indices(
            names=own.names,
            name_ids=own.name_ids[rows],
            offsets=own.offsets,
            offset_ids=own.offset_ids[rows],
            hints=own.hints[rows],
        )
        return self._with_rows(indices, rows)


def _joined(columns: list[Column], dtype: type[Any] = np.int64) -> Column:
    return np.concatenate(columns) if columns else np.empty(0, dtype=dtype)


def _renumbered(ids: Column, values: Sequence[Any], numbers: dict[Any, int]) -> Int64:
    if not values:
        return ids
    table = np.fromiter(
        (numbers.setdefault(value, len(numbers)) for value in values), dtype=np.int64, count=len(values)
    )
    # A row without a value (NONE) takes the table's last entry: it is masked by the columns that say so.
    return table[ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointColumns:
    """What a checkpoint holds: its entries, by name, and the rows of each: its chunks; one row for an object."""

    names: Names
    first_rows: Int64
    """Of each entry, and the number of all rows at the end."""
    property_ids: Int32
    """Of each entry; NONE: an object."""
    properties: tuple[TensorProperties, ...]
    ndims: Int32
    sizes: Int64
    """Of each entry: n x D."""
    boxes: Int64
    """Distinct chunks: b x 2 x D, offsets and lengths."""
    row_boxes: Int32
    """The chunk of each row; of an object's row, any."""
    numbers: dict[str, int] = field(init=False, repr=False, compare=False, hash=False)
    """The entry of each name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", dict(zip(self.names.fqns, range(len(self.names)), strict=True)))

    def __len__(self) -> int:
        return len(self.property_ids)

    @property
    def nrows(self) -> int:
        return len(self.row_boxes)

    def __reduce__(self) -> tuple[Any, ...]:
        arrays: tuple[Column, ...] = (self.first_rows, self.property_ids, self.ndims)
        arrays += (self.sizes, self.boxes, self.row_boxes)
        return _unpacked_checkpoint, (self.names, self.properties, tuple(map(pack_array, arrays)))


def _unpacked_checkpoint(
    names: Names, properties: tuple[TensorProperties, ...], packed: tuple[PackedArray, ...]
) -> CheckpointColumns:
    dtypes: tuple[type[Any], ...] = (np.int64, np.int32, np.int32, np.int64, np.int64, np.int32)
    first_rows, property_ids, ndims, sizes, boxes, row_boxes = map(unpack_array, packed, dtypes)
    return CheckpointColumns(
        names=names,
        first_rows=first_rows,
        property_ids=property_ids,
        properties=properties,
        ndims=ndims,
        sizes=sizes,
        boxes=boxes,
        row_boxes=row_boxes,
    )
