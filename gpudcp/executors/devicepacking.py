"""From the tensors of a save to the slabs of one file, in device memory.

The device's own tensors take one kernel for each pair of dtypes; envelopes, objects and all other tensors, those of
another device too, are packed on the host, a slab's part at a time, and take one copy and one scatter; checksums and
their patches stay on the device until the file is done.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gpudcp_kernels.casts import is_castable
from gpudcp_kernels.checksum import add_parts, finished, new_slots, write_patches
from gpudcp_kernels.chunks import Parts
from gpudcp_kernels.pack import pack_cast

from gpudcp.boxes import Box, boxes_of_run
from gpudcp.chunkplan.save import ChunkWrite, SaveFilePlan
from gpudcp.chunkplan.slabs import NO_ROW, Literal, PayloadPart, SlabContents
from gpudcp.executors.base import SaveSource
from gpudcp.executors.boxtables import BoxTable
from gpudcp.executors.casting import copy_cast
from gpudcp.executors.compiling import checksumming, first_launch_apart, packing
from gpudcp.executors.devices import Device, Event, Stream
from gpudcp.executors.lanes import MARGIN_NBYTES, Lane
from gpudcp.executors.memory import as_bits, is_plain_memory, memory_at
from gpudcp.formats.checksum import crc32
from gpudcp.report import Stopwatch

# What the host packs is on the device once more until it is scattered, beside the slab.
_SCATTER_NBYTES = 4 << 20


class SlabPacker:
    """Fills the slabs of one file, in their order. All calls come from one thread."""

    def __init__(
        self, file: SaveFilePlan, source: SaveSource, device: Device, *, has_checksum: bool, stopwatch: Stopwatch
    ) -> None:
        self._stopwatch = stopwatch
        self._file = file
        self._source = source
        self._device = device
        self._has_checksum = has_checksum
        self._tensors: dict[int, _Payload] = {}
        self._host_crcs: dict[int, int] = {}
        self._slots: torch.Tensor | None = None
        self._packed: Event | None = None
        self._stream: Stream | None = None
        """Of the lane that packed last."""
        self._is_begun = False
        """Whether the slab at hand has work on the device already."""
        for row, write in enumerate(file.writes):
            # What has no payload part is never resolved for one, but the source is asked once for each.
            if not isinstance(write, ChunkWrite):
                self._host_crcs[row] = crc32(write.data) if has_checksum else 0
            elif write.envelope.payload_nbytes == 0:
                source.resolve(write.position)
                self._host_crcs[row] = 0

    def fill(self, lane: Lane, contents: SlabContents) -> Event | None:
        """Begin to fill the lane's device slab; returns the end of that. None: the lane's host slab is filled instead,
        because nothing in it is on the device."""
        staged: list[tuple[int, memoryview]] = []
        on_device: list[tuple[PayloadPart, _Payload]] = []
        self._is_begun = False
        for part in contents.parts:
            payload = self._payload(part.row)
            if not payload.is_on_device:
                staged.append((part.slab_offset, self._host_bytes(part, payload)))
                continue
            on_device.append((part, payload))
            if not self._source.keeps_memory:
                self._pack_at_once(lane, contents.nbytes, part, payload)
        staged += [(literal.slab_offset, self._with_host_crc(literal)) for literal in contents.literals]
        patches = [
            (literal.row, literal.slab_offset + place)
            for literal in contents.literals
            if literal.row != NO_ROW and literal.row not in self._host_crcs
            for place in literal.crc_offsets
        ]
        if self._source.keeps_memory:
            lane.kept += [payload.tensor for _, payload in on_device]
        for part in contents.parts:
            if part.stop == self._payload_numel(part.row):
                del self._tensors[part.row]
        if not on_device and not patches:
            _fill_host(lane, contents.nbytes, staged)
            return None
        return self._fill_device(lane, contents.nbytes, staged, on_device, patches)

    def crcs(self) -> list[int | None]:
        """The CRC-32 of each write, in the plan's order; None: not computed. Waits for the device."""
        if not self._has_checksum:
            return [None] * len(self._file.writes)
        found = None
        if self._slots is not None and self._stream is not None:
            with self._stream.current():  # the caller's own may have other work to do first
                found = finished(self._slots).tolist()
        return [
            self._host_crcs[row] if row in self._host_crcs else found[row]  # type: ignore[index]
            for row in range(len(self._file.writes))
        ]

    def _payload(self, row: int) -> _Payload:
        payload = self._tensors.get(row)
        if payload is None:
            write: Any = self._file.writes[row]
            tensor = self._source.resolve(write.position).detach()
            payload = self._tensors[row] = self._prepared(tensor, write.dtype)
            if not payload.is_on_device:
                self._host_crcs[row] = 0
        return payload

    def _prepared(self, tensor: torch.Tensor, dtype: torch.dtype) -> _Payload:
        """The tensor as kernels take it or, where they cannot take it, as it is.

        What they cannot take the host packs by parts: casting or moving it on a device would take memory for all of it.
        """
        is_view_of_another = tensor.is_conj() or tensor.is_neg()
        is_castable_here = tensor.dtype == dtype or is_castable(tensor.dtype, dtype)
        if is_view_of_another or not is_castable_here or not self._device.owns(tensor):
            return _Payload(tensor, dtype, False)
        return _Payload(*as_bits(tensor, dtype), True)

    def _payload_numel(self, row: int) -> int:
        write: Any = self._file.writes[row]
        return int(write.envelope.payload_nbytes // write.dtype.itemsize)

    def _host_bytes(self, part: PayloadPart, payload: _Payload) -> memoryview:
        """The bytes of a part that the host packs; their CRC-32 joins that of the parts before it."""
        tensor, dtype, start = payload.tensor, payload.dtype, part.start
        if is_plain_memory(tensor, dtype):
            memory = memory_at(tensor.data_ptr() + start * dtype.itemsize, (part.stop - start) * dtype.itemsize)
            if not self._source.keeps_memory:
                memory = memoryview(bytes(memory))
        else:
            tensor, dtype = as_bits(tensor, dtype)
            packed = torch.empty(part.stop - start, dtype=dtype, device="cpu")
            taken = 0
            for box in boxes_of_run(tuple(tensor.shape), start, part.stop):
                view = _view(tensor, box)
                copy_cast(packed[taken : taken + view.numel()].view(view.shape), view)
                taken += view.numel()
            memory = packed.view(torch.uint8).numpy().data
        if self._has_checksum:
            self._host_crcs[part.row] = crc32(memory, self._host_crcs[part.row])
        return memory

    def _with_host_crc(self, literal: Literal) -> memoryview:
        crc = self._host_crcs.get(literal.row)
        if not crc:
            return literal.data
        data = bytearray(literal.data)
        value = crc.to_bytes(4, "little")
        for place in literal.crc_offsets:
            first, last = max(place, 0), min(place + 4, len(data))
            data[first:last] = value[first - place : last - place]
        return memoryview(data)

    def _fill_device(
        self,
        lane: Lane,
        nbytes: int,
        staged: list[tuple[int, memoryview]],
        on_device: list[tuple[PayloadPart, _Payload]],
        patches: list[tuple[int, int]],
    ) -> Event:
        with self._on_stream(lane, nbytes):
            if staged:
                self._scatter(lane, staged)
            if self._source.keeps_memory:
                self._pack(lane, on_device)
            if self._has_checksum:
                if self._slots is None:
                    self._slots = new_slots(len(self._file.writes), self._device.torch_device)
                parts = self._crc_parts(on_device)
                with first_launch_apart(self._stopwatch, lane.device.torch_device, *checksumming(parts.nbytes)):
                    add_parts(self._slots, lane.memory, parts)
                if patches:
                    self._patch(lane, self._slots, patches)
            self._stream = lane.stream
            lane.event = self._packed = lane.stream.record()
            return self._packed

    @contextmanager
    def _on_stream(self, lane: Lane, nbytes: int) -> Iterator[None]:
        """Work begun in this context fills the lane's slab, which held zeros before."""
        # After all that the caller queued, which may still be computing these tensors.
        lane.stream.wait_for_caller()
        is_first, self._is_begun = not self._is_begun, True
        if is_first and self._packed is not None:
            lane.stream.wait_for(self._packed)  # checksums go on from slab to slab
        with lane.stream.current():
            if is_first:
                lane.slab(nbytes).zero_()
            yield

    def _pack_at_once(self, lane: Lane, nbytes: int, part: PayloadPart, payload: _Payload) -> None:
        """Pack a part and wait for it: when the source is asked again, the tensor's memory may become another's.

        A copy would not have to be waited for, but it would take memory beside the lanes.
        """
        with self._on_stream(lane, nbytes):
            self._pack(lane, [(part, payload)])
            packed = lane.stream.record()
        packed.synchronize()

    def _scatter(self, lane: Lane, staged: Iterable[tuple[int, memoryview]]) -> None:
        # The host slab has nothing to hold before this stream copies the filled slab into it.
        filled = 0
        for pieces in _batches(staged, nbytes=_SCATTER_NBYTES):
            first = filled
            for _, memory in pieces:
                begin, filled = filled, filled + len(memory)
                lane.host.view[begin:filled] = memory
            on_device = lane.device.on_device(lane.host.tensor[first:filled])
            lengths = np.array([len(memory) for _, memory in pieces], dtype=np.int64)
            table = BoxTable.of_runs(
                on_device.data_ptr() + np.cumsum(lengths) - lengths,
                np.array([offset for offset, _ in pieces], dtype=np.int64) + MARGIN_NBYTES,
                lengths,
            )
            kernels = packing(torch.uint8, torch.uint8, table)
            with first_launch_apart(self._stopwatch, lane.device.torch_device, *kernels):
                pack_cast(table, lane.memory, memory_dtype=torch.uint8, file_dtype=torch.uint8)

    def _patch(self, lane: Lane, slots: torch.Tensor, patches: list[tuple[int, int]]) -> None:
        rows, offsets = np.array(patches, dtype=np.int64).T
        with first_launch_apart(self._stopwatch, lane.device.torch_device, "patch"):
            write_patches(lane.memory, slots, patch_slots=rows.copy(), byte_offsets=offsets + MARGIN_NBYTES)

    def _pack(self, lane: Lane, on_device: Iterable[tuple[PayloadPart, _Payload]]) -> None:
        tables: defaultdict[tuple[torch.dtype, torch.dtype], BoxTable] = defaultdict(BoxTable)
        runs: defaultdict[tuple[torch.dtype, torch.dtype], list[tuple[PayloadPart, torch.Tensor]]] = defaultdict(list)
        for part, (tensor, dtype, _) in on_device:
            if tensor.is_contiguous():
                runs[tensor.dtype, dtype].append((part, tensor))
                continue
            slab_offset = MARGIN_NBYTES + part.slab_offset
            for offsets, lengths in boxes_of_run(tuple(tensor.shape), part.start, part.stop):
                view = _view(tensor, (offsets, lengths))
                tables[tensor.dtype, dtype].add(view.data_ptr(), slab_offset, lengths, view.stride())
                slab_offset += view.numel() * dtype.itemsize
        for pair, parts in runs.items():
            itemsize = pair[0].itemsize
            tables[pair].add_runs(
                [tensor.data_ptr() + part.start * itemsize for part, tensor in parts],
                [MARGIN_NBYTES + part.slab_offset for part, _ in parts],
                [part.stop - part.start for part, _ in parts],
            )
        for (memory_dtype, file_dtype), table in tables.items():
            boxes = table.boxes()
            with first_launch_apart(
                self._stopwatch, lane.device.torch_device, *packing(memory_dtype, file_dtype, boxes)
            ):
                pack_cast(boxes, lane.memory, memory_dtype=memory_dtype, file_dtype=file_dtype)

    def _crc_parts(self, on_device: list[tuple[PayloadPart, _Payload]]) -> Parts:
        itemsizes = np.array([payload.dtype.itemsize for _, payload in on_device], dtype=np.int64)
        columns = np.array([part for part, _ in on_device], dtype=np.int64).reshape(-1, 4)
        rows, starts, stops, slab_offsets = columns.T
        numels = np.array([self._payload_numel(row) for row in rows.tolist()], dtype=np.int64)
        return Parts(
            byte_offsets=slab_offsets + MARGIN_NBYTES,
            nbytes=(stops - starts) * itemsizes,
            slots=np.ascontiguousarray(rows),
            are_first=starts == 0,
            nbytes_after=(numels - stops) * itemsizes,
        )


class _Payload(NamedTuple):
    tensor: torch.Tensor
    dtype: torch.dtype
    """In the file, or the integer type that moves its bits."""
    is_on_device: bool


def _batches(staged: Iterable[tuple[int, memoryview]], *, nbytes: int) -> Iterator[list[tuple[int, memoryview]]]:
    """Pieces of up to so many bytes together; longer ones are cut."""
    batch: list[tuple[int, memoryview]] = []
    room = nbytes
    for offset, memory in staged:
        while memory:
            batch.append((offset, memory[:room]))
            taken = len(batch[-1][1])
            offset, memory, room = offset + taken, memory[taken:], room - taken
            if not room:
                yield batch
                batch, room = [], nbytes
    if batch:
        yield batch


def _view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]


def _fill_host(lane: Lane, nbytes: int, staged: list[tuple[int, memoryview]]) -> None:
    ctypes.memset(lane.host.address, 0, nbytes)
    for offset, memory in staged:
        lane.host.view[offset : offset + len(memory)] = memory
