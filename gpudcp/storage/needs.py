"""What a load plan needs of the files, and the load chunk plan that reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from gpudcp.arrays import NONE, distinct_rows
from gpudcp.boxes import row_major_strides
from gpudcp.chunkplan.load import (
    READ_GAP_NBYTES,
    LoadChunkPlan,
    PayloadCheck,
    ReadRequest,
    plan_load,
    whole_payload_request,
)
from gpudcp.formats.dtypes import QUANTIZED_DTYPES
from gpudcp.items import ReadItems
from gpudcp.options import Options
from gpudcp.records import ItemRecords
from gpudcp.storage.openfiles import OpenFiles
from gpudcp.storage.stored import StoredItem, StoredItems, Window, check_box, check_range, stored_tensor


class Needs:
    """What a load plan needs of the files: boxes of strided payloads, and items that are read whole."""

    def __init__(self, files: OpenFiles, options: Options, *, slab_nbytes: int, large_apart: bool) -> None:
        self.whole_items: list[tuple[int, StoredItem]] = []
        self.payload_nbytes = 0
        self.envelope_nbytes = 0
        self.npayloads = 0
        self._files = files
        self._options = options
        self._slab_nbytes = slab_nbytes
        self._large_apart = large_apart
        self._requests: list[ReadRequest] = []
        self._checks: list[PayloadCheck] = []
        self._last_payload = ("", -1)

    def add_items(self, items: Sequence[ReadItem], stored: StoredItems) -> None:
        """Items by what their storage index says."""
        self._add_each(range(len(items)), items, stored)

    def _add_each(self, positions: Sequence[int], items: Sequence[ReadItem], stored: StoredItems) -> None:
        places = [stored.find(item.storage_index) for item in items]
        # In file order, so that envelopes are read in passing.
        order = sorted(range(len(items)), key=lambda number: places[number][1:3])
        path, window = "", None
        for number in order:
            place = places[number]
            if window is None or place.path != path:
                path = place.path
                self.envelope_nbytes += 0 if window is None else window.nbytes
                window = Window(self._files.get(path))
            check_range(place, window.file)
            self._add(positions[number], items[number], place, stored, window)
        self.envelope_nbytes += 0 if window is None else window.nbytes

    def add_rows(self, items: ReadItems, records: ItemRecords, stored: StoredItems) -> None:
        """Items that are rows of the checkpoint's own columns: all at once."""
        checkpoint, rows = items.checkpoint, items.rows
        path_ids, starts, nbytes = records.path_ids[rows], records.byte_offsets[rows], records.nbytes[rows]
        payloads, crcs = records.payload_offsets[rows], records.crcs[rows]
        sizes = checkpoint.boxes[checkpoint.row_boxes[rows], 1]
        itemsizes = np.array([*(dtype.itemsize for dtype in records.dtypes), 0], dtype=np.int64)[
            records.dtype_ids[rows]
        ]
        payload_nbytes = sizes.prod(axis=1) * itemsizes
        file_nbytes = np.zeros(len(records.paths), dtype=np.int64)
        for path_id in np.unique(path_ids).tolist():
            file_nbytes[path_id] = self._files.get(records.paths[path_id]).nbytes
        is_payload = (items.ndims != NONE) & (payloads >= 0)
        is_outside = starts + nbytes > file_nbytes[path_ids]
        is_wrong = is_payload & ((payloads < starts) | (payloads + payload_nbytes > starts + nbytes))
        is_wrong |= is_payload & _of_dtypes(records, QUANTIZED_DTYPES)[records.dtype_ids[rows]]
        # What is wrong, or no payload, goes the way of items: it finds the words, or reads them whole.
        others = np.nonzero(~is_payload | is_outside | is_wrong)[0].tolist()
        self._add_each(others, [items[position] for position in others], stored)
        at = np.nonzero(is_payload & ~is_outside & ~is_wrong)[0]
        paths, dtypes = records.paths, records.dtypes
        names = [paths[path_id] for path_id in path_ids[at].tolist()]
        # A few shapes are shared by all: each is made once.
        table = np.concatenate([items.ndims[at, None], sizes[at], items.boxes[at, 1], items.boxes[at, 2]], axis=1)
        first, shape_ids = distinct_rows(table)
        dims = sizes.shape[1]
        shapes = [
            (row_major_strides(tuple(row[:n])), tuple(row[dims : dims + n]), tuple(row[2 * dims : 2 * dims + n]))
            for n, *row in table[first].tolist()
        ]
        self._requests += [
            ReadRequest(position, path, payload, dtypes[dtype_id], strides, 0, offsets, lengths)
            for position, path, payload, dtype_id, (strides, offsets, lengths) in zip(
                at.tolist(),
                names,
                payloads[at].tolist(),
                records.dtype_ids[rows][at].tolist(),
                [shapes[shape_id] for shape_id in shape_ids.tolist()],
                strict=True,
            )
        ]
        self.payload_nbytes += int((items.boxes[at, 2].prod(axis=1) * itemsizes[at]).sum())
        _, first = np.unique(rows[at], return_index=True)
        checked = at[first[payload_nbytes[at[first]] > 0]]
        self.npayloads += len(checked)
        checked = checked[crcs[checked] >= 0]
        fqns = items.fqns
        self._checks += [
            PayloadCheck(paths[path_id], payload, length, crc, fqns[name])
            for path_id, payload, length, crc, name in zip(
                path_ids[checked].tolist(),
                payloads[checked].tolist(),
                payload_nbytes[checked].tolist(),
                crcs[checked].tolist(),
                items.name_ids[checked].tolist(),
                strict=True,
            )
        ]

    def _add(self, position: int, item: ReadItem, place: StoredItem, stored: StoredItems, window: Window) -> None:
        if item.type is LoadItemType.BYTE_IO or place.transforms:
            self.whole_items.append((position, place))
            return
        sizes = stored.chunk_sizes(item.storage_index)
        lengths = item.lengths
        if sizes is not None and (lengths != sizes or any(item.storage_offsets)):
            check_box(item, sizes)
        tensor = stored_tensor(place, sizes, window)
        if tensor is None:
            self.whole_items.append((position, place))
            return
        if sizes is None or len(item.storage_offsets) != len(sizes):
            check_box(item, tensor.sizes)
        payload_offset, payload_nbytes, crc, dtype, _, strides, storage_offset, _, _ = tensor
        path = place.path
        self._requests.append(
            ReadRequest(position, path, payload_offset, dtype, strides, storage_offset, item.storage_offsets, lengths)
        )
        self.payload_nbytes += lengths.numel() * dtype.itemsize
        # Items of one payload follow each other, in file order.
        if payload_nbytes and (payload_offset != self._last_payload[1] or path != self._last_payload[0]):
            self._last_payload = (path, payload_offset)
            self.npayloads += 1
            if crc is not None:
                self._checks.append(PayloadCheck(path, payload_offset, payload_nbytes, crc, place.fqn))

    def chunk_plan(self) -> LoadChunkPlan:
        checks = [] if self._options.verify == "off" else self._checks
        plan = self._plan(self._requests, checks)
        if self._options.verify == "full" and (unchecked := set(checks).difference(plan.checks)):
            plan = self._plan([*self._requests, *map(whole_payload_request, sorted(unchecked))], checks)
        return plan

    def _plan(self, requests: list[ReadRequest], checks: list[PayloadCheck]) -> LoadChunkPlan:
        return plan_load(
            requests,
            checks,
            slab_nbytes=self._slab_nbytes,
            gap_nbytes=READ_GAP_NBYTES,
            large_apart=self._large_apart,
        )


def _of_dtypes(records: ItemRecords, dtypes: Collection[torch.dtype]) -> NDArray[np.bool_]:
    """Whether each of the records' dtypes is one of these; False for NONE, which is the last of the table."""
    return np.array([*(dtype in dtypes for dtype in records.dtypes), False], dtype=bool)
