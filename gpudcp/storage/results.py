"""A rank's write results: columns that look like the list of WriteResult which DCP passes around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch.distributed.checkpoint.storage import WriteResult

from gpudcp.records import ItemRecords


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
