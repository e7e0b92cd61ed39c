"""Tensors as boxes, and the bytes around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES, Boxes, Int64s

POISON = 0xA5


def boxes_of(tensors: Sequence[torch.Tensor], byte_offsets: Sequence[int]) -> Boxes:
    """One row for every tensor, which may have any strides."""
    return Boxes(
        addresses=np.array([tensor.data_ptr() for tensor in tensors], np.int64),
        byte_offsets=np.array(byte_offsets, np.int64),
        lengths=columns_of([tensor.shape for tensor in tensors], 1),
        strides=columns_of([tensor.stride() for tensor in tensors], 0),
    )


def columns_of(rows: Sequence[Sequence[int]], fill: int) -> Int64s:
    """Rows of different lengths, filled up in front."""
    ndim = max(map(len, rows))
    return np.array([[fill] * (ndim - len(row)) + list(row) for row in rows], np.int64).reshape(len(rows), ndim)


def poisoned_slab(nbytes: int, *, start: int = 0) -> torch.Tensor:
    """Bytes that nobody wrote, at ``start`` bytes past a 64-byte boundary, with the padding that kernels may read."""
    memory = torch.full((nbytes + start + SLAB_PADDING_NBYTES + 64,), POISON, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64 + start
    return memory[begin : begin + nbytes]


def random_slab(nbytes: int, seed: int) -> torch.Tensor:
    """Random bytes, with the padding that kernels may read."""
    slab = poisoned_slab(nbytes)
    slab.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)))
    return slab


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The elements' bytes, row-major."""
    contiguous = tensor.clone(memory_format=torch.contiguous_format).view(-1)
    return bytes(contiguous.view(torch.uint8).numpy())
