"""The items of plans as columns that look like torch's lists: an item is made only for who asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from gpudcp.arrays import NONE, Int32, Int64, Path
from gpudcp.columns import (
    OBJECT,
    SHARD,
    TENSOR,
    CheckpointColumns,
    SaveColumns,
    Templates,
    TemplateTable,
    own_properties,
)
from gpudcp.errors import PlanError
from gpudcp.names import Names

_KINDS = {WriteItemType.BYTE_IO: OBJECT, WriteItemType.TENSOR: TENSOR, WriteItemType.SHARD: SHARD}


_TYPES = {kind: each for each, kind in _KINDS.items()}


Item = TypeVar("Item")


class _LazyItems(MutableSequence[Item], Generic[Item]):
    """A plan's items: columns, until somebody changes one; from then on a list of objects."""

    def __init__(self) -> None:
        self._changed: list[Item] | None = None

    def _count(self) -> int:
        raise NotImplementedError

    def _made(self, row: int) -> Item:
        raise NotImplementedError

    def _list(self) -> list[Item]:
        if self._changed is None:
            self._changed = list(self)
        return self._changed

    def __len__(self) -> int:
        return self._count() if self._changed is None else len(self._changed)

    def __getitem__(self, row: Any) -> Any:
        if self._changed is not None:
            return self._changed[row]
        if isinstance(row, slice):
            return [self._made(each) for each in range(*row.indices(len(self)))]
        return self._made(range(len(self))[row])

    def __iter__(self) -> Iterator[Item]:
        return iter(self._changed) if self._changed is not None else map(self._made, range(len(self)))

    def __setitem__(self, row: Any, item: Any) -> None:
        self._list()[row] = item

    def __delitem__(self, row: Any) -> None:
        del self._list()[row]

    def insert(self, row: int, item: Item) -> None:
        self._list().insert(row, item)

    def sort(self, *, key: Callable[[Item], Any], reverse: bool = False) -> None:
        """A list's."""
        self._list().sort(key=key, reverse=reverse)

    def copy(self) -> list[Item]:
        """A list's."""
        return list(self)

    def __add__(self, other: Iterable[Item]) -> list[Item]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Item]) -> list[Item]:
        return [*other, *self]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"


class WriteItems(_LazyItems[WriteItem]):
    """The items of a SavePlan; as in torch, what is changed inside one of them, its dtype say, changes it alone."""

    def __init__(self, columns: SaveColumns) -> None:
        super().__init__()
        self._columns = columns
        self._templates = WriteTemplates(columns.templates)
        self._given: dict[int, WriteItem] = {}

    @property
    def columns(self) -> SaveColumns | None:
        """None if somebody has changed an item."""
        if self._changed is None and any(self._differs(row, item) for row, item in self._given.items()):
            self._list()
        return self._columns if self._changed is None else None

    def _differs(self, row: int, item: WriteItem) -> bool:
        return item.tensor_data != self._templates.data(int(self._columns.template_ids[row]))

    def _count(self) -> int:
        return len(self._columns)

    def _made(self, row: int) -> WriteItem:
        item = self._given.get(row)
        if item is None:
            columns = self._columns
            template = int(columns.template_ids[row])
            hint = None if columns.hints is None or columns.hints[row] == NONE else int(columns.hints[row])
            item = self._templates.item(template, columns.names.fqns[columns.name_ids[row]], hint)
            self._given[row] = item
        return item

    def __reduce__(self) -> tuple[Any, ...]:
        columns = self.columns
        return (list, (self._list(),)) if columns is None else (WriteItems, (columns,))


