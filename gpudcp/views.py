"""A checkpoint's columns seen as torch's Metadata: each object is made only for who asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from gpudcp._dcp import StorageInfo
from gpudcp.arrays import NONE, Path
from gpudcp.columns import CheckpointColumns, own_properties, properties_key
from gpudcp.names import Names
from gpudcp.records import ItemRecords

ANNOUNCEMENT = "gpudcp"
"""Among ``StorageMeta.modules``: this storage takes a Metadata of columns."""


class _LikeDict(Mapping[Any, Any]):
    """What a dict has beyond a Mapping: torch's Metadata is of dicts."""

    def copy(self) -> dict[Any, Any]:
        """All of it, as a dict."""
        return dict(self)

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(other) | dict(self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Paths(_LikeDict, MutableMapping[str, Path]):
    """A plan's ``planner_data``: the path of each name. Travels as the names do, until somebody changes one."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self._paths: Mapping[str, Path] = names.paths or {}
        self._changed: dict[str, Path] | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether the names still say all."""
        return self._changed is None

    def _dict(self) -> dict[str, Path]:
        if self._changed is None:
            self._paths = self._changed = dict(self._paths)
        return self._changed

    def __getitem__(self, fqn: str) -> Path:
        return self._paths[fqn]

    def __setitem__(self, fqn: str, path: Path) -> None:
        self._dict()[fqn] = path

    def __delitem__(self, fqn: str) -> None:
        del self._dict()[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Paths, (self.names,)) if self._changed is None else (dict, (self._changed,))


class Entries(_LikeDict, MutableMapping[str, Any]):
    """``state_dict_metadata``: an entry is made when somebody looks, and kept; all are, when somebody puts one in."""

    def __init__(self, columns: CheckpointColumns) -> None:
        self.columns = columns
        self._made: dict[str, tuple[Any, Any]] = {}
        """Each with the state that it was made with."""
        self._changed: dict[str, Any] | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether the columns still say all: also of the entries that were made, which can be changed in place."""
        return self._changed is None and all(_state(made) == state for made, state in self._made.values())

    def _dict(self) -> dict[str, Any]:
        if self._changed is None:
            self._changed = dict(self)
        return self._changed

    def __getitem__(self, fqn: str) -> Any:
        if self._changed is not None:
            return self._changed[fqn]
        made = self._made.get(fqn)
        if made is None:
            entry = self._make(self.columns.numbers[fqn])
            made = self._made[fqn] = entry, _state(entry)
        return made[0]

    def __setitem__(self, fqn: str, entry: Any) -> None:
        self._dict()[fqn] = entry

    def __delitem__(self, fqn: str) -> None:
        del self._dict()[fqn]

    def _make(self, number: int) -> Any:
        columns = self.columns
        property_id = int(columns.property_ids[number])
        if property_id == NONE:
            return BytesStorageMetadata()
        ndim = int(columns.ndims[number])
        boxes = columns.boxes[columns.row_boxes[columns.first_rows[number] : columns.first_rows[number + 1]]]
        return TensorStorageMetadata(
            properties=own_properties(columns.properties[property_id]),
            size=torch.Size(columns.sizes[number, :ndim].tolist()),
            chunks=[
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
                for offsets, lengths in boxes[:, :, :ndim].tolist()
            ],
        )

    def __contains__(self, fqn: object) -> bool:
        return fqn in (self.columns.numbers if self._changed is None else self._changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names.fqns if self._changed is None else self._changed)

    def __len__(self) -> int:
        return len(self.columns if self._changed is None else self._changed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]


def _state(entry: Any) -> Any:
    """All that can be changed in an entry."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    return properties_key(entry.properties), entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]


class StorageData(_LikeDict, Mapping[MetadataIndex, StorageInfo]):
    """The ``storage_data`` of a Metadata: a dict that is made when somebody looks. It travels as columns."""

    def __init__(self, records: ItemRecords) -> None:
        self.records = records

    @cached_property
    def _dict(self) -> dict[MetadataIndex, StorageInfo]:
        return {index: self.records.info(row) for row, index in enumerate(self.records.indices)}

    def __getitem__(self, index: MetadataIndex) -> StorageInfo:
        return self._dict[index]

    def __iter__(self) -> Iterator[MetadataIndex]:
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __eq__(self, other: object) -> bool:
        return self._dict == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageData, (self.records,)


class ColumnMetadata(Metadata):
    """A Metadata of columns, for who knows them; for all others its parts are mappings like torch's.

    ``row_records`` is, where known, what stands in the files of each row of ``columns``.
    """

    columns: CheckpointColumns
    row_records: ItemRecords | None

    def __new__(cls, columns: CheckpointColumns | None = None, *_: Any, **fields: Any) -> Any:
        # dataclasses.replace calls with torch's fields alone, and may put objects in the place of columns.
        if columns is None and not isinstance(fields["state_dict_metadata"], Entries):
            return Metadata(**fields)
        return super().__new__(cls)

    def __init__(
        self, columns: CheckpointColumns | None = None, row_records: ItemRecords | None = None, **fields: Any
    ) -> None:
        columns = fields["state_dict_metadata"].columns if columns is None else columns
        self.columns = columns
        self.row_records = row_records
        super().__init__(
            state_dict_metadata=Entries(columns),  # type: ignore[arg-type]
            planner_data=None if columns.names.paths is None else Paths(columns.names),
            storage_data=None if row_records is None else StorageData(row_records),
        )
        vars(self).update(fields)

    @property
    def is_unchanged(self) -> bool:
        """Whether the columns still say all: nobody has put something else in their place."""
        entries, paths = self.state_dict_metadata, self.planner_data
        if self.columns.names.paths is None:
            has_paths = paths is None
        else:
            has_paths = isinstance(paths, Paths) and paths.names is self.columns.names and paths.is_unchanged
        return has_paths and isinstance(entries, Entries) and entries.columns is self.columns and entries.is_unchanged

    def plain(self) -> Metadata:
        """The same, with nothing of ours inside."""
        return Metadata(
            state_dict_metadata=dict(self.state_dict_metadata),
            planner_data=None if self.planner_data is None else dict(self.planner_data),
            storage_data=None if self.storage_data is None else dict(self.storage_data),
            storage_meta=self.storage_meta,
            version=self.version,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Metadata):
            return NotImplemented
        mine, theirs = (each.plain() if isinstance(each, ColumnMetadata) else each for each in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.is_unchanged:
            return Metadata, tuple(vars(self.plain()).values())
        fields = {name: getattr(self, name) for name in ("storage_data", "storage_meta", "version")}
        return _made_again, (self.columns, self.row_records, fields)


def _made_again(columns: CheckpointColumns, row_records: ItemRecords | None, fields: dict[str, Any]) -> Any:
    return ColumnMetadata(columns, row_records, **fields)
