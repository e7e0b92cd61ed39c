"""From reads to the tensors of a load: straight into their memory, or out of a host slab."""

from __future__ import annotations

import ctypes
from collections import Counter

import torch

from gpudcp.chunkplan.load import NO_DESTINATION, ChunkRead, LoadChunkPlan, SlabRead
from gpudcp.executors.base import LoadTarget
from gpudcp.executors.casting import copy_cast
from gpudcp.executors.memory import as_bits, is_plain_memory
from gpudcp.executors.slabs import HostSlab


class Destinations:
    """Resolves each destination before its first byte and commits it after its last."""

    def __init__(self, plan: LoadChunkPlan, target: LoadTarget) -> None:
        self._target = target
        self._resolved: dict[int, torch.Tensor] = {}
        self._missing = Counter([chunk.position for read in plan.reads for chunk in read.chunks])
        self._filled: list[int] = []

    def straight_address(self, read: SlabRead) -> int | None:
        """The address of the destination's own memory, if the read's bytes can go there as they are."""
        chunk = read.chunks[0]
        if chunk.position == NO_DESTINATION:
            return None
        box = self.box(chunk)
        if not is_plain_memory(box, chunk.dtype):
            return None
        return box.data_ptr()

    def fill(self, read: SlabRead, slab: HostSlab | None) -> None:
        """The read is done: unpack it if it went into a slab."""
        for chunk in read.chunks:
            position = chunk.position
            if position == NO_DESTINATION:
                continue
            if slab is not None:
                unpack_host(slab, chunk.byte_offset - read.byte_offset, chunk, self.box(chunk))
        self.count(read)

    def count(self, read: SlabRead) -> None:
        """The read's chunks stand in their destinations."""
        for chunk in read.chunks:
            position = chunk.position
            if position == NO_DESTINATION:
                continue
            self._missing[position] -= 1
            if not self._missing[position]:
                self._filled.append(position)

    def box(self, chunk: ChunkRead) -> torch.Tensor:
        """What a chunk fills of its destination."""
        tensor = self._tensor(chunk.position)
        return tensor if tensor.shape == chunk.lengths else _box(tensor, chunk)

    def uncommitted(self) -> dict[int, torch.Tensor]:
        """What was resolved and lacks bytes, or the proof that they are right."""
        return dict(self._resolved)

    def commit_filled(self) -> None:
        """Commit what has every byte. The caller knows that their checksums were right."""
        for position in self._filled:
            self._target.commit(position, self._resolved.pop(position))
        self._filled.clear()

    def commit_empty(self, positions: tuple[int, ...]) -> None:
        """Resolve and commit the items that ask for no element."""
        for position in positions:
            self._target.commit(position, self._target.resolve(position))

    def _tensor(self, position: int) -> torch.Tensor:
        tensor = self._resolved.get(position)
        if tensor is None:
            tensor = self._resolved[position] = self._target.resolve(position)
        return tensor


def _box(tensor: torch.Tensor, chunk: ChunkRead) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.lengths, strict=True))]


def unpack_host(slab: HostSlab, slab_offset: int, chunk: ChunkRead, box: torch.Tensor) -> None:
    """Unpack a chunk that lies in a host slab into the box that it fills, cast by the rule."""
    dtype = chunk.dtype
    if chunk.is_dense and is_plain_memory(box, dtype):
        ctypes.memmove(box.data_ptr(), slab.address + slab_offset, chunk.nbytes)
        return
    packed = slab.tensor[slab_offset : slab_offset + chunk.nbytes]
    if slab_offset % dtype.itemsize:
        packed = packed.clone()  # stock files hold payloads at any byte; a typed view must start on an element
    box, dtype = as_bits(box, dtype)
    copy_cast(box, packed.view(dtype).as_strided(chunk.lengths, chunk.strides))
