"""What a rank has written: a row for each item, and columns that look like the list of WriteResult that DCP passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from gpudcp.arrays import Int64
from gpudcp.chunkplan.save import ChunkWrite, SaveChunkPlan
from gpudcp.errors import PlanError
from gpudcp.executors.base import FileReceipt
from gpudcp.items import WriteItems
from gpudcp.records import Indices, ItemRecords


class WriteResults(Sequence[WriteResult]):
    """What `GpuStorageWriter.write_data` returns; a WriteResult is made only for who asks for one."""

    def __init__(self, records: ItemRecords) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, row: int) -> WriteResult: ...
    @overload
    def __getitem__(self, row: slice) -> list[WriteResult]: ...
    def __getitem__(self, row: int | slice) -> WriteResult | list[WriteResult]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        info = self.records.info(row)
        return WriteResult(index=self.records.indices[row], size_in_bytes=info.length, storage_data=info)


def written_records(items: Sequence[WriteItem], plan: SaveChunkPlan, receipts: list[FileReceipt]) -> ItemRecords:
    """One row for each write item, in their order.

    Raises:
        PlanError: an item has no receipt: some bytes were planned and not written.
    """
    writes = [write for file in plan.files for write in file.writes]
    crcs = [crc for receipt in receipts for crc in receipt.crcs]
    written = sum(receipt.nbytes for receipt in receipts)
    if not len(items) == len(writes) == len(crcs) or written != plan.nbytes:
        raise PlanError(
            f"{len(items)} items were planned as {len(writes)} writes of {plan.nbytes} bytes; "
            f"{len(crcs)} writes of {written} bytes were finished"
        )
    chunks = [write if isinstance(write, ChunkWrite) else None for write in writes]
    numbers: dict[torch.dtype, int] = {}
    dtype_ids = [-1 if chunk is None else numbers.setdefault(chunk.dtype, len(numbers)) for chunk in chunks]
    positions = _column([write.position for write in writes])
    path_ids = np.repeat(np.arange(len(plan.files), dtype=np.int32), [len(file.writes) for file in plan.files])
    columns = items.columns if isinstance(items, WriteItems) else None
    return ItemRecords(
        indices=Indices.of(item.index for item in items) if columns is None else columns.indices(),
        paths=[file.path for file in plan.files],
        path_ids=path_ids,
        byte_offsets=_column([write.byte_offset for write in writes]),
        nbytes=_column([write.nbytes for write in writes]),
        payload_offsets=_column([-1 if chunk is None else chunk.payload_offset for chunk in chunks]),
        dtypes=list(numbers),
        dtype_ids=np.array(dtype_ids, dtype=np.int32),
        crcs=_column([-1 if crc is None else crc for crc in crcs]),
    ).of_items(positions)


def _column(values: list[int]) -> Int64:
    return np.array(values, dtype=np.int64)
