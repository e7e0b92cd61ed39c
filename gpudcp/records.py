"""Where items stand in files, as columns: one row for each item, no object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpudcp._dcp import ItemExtras, StorageInfo, storage_info
from gpudcp.arrays import (
    NONE,
    Column,
    Int32,
    Int64,
    PackedArray,
    PackedRuns,
    PackedTable,
    pack_ids,
    pack_table,
    unpack_ids,
    unpack_table,
)
from gpudcp.names import Names
from gpudcp.sizes import SizeTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Indices(Sequence[MetadataIndex]):
    """MetadataIndex by MetadataIndex: a name, an offset out of a table, a hint (NONE: none)."""

    names: Names
    name_ids: Int32
    offsets: SizeTable
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
            offsets=SizeTable.of(list(offsets)),
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
            self.names.fqns[self.name_ids[row]], self.offsets[int(self.offset_ids[row])], None if hint == NONE else hint
        )

    def __iter__(self) -> Iterator[MetadataIndex]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def concatenated(cls, parts: Sequence[Indices]) -> Indices:
        """All rows, in order."""
        counts = [len(part) for part in parts]
        fqns: dict[str, int] = {}
        tables: dict[int, Int32] = {}
        for part in parts:
            if id(part.names) not in tables:
                numbers = [fqns.setdefault(fqn, len(fqns)) for fqn in part.names.fqns]
                tables[id(part.names)] = np.array(numbers, dtype=np.int32)
        is_one = len(tables) == 1
        name_ids = [part.name_ids if is_one else tables[id(part.names)][part.name_ids] for part in parts]
        return cls(
            names=parts[0].names if is_one else Names(list(fqns), None),
            name_ids=_joined(name_ids, np.int32),
            # The tables one after the other: to tell which offsets are equal would take longer than it saves.
            offset_ids=_joined_numbers([part.offset_ids for part in parts], [part.offsets for part in parts], counts),
            offsets=SizeTable.joined(part.offsets for part in parts),
            hints=_joined([part.hints for part in parts], np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecords:
    """Where items stand in files: what ``storage_data`` of a checkpoint says, by row. NONE in a column means: none."""

    indices: Indices
    paths: list[str]
    path_ids: Int32
    byte_offsets: Int64
    nbytes: Int64
    payload_offsets: Int64
    dtypes: list[torch.dtype]
    dtype_ids: Int32
    crcs: Int64

    def __len__(self) -> int:
        return len(self.byte_offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        columns: list[Column] = [self.path_ids, self.byte_offsets, self.nbytes, self.payload_offsets, self.dtype_ids]
        columns.append(self.crcs)
        own, kept, name_ids = self.indices, None, None
        if type(own) is Indices:
            columns += [own.offset_ids, own.hints]
            kept, name_ids = (own.names, own.offsets), pack_ids(own.name_ids)
        # One table, because a thousand ranks send theirs to one coordinator, and arrays are unpickled one by one.
        return _unpacked, (kept or own, name_ids, self.paths, self.dtypes, pack_table(columns))

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
        counts = [len(part) for part in every]
        dtypes: dict[torch.dtype, int] = {}
        return cls(
            indices=Indices.concatenated([part.indices for part in every]) if every else Indices.of([]),
            path_ids=_joined_numbers([part.path_ids for part in every], [part.paths for part in every], counts),
            paths=list(chain.from_iterable(part.paths for part in every)),
            byte_offsets=_joined([part.byte_offsets for part in every], np.int64),
            nbytes=_joined([part.nbytes for part in every], np.int64),
            payload_offsets=_joined([part.payload_offsets for part in every], np.int64),
            dtype_ids=_joined([_renumbered(part.dtype_ids, part.dtypes, dtypes) for part in every], np.int32),
            dtypes=list(dtypes),
            crcs=_joined([part.crcs for part in every], np.int64),
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
        return self.with_rows(self.indices, rows)

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
        return self.with_rows(indices, rows)

    def with_rows(self, indices: Indices, rows: Int64) -> ItemRecords:
        """These rows, in this order; they are those of other indices."""
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


def _unpacked(
    indices: Indices | tuple[Names, SizeTable],
    name_ids: PackedArray | PackedRuns,
    paths: list[str],
    dtypes: list[torch.dtype],
    packed: PackedTable,
) -> ItemRecords:
    path_ids, byte_offsets, nbytes, payload_offsets, dtype_ids, crcs, *of_indices = unpack_table(packed)
    if isinstance(indices, tuple):
        (names, offsets), (offset_ids, hints) = indices, of_indices
        indices = Indices(
            names=names,
            name_ids=unpack_ids(name_ids),
            offsets=offsets,
            offset_ids=offset_ids.astype(np.int32),
            hints=hints,
        )
    return ItemRecords(
        indices=indices,
        paths=paths,
        path_ids=path_ids.astype(np.int32),
        byte_offsets=byte_offsets,
        nbytes=nbytes,
        payload_offsets=payload_offsets,
        dtypes=dtypes,
        dtype_ids=dtype_ids.astype(np.int32),
        crcs=crcs,
    )


def _joined(columns: list[Column], dtype: type[Any]) -> Column:
    return np.concatenate(columns) if columns else np.empty(0, dtype=dtype)


def _joined_numbers(columns: list[Column], tables: list[Sequence[Any]], counts: list[int]) -> Int32:
    """Numbers into tables, joined, for the tables one after the other."""
    firsts = np.cumsum([0, *map(len, tables)], dtype=np.int32)[:-1]
    joined = _joined(columns, np.int32)
    joined += np.repeat(firsts, counts)
    return joined


def _renumbered(ids: Column, values: Sequence[Any], numbers: dict[Any, int]) -> Int32:
    own = [numbers.setdefault(value, len(numbers)) for value in values]
    if own == list(range(len(own))):
        return ids
    # A row without a value (NONE) takes the table's last entry: it is masked by the columns that say so.
    return np.array(own, dtype=np.int32)[ids]
