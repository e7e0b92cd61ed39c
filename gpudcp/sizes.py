"""Sizes and offsets as a table of numbers, each a torch.Size only for who asks for one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from gpudcp.arrays import NONE, Int32, Int64, PackedArray, distinct_rows, pack_array, unpack_array


@dataclass(frozen=True, slots=True, eq=False)
class SizeTable(Sequence[torch.Size | None]):
    """Rows of numbers, n x D, padded with zeros, and how many of each row count; NONE: it is None."""

    values: Int64
    ndims: Int32

    @classmethod
    def of(cls, sizes: Sequence[Sequence[int] | None]) -> SizeTable:
        """From the objects."""
        ndims = np.array([NONE if size is None else len(size) for size in sizes], dtype=np.int32)
        lengths = np.maximum(ndims, 0)
        values = np.zeros((len(sizes), int(lengths.max(initial=0))), dtype=np.int64)
        flat = chain.from_iterable(size for size in sizes if size is not None)
        values[np.arange(values.shape[1]) < lengths[:, None]] = np.fromiter(flat, np.int64, int(lengths.sum()))
        return cls(values, ndims)

    @classmethod
    def joined(cls, tables: Iterable[SizeTable]) -> SizeTable:
        """The rows of all tables, in order."""
        every = list(tables)
        ndim = max((table.values.shape[1] for table in every), default=0)
        values = [np.zeros((0, ndim), dtype=np.int64)]
        for table in every:
            own = table.values
            missing = ndim - own.shape[1]
            values.append(np.pad(own, ((0, 0), (0, missing))) if missing else own)
        return cls(np.concatenate(values), np.concatenate([np.empty(0, np.int32), *(each.ndims for each in every)]))

    def distinct(self) -> tuple[Int64, Int32]:
        """First row of each distinct one, and the number of every row's among those."""
        first, numbers = distinct_rows(np.concatenate([self.ndims[:, None].astype(np.int64), self.values], axis=1))
        return first, numbers.astype(np.int32)

    def __len__(self) -> int:
        return len(self.ndims)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice | np.ndarray):
            return SizeTable(self.values[row], self.ndims[row])
        ndim = int(self.ndims[row])
        return None if ndim == NONE else torch.Size(self.values[row, :ndim].tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (pack_array(np.concatenate([self.ndims[:, None], self.values], axis=1)),)


def _unpacked(packed: PackedArray) -> SizeTable:
    table = unpack_array(packed, np.int64)
    return SizeTable(table[:, 1:], table[:, 0].astype(np.int32))
