"""Match the chunks of a rank's own values with a checkpoint's: what of it is read where. Columns in, columns out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from gpudcp.arrays import NONE, Int64
from gpudcp.columns import OBJECT, CheckpointColumns, SaveColumns
from gpudcp.items import ReadItems
from gpudcp.planners.joins import overlaps_batch


class Match:
    """A rank's own chunks, each with the entry of the checkpoint that has its name; every name must have one."""

    def __init__(self, checkpoint: CheckpointColumns, own: SaveColumns) -> None:
        self._checkpoint = checkpoint
        self._own = own
        fqns = own.names.fqns
        numbers = np.fromiter((checkpoint.numbers[fqn] for fqn in fqns), dtype=np.int64, count=len(fqns))
        self._entries = numbers[own.name_ids]
        self._is_object = checkpoint.property_ids[self._entries] == NONE
        self._ndim = max(own.templates.boxes.shape[2], checkpoint.sizes.shape[1])
        self._boxes = _widened(own.templates.boxes, self._ndim)[own.template_ids]

    def misfits(self, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with each value that cannot take its entry."""
        checkpoint, own, entries = self._checkpoint, self._own, self._entries
        own_ndims = own.templates.ndims[own.template_ids]
        is_whole = own.templates.kinds[own.template_ids] == OBJECT
        differs = (self._boxes[:, 0] != _widened(checkpoint.sizes[:, None], self._ndim)[entries, 0]).any(axis=1)
        differs |= own_ndims != checkpoint.ndims[entries]
        misfits = []
        for row in np.nonzero(~self._is_object & (is_whole | differs))[0].tolist():
            fqn = own.names.fqns[own.name_ids[row]]
            if is_whole[row]:
                kind = type(values[fqn]).__qualname__
                misfits.append(f"{fqn}: a tensor in the checkpoint, a {kind} in the state dict")
                continue
            saved = tuple(checkpoint.sizes[entries[row], : checkpoint.ndims[entries[row]]].tolist())
            wanted = tuple(self._boxes[row, 0, : own_ndims[row]].tolist())
            misfits.append(f"{fqn}: size {saved} in the checkpoint, {wanted} in the state dict")
        return misfits

    def dtypes(self) -> dict[str, tuple[torch.dtype, torch.dtype]]:
        """Of each tensor, by name: the saved dtype and that of its destination."""
        own, at = self._own, ~self._is_object
        saved = self._checkpoint.property_ids[self._entries[at]].tolist()
        wanted = own.templates.property_ids[own.template_ids[at]].tolist()
        return {
            own.names.fqns[name]: (self._checkpoint.properties[one].dtype, own.templates.properties[other].dtype)
            for name, one, other in zip(own.name_ids[at].tolist(), saved, wanted, strict=True)
        }

    def read_items(self) -> ReadItems:
        """An item for each pair of a chunk of ours and a saved one that overlap, and for each object; by our chunks."""
        checkpoint, own, entries, boxes = self._checkpoint, self._own, self._entries, self._boxes
        first_rows = checkpoint.first_rows[entries]
        saved_boxes = _widened(checkpoint.boxes, self._ndim)
        # Most tensors are one chunk, here as there; the others are joined, all at once.
        is_single = (checkpoint.first_rows[entries + 1] - first_rows == 1) & ~self._is_object
        single = np.nonzero(is_single & (boxes[:, 2].prod(axis=1) > 0))[0]
        is_same = (saved_boxes[checkpoint.row_boxes[first_rows[single]]] == boxes[single, 1:]).all(axis=(1, 2))
        is_plain = self._is_object.copy()
        is_plain[single[is_same]] = True
        found = _joined(checkpoint, saved_boxes, np.nonzero(~is_plain)[0], entries, boxes)
        plain = np.nonzero(is_plain)[0]
        plain_boxes = np.zeros((len(plain), 3, self._ndim), dtype=np.int64)
        plain_boxes[:, 2] = boxes[plain, 2]
        items = np.concatenate([plain, found.items])
        order = np.argsort(items, kind="stable")
        items = items[order]
        numbers = _numbers_in_name(own.name_ids)
        return ReadItems(
            checkpoint,
            own.names.fqns,
            name_ids=own.name_ids[items],
            rows=np.concatenate([first_rows[plain], found.rows])[order],
            dest_chunks=np.concatenate([numbers[items, None], boxes[items, 1]], axis=1),
            boxes=np.concatenate([plain_boxes, found.boxes])[order],
            ndims=np.where(self._is_object, NONE, checkpoint.ndims[entries])[items].astype(np.int32),
        )


class _Joined(NamedTuple):
    items: Int64
    rows: Int64
    boxes: Int64


def _joined(
    checkpoint: CheckpointColumns, saved_boxes: Int64, items: Int64, every_entry: Int64, every_box: Int64
) -> _Joined:
    """Every pair of a chunk of ours and a saved one that overlap: our number, its row, the boxes of the read item."""
    order = items[np.argsort(every_entry[items], kind="stable")]
    tensors, firsts = np.unique(every_entry[order], return_index=True)
    own = every_box[order]
    rows, starts = _rows_within_reach(checkpoint, saved_boxes, tensors, own, firsts)
    saved = saved_boxes[checkpoint.row_boxes[rows]]
    found = overlaps_batch(starts, saved[:, 0], saved[:, 1], np.append(firsts, len(order)), own[:, 1], own[:, 2])
    boxes = np.stack([found.dest_offsets, found.storage_offsets, found.lengths], axis=1)
    return _Joined(order[found.local], rows[found.saved], boxes)


def _rows_within_reach(
    checkpoint: CheckpointColumns, saved_boxes: Int64, tensors: Int64, own: Int64, firsts: Int64
) -> tuple[Int64, Int64]:
    """The rows of these tensors that may overlap a chunk of ours, and where each tensor's begin among them.

    A rank has few of a tensor's chunks: in each dimension, what lies before the first or behind the last one is out.
    """
    counts = checkpoint.first_rows[tensors + 1] - checkpoint.first_rows[tensors]
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = np.arange(starts[-1]) + np.repeat(checkpoint.first_rows[tensors] - starts[:-1], counts)
    numbers = np.repeat(np.arange(len(tensors)), counts)
    if len(tensors):
        low = np.minimum.reduceat(own[:, 1], firsts)
        high = np.maximum.reduceat(own[:, 1] + own[:, 2], firsts)
        for dim in range(own.shape[2]):
            boxes = checkpoint.row_boxes[rows]
            begin, end = saved_boxes[:, 0, dim], saved_boxes[:, 0, dim] + saved_boxes[:, 1, dim]
            kept = np.nonzero((begin[boxes] < high[numbers, dim]) & (end[boxes] > low[numbers, dim]))[0]
            rows, numbers = rows[kept], numbers[kept]
    return rows, np.searchsorted(numbers, np.arange(len(tensors) + 1))


def _widened(boxes: Int64, ndim: int) -> Int64:
    """Boxes padded to more dimensions: offsets, which stand last but one, with 0, all else with 1."""
    missing = ndim - boxes.shape[2]
    if not missing:
        return boxes
    padding = np.ones((*boxes.shape[:2], missing), dtype=np.int64)
    if boxes.shape[1] > 1:
        padding[:, -2] = 0
    return np.concatenate([boxes, padding], axis=2)


def _numbers_in_name(name_ids: Any) -> Int64:
    """The number of each item among those of its name, which follow each other."""
    positions = np.arange(len(name_ids), dtype=np.int64)
    is_first = np.concatenate([[True], name_ids[1:] != name_ids[:-1]]) if len(name_ids) else np.empty(0, dtype=bool)
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0)) if len(name_ids) else positions
