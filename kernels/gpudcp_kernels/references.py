"""Boxes as torch tensors over host memory, for the kernels' references. CPU only."""

from __future__ import annotations

import ctypes

import torch

from gpudcp_kernels.tables import Boxes, Int64s


def box_at(boxes: Boxes, row: int, dtype: torch.dtype) -> torch.Tensor:
    """A view of one box's memory, which somebody else keeps alive."""
    return strided_at(int(boxes.addresses[row]), boxes.lengths[row].tolist(), boxes.strides[row].tolist(), dtype)


def strided_at(address: int, lengths: list[int], strides: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A view of memory that somebody else keeps alive."""
    if 0 in lengths:
        return torch.empty(lengths, dtype=dtype, device="cpu")
    memory = (ctypes.c_uint8 * (_span(lengths, strides) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(lengths, strides)


def payload_of(
    boxes: Boxes, row: int, slab: torch.Tensor, dtype: torch.dtype, file_strides: Int64s | None
) -> torch.Tensor:
    """A copy of one payload, in the shape of its box; row-major in the slab if no file strides are given."""
    lengths, start = boxes.lengths[row].tolist(), int(boxes.byte_offsets[row])
    if 0 in lengths:
        return torch.empty(lengths, dtype=dtype, device="cpu")
    strides = list(torch.empty(lengths, device="meta").stride()) if file_strides is None else file_strides[row].tolist()
    # A clone: a typed view must begin on an element.
    payload = slab[start : start + _span(lengths, strides) * dtype.itemsize].clone()
    return payload.view(dtype).as_strided(lengths, strides)


def _span(lengths: list[int], strides: list[int]) -> int:
    """Elements from the first to the last."""
    return sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True)) + 1
