"""A rank's write results: columns that look like the list of WriteResult which DCP passes around."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from gpudcp._dcp import StorageInfo
from gpudcp.columns import ItemRecords


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


class StorageData(Mapping[MetadataIndex, StorageInfo]):
    """The ``storage_data`` of a Metadata just saved: a dict that is made when somebody looks, and pickles as one."""

    def __init__(self, records: ItemRecords) -> None:
        self._records = records
        self._made: dict[MetadataIndex, StorageInfo] | None = None

    def _dict(self) -> dict[MetadataIndex, StorageInfo]:
        if self._made is None:
            self._made = {index: self._records.info(row) for row, index in enumerate(self._records.indices)}
        return self._made

    def __getitem__(self, index: MetadataIndex) -> StorageInfo:
        return self._dict()[index]

    def __iter__(self) -> Iterator[MetadataIndex]:
        return iter(self._dict())

    def __len__(self) -> int:
        return len(self._dict())

    def __eq__(self, other: object) -> bool:
        return self._dict() == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(self._dict().items()),)
