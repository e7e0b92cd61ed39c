"""What stands in the files, in the order of a checkpoint's rows: then a record's place says what it is of."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from gpudcp.arrays import NONE, Int64, distinct_numbers
from gpudcp.columns import CheckpointColumns
from gpudcp.records import Indices, ItemRecords
from gpudcp.sizes import SizeTable


class RowIndices(Indices):
    """The MetadataIndex of each row of a checkpoint; worked out when somebody asks, as who reads by rows does not."""

    def __init__(self, columns: CheckpointColumns) -> None:
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        columns: CheckpointColumns = vars(self)["columns"]
        return columns.nrows

    def __getattr__(self, name: str) -> Any:
        """A field that is not filled yet."""
        names = [field.name for field in fields(Indices)]
        if name not in names:
            raise AttributeError(name)
        made = _row_indices(self.columns)
        for each in names:
            object.__setattr__(self, each, getattr(made, each))
        return getattr(made, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowIndices, (self.columns,)


def by_row(records: ItemRecords, columns: CheckpointColumns) -> ItemRecords | None:
    """The records in the order of the rows, one for each; None where they are of anything else."""
    indices = records.indices
    if isinstance(indices, RowIndices) and indices.columns is columns:
        return records
    order = _order_of(columns, indices)
    return None if order is None else records.with_rows(RowIndices(columns), order)


def _row_indices(columns: CheckpointColumns) -> Indices:
    counts = np.diff(columns.first_rows)
    entries = np.repeat(np.arange(len(columns)), counts)
    ndims = np.where(columns.property_ids == NONE, NONE, columns.ndims)[entries].astype(np.int64)
    most = columns.boxes.shape[2] + 2
    used, offset_ids = distinct_numbers(columns.row_boxes.astype(np.int64) * most + ndims + 1)
    hints = np.arange(columns.nrows) - np.repeat(columns.first_rows[:-1], counts)
    hints[ndims == NONE] = NONE
    return Indices(
        names=columns.names,
        name_ids=entries.astype(np.int32),
        offsets=SizeTable(columns.boxes[used // most, 0], (used % most - 1).astype(np.int32)),
        offset_ids=offset_ids.astype(np.int32),
        hints=hints,
    )


def _order_of(columns: CheckpointColumns, indices: Indices) -> Int64 | None:
    """Which index is that of each row, one to one; None where they do not match."""
    if len(indices) != columns.nrows:
        return None
    entries = np.array([columns.numbers.get(fqn, NONE) for fqn in indices.names.fqns], dtype=np.int64)
    if (entries == NONE).any() and (entries == NONE)[indices.name_ids].any():
        return None
    # Of each name, and then of each index, which are many more.
    is_object = np.append(columns.property_ids == NONE, False)[entries]
    counts = np.append(np.diff(columns.first_rows), 0)[entries]
    hints, of_object = indices.hints, np.nonzero(is_object[indices.name_ids])[0]
    if len(of_object):
        hints = hints.copy()
        hints[of_object] = 0
    if (hints.view(np.uint64) >= counts.view(np.uint64)[indices.name_ids]).any():  # negative ones too
        return None
    rows: Int64 = columns.first_rows[entries][indices.name_ids] + hints
    order = np.full(len(rows), NONE, dtype=np.int64)
    order[rows] = np.arange(len(rows))
    if (order == NONE).any():  # two have one row, as there are as many rows as indices
        return None
    ndim = columns.boxes.shape[2]
    boxes = SizeTable(columns.boxes[:, 0], np.full(len(columns.boxes), ndim, dtype=np.int32))
    joined = SizeTable.joined([indices.offsets, boxes])
    if joined.values.shape[1] > ndim:
        return None
    _, numbers = replace(joined, ndims=np.zeros(len(joined), dtype=np.int32)).distinct()
    is_same = numbers[indices.offset_ids] == numbers[len(indices.offsets) :][columns.row_boxes[rows]]
    is_same[of_object] = True
    # Padded, an offset may look like one of other dimensions, or like none.
    ndims = np.append(np.where(columns.property_ids == NONE, NONE, columns.ndims), NONE)[entries]
    is_same &= indices.offsets.ndims[indices.offset_ids] == ndims[indices.name_ids]
    return order if bool(is_same.all()) else None
