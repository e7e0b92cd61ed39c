"""Plans and metadata as struct-of-arrays: one row for each item, no object.

Boxes are held once: a plan's items are numbers into a table of templates, as thousands of tensors share a few shapes.
Tables pad boxes to the most dimensions that one of them has: offsets with 0, sizes and lengths with 1.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import TensorProperties

from gpudcp.arrays import (
    NONE,
    Column,
    Int32,
    Int64,
    PackedArray,
    PackedRuns,
    pack_array,
    pack_ids,
    unpack_array,
    unpack_ids,
)
from gpudcp.names import Names
from gpudcp.records import Indices
from gpudcp.sizes import SizeTable


def properties_key(properties: TensorProperties) -> tuple[Any, ...]:
    """What makes two TensorProperties equal, hashable."""
    return _PROPERTIES(properties)


def own_properties(properties: TensorProperties) -> TensorProperties:
    """Equal ones, which can be changed without changing these."""
    return TensorProperties(*_PROPERTIES(properties))


_PROPERTIES = attrgetter("dtype", "layout", "requires_grad", "memory_format", "pin_memory")


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
    packed: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """All of it, from the first time on that it travelled: what a coordinator gets it sends back."""

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
        if self.packed is None:
            parts = pack_array(self.heads), pack_array(self.boxes), pickle.dumps(self.properties)
            object.__setattr__(self, "packed", pickle.dumps(parts))
        return _unpacked_templates, (self.packed,)


def _unpacked_templates(packed: bytes) -> Templates:
    heads, boxes, properties = pickle.loads(packed)
    templates = Templates(unpack_array(heads, np.int32), unpack_array(boxes, np.int64), _known_properties(properties))
    object.__setattr__(templates, "packed", packed)
    return templates


@lru_cache(maxsize=64)
def _known_properties(packed: bytes) -> tuple[TensorProperties, ...]:
    """Unpickled once, as the tensors of all ranks mostly have the same ones."""
    properties: tuple[TensorProperties, ...] = pickle.loads(packed)
    return properties


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
                    self._properties.append(own_properties(properties))  # the caller may change its own
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
        own = self.templates
        return Indices(
            names=self.names,
            name_ids=self.name_ids,
            offsets=SizeTable(own.boxes[:, 1], np.where(own.kinds == OBJECT, NONE, own.ndims).astype(np.int32)),
            offset_ids=self.template_ids,
            hints=np.full(len(self), NONE, dtype=np.int64) if self.hints is None else self.hints.astype(np.int64),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        in_order = len(self.names) == len(self) and bool((self.name_ids == np.arange(len(self))).all())
        packed = (
            None if in_order else pack_ids(self.name_ids),
            pack_array(self.template_ids),
            None if self.hints is None else pack_array(self.hints),
        )
        return _unpacked_columns, (self.names, packed, self.templates)


def _unpacked_columns(
    names: Names,
    packed: tuple[PackedArray | PackedRuns | None, PackedArray, PackedArray | None],
    templates: Templates,
) -> SaveColumns:
    name_ids, template_ids, hints = packed
    return SaveColumns(
        names=names,
        name_ids=np.arange(len(names), dtype=np.int32) if name_ids is None else unpack_ids(name_ids),
        template_ids=unpack_array(template_ids, np.int32),
        templates=templates,
        hints=None if hints is None else unpack_array(hints, np.int32),
    )


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
