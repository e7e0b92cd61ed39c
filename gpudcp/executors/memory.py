"""Tensors as plain memory: an address and bytes."""

from __future__ import annotations

import ctypes

import torch

CACHED_NBYTES = 256 << 10
"""Copied or read, then checksummed in pieces of this size, while they are still in the core's cache."""

# Same-dtype copies move bits: as integers, so that dtypes without kernels of their own (float4, complex32) move too.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def is_plain_memory(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's bytes, from its address on, are what a file of this dtype holds."""
    return (
        tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    )


def memory_at(address: int, nbytes: int) -> memoryview:
    """The memory of a tensor that somebody else keeps alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def as_bits(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype]:
    """The tensor and the dtype to copy it with, from or to elements of ``dtype``: as integers where none changes."""
    if tensor.dtype == dtype and not (tensor.is_conj() or tensor.is_neg()):
        dtype = _CARRIERS[dtype.itemsize]
        tensor = tensor.view(dtype)
    return tensor, dtype
