"""Memory twice, on the host for a kernel's reference and on the GPU for the kernel, and random boxes in it.

Where the kernels' compiled code runs on the host (`make test-ptx`), so is the kernel's memory, with fences around it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from gpudcp_kernels import triton_api
from gpudcp_kernels.casts import FLOATS, Cast, cast_of, is_castable
from gpudcp_kernels.tables import Boxes, Int64s

DEVICE = torch.device("cpu" if triton_api.ON_HOST else "cuda")
POISON = 0xA5
needs_gpu_itself = pytest.mark.skipif(triton_api.ON_HOST, reason="needs a GPU's streams, or what torch does there")
MARGIN_NBYTES = 64
"""Poison on both sides of every slab; more than kernels may read there."""

INTEGERS = (
    *(torch.uint8, torch.int8, torch.uint16, torch.int16),
    *(torch.uint32, torch.int32, torch.uint64, torch.int64),
)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _pairs() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    dtypes = (*FLOATS, *INTEGERS, torch.bool)
    seen: set[Cast] = set()
    for pair in product(dtypes, dtypes):
        if is_castable(*pair) and (cast := cast_of(*pair)) not in seen:
            seen.add(cast)
            yield pair
    yield torch.complex128, torch.complex128


PAIRS = tuple(_pairs())
"""One pair of dtypes for every cast that kernels know, and elements of 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Boxes in some memory and in a slab, wherever those are."""

    boxes: Boxes
    """Addresses count from the memory's first byte."""
    file_strides: Int64s
    memory_nbytes: int
    slab_nbytes: int

    def at(self, memory: torch.Tensor) -> Boxes:
        """The boxes of this very memory."""
        return replace(self.boxes, addresses=self.boxes.addresses + memory.data_ptr())