class ReadItems(_LazyItems[ReadItem]):
    """The items of a LoadPlan: rows of a checkpoint's columns, and boxes of destinations."""

    def __init__(
        self,
        checkpoint: CheckpointColumns,
        fqns: Sequence[str],
        *,
        name_ids: Int32,
        rows: Int64,
        dest_chunks: Int64,
        boxes: Int64,
        ndims: Int32,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.fqns = fqns
        """Of the destinations."""
        self.name_ids = name_ids
        self.rows = rows
        """Of the checkpoint, where each item's bytes are."""
        self.dest_chunks = dest_chunks
        """n x (1 + D): number of the chunk among those of its destination, and its offsets in the whole tensor."""
        self.boxes = boxes
        """n x 3 x D: offsets into the destination, offsets into the saved chunk, lengths."""
        self.ndims = ndims
        """NONE: an object."""
        self.stay_on_rank = False
        """Whether no other rank needs to see them."""

    @property
    def is_unchanged(self) -> bool:
        """Whether the columns still say all."""
        return self._changed is None

    def _count(self) -> int:
        return len(self.rows)

    def _made(self, row: int) -> ReadItem:
        fqn = self.fqns[self.name_ids[row]]
        ndim = int(self.ndims[row])
        checkpoint, saved = self.checkpoint, int(self.rows[row])
        if ndim == NONE:
            zero, index = torch.Size([0]), MetadataIndex(fqn)
            return ReadItem(LoadItemType.BYTE_IO, index, zero, MetadataIndex(self._saved_fqn(saved)), zero, zero)
        dest_offsets, storage_offsets, lengths = (torch.Size(each[:ndim]) for each in self.boxes[row].tolist())
        number, *chunk_offsets = self.dest_chunks[row].tolist()
        entry = self._entry(saved)
        saved_offsets = checkpoint.boxes[checkpoint.row_boxes[saved], 0, :ndim].tolist()
        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(fqn, chunk_offsets[:ndim], number),
            dest_offsets=dest_offsets,
            storage_index=MetadataIndex(
                checkpoint.names.fqns[entry], saved_offsets, saved - int(checkpoint.first_rows[entry])
            ),
            storage_offsets=storage_offsets,
            lengths=lengths,
        )

    def _entry(self, row: int) -> int:
        return int(np.searchsorted(self.checkpoint.first_rows, row, side="right")) - 1

    def _saved_fqn(self, row: int) -> str:
        return self.checkpoint.names.fqns[self._entry(row)]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._list(),)


class StayingItems(list[ReadItem]):
    """Read items that no other rank needs to see."""

    stay_on_rank = True


class KeptItems(list[ReadItem]):
    """Stands for items that stay with the reader, while their plan goes to the coordinator and back; itself empty."""


class WriteTemplates:
    """Templates as torch's types."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._made: dict[int, TensorWriteData] = {}

    def data(self, template: int) -> TensorWriteData | None:
        """What all tensors of a template have in common; None: objects."""
        made = self._made.get(template)
        if made is None:
            kind, property_id, ndim = self._templates.heads[template].tolist()
            if kind == OBJECT:
                return None
            size, offsets, lengths = (torch.Size(each[:ndim]) for each in self._templates.boxes[template].tolist())
            made = self._made[template] = TensorWriteData(
                ChunkStorageMetadata(offsets, lengths), self._templates.properties[property_id], size
            )
        return made

    def item(self, template: int, fqn: str, hint: int | None) -> WriteItem:
        """One write item, which shares nothing that can be changed with another one."""
        data = self.data(template)
        if data is None:
            return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
        kind = _TYPES[int(self._templates.heads[template, 0])]
        own = TensorWriteData(
            ChunkStorageMetadata(data.chunk.offsets, data.chunk.sizes), own_properties(data.properties), data.size
        )
        return WriteItem(MetadataIndex(fqn, data.chunk.offsets, hint), kind, tensor_data=own)


def columns_of(items: Iterable[WriteItem], paths: Mapping[str, Path] | None) -> SaveColumns:
    """The columns of any items; ``paths`` of their names, as the plan's planner_data says.

    Raises:
        PlanError: a tensor item does not say which chunk it is of.
    """
    if isinstance(items, WriteItems) and items.columns is not None:
        return items.columns
    table = TemplateTable()
    fqns: dict[str, int] = {}
    name_ids: list[int] = []
    template_ids: list[int] = []
    hints: list[int] = []
    for item in items:
        name_ids.append(fqns.setdefault(item.index.fqn, len(fqns)))
        template_ids.append(template_number(table, item))
        hints.append(NONE if item.index.index is None else item.index.index)
    return SaveColumns(
        names=Names(list(fqns), paths),
        name_ids=np.array(name_ids, dtype=np.int32),
        template_ids=np.array(template_ids, dtype=np.int32),
        templates=table.templates(),
        hints=np.array(hints, dtype=np.int32),
    )


def template_number(table: TemplateTable, item: WriteItem) -> int:
    """The template of one write item."""
    if item.type == WriteItemType.BYTE_IO:
        return table.number(OBJECT, None, (), (), ())
    data = item.tensor_data
    if data is None or data.chunk is None:
        raise PlanError(f"{item.index.fqn}: the write item of a tensor says nothing of its chunk")
    sizes = {len(data.size), len(data.chunk.offsets), len(data.chunk.sizes)}
    if len(sizes) > 1:
        raise PlanError(
            f"{item.index.fqn}: a chunk at {tuple(data.chunk.offsets)} of {tuple(data.chunk.sizes)} in a tensor of "
            f"size {tuple(data.size)}"
        )
    return table.number(_KINDS[item.type], data.properties, data.size, data.chunk.offsets, data.chunk.sizes)
