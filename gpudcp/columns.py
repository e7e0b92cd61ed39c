"""What was written, as struct-of-arrays: one row for each item, no object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpudcp._dcp import ItemExtras, StorageInfo, storage_info

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecords:
    """Where items stand in files: what ``storage_data`` of a checkpoint says, by row. -1 in a column means: none."""

    indices: list[MetadataIndex]
    paths: list[str]
    path_ids: Int64
    byte_offsets: Int64
    nbytes: Int64
    payload_offsets: Int64
    dtypes: list[torch.dtype]
    dtype_ids: Int64
    crcs: Int64

    def __len__(self) -> int:
        return len(self.indices)

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
            indices=[index for part in every for index in part.indices],
            path_ids=_joined([_renumbered(part.path_ids, part.paths, paths) for part in every]),
            paths=list(paths),
            byte_offsets=_joined([part.byte_offsets for part in every]),
            nbytes=_joined([part.nbytes for part in every]),
            payload_offsets=_joined([part.payload_offsets for part in every]),
            dtype_ids=_joined([_renumbered(part.dtype_ids, part.dtypes, dtypes) for part in every]),
            dtypes=list(dtypes),
            crcs=_joined([part.crcs for part in every]),
        )


def _joined(columns: list[Int64]) -> Int64:
    return np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)


def _renumbered(ids: Int64, values: list[Any], numbers: dict[Any, int]) -> Int64:
    if not values:
        return ids
    table = np.fromiter(
        (numbers.setdefault(value, len(numbers)) for value in values), dtype=np.int64, count=len(values)
    )
    # A row without a value (-1) takes the table's last entry: it is masked by the columns that say so.
    return table[ids]