def random_layout(
    seed: int,
    *,
    memory_dtype: torch.dtype,
    file_dtype: torch.dtype,
    count: int = 36,
    start: int = 0,
    slab_alignment: int = 1,
    is_file_strided: bool = False,
    are_regular: bool = False,
) -> Layout:
    """Boxes of 0 to 5 dimensions: lines, aligned matrices, strided and permuted ones, empty ones; none overlap.

    The first begins at byte ``start`` of the slab, the others at multiples of ``slab_alignment`` after that.
    """
    rng = np.random.default_rng(seed)
    step_nbytes = memory_dtype.itemsize
    lengths, strides = np.ones((count, 5), np.int64), np.zeros((count, 5), np.int64)
    file_strides = np.zeros((count, 5), np.int64)
    addresses, byte_offsets = np.zeros(count, np.int64), np.zeros(count, np.int64)
    address, byte_offset = MARGIN_NBYTES, start
    for row in range(count):
        ndim, is_regular = row % 6, are_regular or row % 4 == 0
        of_row = rng.integers(1, 6, ndim)
        if ndim:
            of_row[-1] = rng.integers(1, 5000 if ndim == 1 else 40)
        if is_regular and ndim > 1:
            of_row[-1] = 16 * rng.integers(1, 6)
        if row % 13 == 12 and ndim:
            of_row[0] = 0
        place = slice(5 - ndim, 5)
        lengths[row, place] = of_row
        strides[row, place] = _strides(rng, of_row, is_regular=is_regular)
        file_strides[row, place] = _strides(rng, of_row, is_regular=False)
        gap = 16 * memory_dtype.itemsize if is_regular else int(rng.integers(1, 9)) * step_nbytes
        address = -(-address // gap) * gap if is_regular else address + gap
        addresses[row], byte_offsets[row] = address, byte_offset
        address += _span(lengths[row], strides[row]) * memory_dtype.itemsize
        nelements = _span(lengths[row], file_strides[row]) if is_file_strided else int(np.prod(of_row))
        byte_offset += -(-nelements * file_dtype.itemsize // slab_alignment) * slab_alignment
        byte_offset += slab_alignment * int(rng.integers(0, 3))
    boxes = Boxes(addresses=addresses, byte_offsets=byte_offsets, lengths=lengths, strides=strides)
    return Layout(
        boxes=boxes, file_strides=file_strides, memory_nbytes=address + MARGIN_NBYTES, slab_nbytes=byte_offset + 16
    )


def _strides(rng: np.random.Generator, lengths: Int64s, *, is_regular: bool) -> Int64s:
    """Of a box whose elements lie apart; regular: rows of whole units, the innermost dimension without gaps."""
    order = range(len(lengths))[::-1] if is_regular else rng.permutation(len(lengths))
    strides, step = np.zeros(len(lengths), np.int64), 1 if is_regular else int(rng.integers(1, 3))
    for dimension in order:
        strides[dimension] = step
        padded = max(int(lengths[dimension]), 1) + (0 if is_regular else int(rng.integers(0, 3)))
        step *= -(-padded // 16) * 16 if is_regular and step == 1 else padded
    return strides


def _span(lengths: Int64s, strides: Int64s) -> int:
    return 0 if 0 in lengths else int(((lengths - 1) * strides).sum()) + 1


def run_boxes(memory: torch.Tensor, starts: Int64s, byte_offsets: Int64s, numels: Int64s) -> Boxes:
    """Runs of neighbouring elements of a flat tensor, from these elements on."""
    return Boxes(
        addresses=memory.data_ptr() + starts * memory.itemsize,
        byte_offsets=byte_offsets,
        lengths=numels[:, None],
        strides=np.ones((len(numels), 1), np.int64),
    )


def random_bytes(nbytes: int, *, seed: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Flat bytes of elements of a dtype: any bits, NaNs and denormals too; of bools only those that are ones."""
    high = 2 if dtype == torch.bool else 256
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, nbytes, np.uint8))


def poisoned(nbytes: int) -> torch.Tensor:
    """Flat bytes that nobody wrote."""
    return torch.full((nbytes,), POISON, dtype=torch.uint8)


def on_device(host: torch.Tensor) -> torch.Tensor:
    """A copy."""
    if triton_api.ON_HOST:
        from ptx_fences import fenced_copy

        return fenced_copy(host)
    return host.to(DEVICE, copy=True)


def slab_in(memory: torch.Tensor) -> torch.Tensor:
    """The memory without its margins."""
    return memory[MARGIN_NBYTES:-MARGIN_NBYTES]


def need_device_memory(nbytes: int) -> str | None:
    """Why a test that takes so much cannot run; None: it can."""
    if triton_api.ON_HOST:
        return None if "PTX_LARGE" in os.environ else "takes a minute on the host: set PTX_LARGE"
    free_nbytes = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free_nbytes < nbytes * 1.1:
        return f"needs {nbytes / 2**30:.1f} GiB of device memory, {free_nbytes / 2**30:.1f} are free"
    return None


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of a type of one or two bytes."""
    return torch.arange(2 ** (8 * dtype.itemsize)).to(BITS[dtype.itemsize]).view(dtype)


def telling_values(source: torch.dtype, dest: torch.dtype) -> torch.Tensor:
    """All values of a narrow source. Of a wide one: random bits, denormals and NaNs, and everything around the
    numbers and the ties of the target, past its ends too."""
    if source.itemsize <= 2:
        return every_value(source)
    carrier = BITS[source.itemsize]
    bits = random_bytes(200_000 * source.itemsize, seed=7).view(carrier)
    bits[:20_000] &= (1 << (8 * source.itemsize - 10)) - 1
    bits[20_000:30_000] |= 0x7FF0 << (8 * source.itemsize - 16)
    numbers = every_value(dest) if dest.itemsize <= 2 else random_bytes(80_000, seed=8).view(torch.float32)
    finite = numbers.double()
    finite = finite[finite.isfinite()].sort().values
    limits = torch.finfo(min(source, dest, key=lambda dtype: dtype.itemsize))
    half_step = 2.0 ** math.floor(math.log2(limits.max)) * limits.eps / 2
    past = torch.tensor([limits.max + half_step * n for n in range(8)], dtype=torch.float64)
    points = torch.cat((finite, (finite[1:] + finite[:-1]) / 2, past, -past)).to(source).view(carrier)
    return torch.cat((bits, points - 1, points, points + 1)).view(source)


FLOAT_PAIRS = tuple(pair for pair in product(FLOATS, FLOATS) if pair[0] != pair[1])
