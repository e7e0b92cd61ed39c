"""Unpack float8_e4m3fn weights with a float32 scale for every 128x128 block, multiplied on the way into memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from gpudcp_kernels.bits import from_fp32, to_fp32
from gpudcp_kernels.casts import CANONICAL_NANS, FLOATS, cast_reference
from gpudcp_kernels.references import box_at, payload_of, strided_at
from gpudcp_kernels.rows import elements_at, row_of_program, unaligned_elements
from gpudcp_kernels.specialisation import Specialisation
from gpudcp_kernels.tables import (
    ALIGNMENT_NBYTES,
    Bools,
    Boxes,
    Int64s,
    check_padding,
    check_rows,
    on_device_of,
    row_major_strides,
    table_of_columns,
    to_device,
)
from gpudcp_kernels.triton_api import ON_HOST, access_width, kernel

SCALE_BLOCK = 128
"""Rows and columns of a weight that share a scale."""

_NUM_WARPS = 8
_ALIGNED, _WORDS, _ELEMENTS = ALIGNMENT_NBYTES, 4, 1
_UNITS_PER_PROGRAM = {_ALIGNED: 512, _WORDS: 1024, _ELEMENTS: 1024}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Where the scales of boxes are, one row each: of a weight, float32, row-major by blocks, on the slab's device."""

    addresses: Int64s
    """(n,) of the scale of each weight's first block."""
    strides: Int64s
    """(n,) scales from one row of blocks to the next."""
    origins: Int64s
    """(n, 2) row and column of the weight at which the box begins."""


@kernel
def _dequant_kernel(
    table_ptr: tl.tensor,  # int64
    row_width: tl.tensor,
    DEST: tl.constexpr,
    DEST_NBYTES: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
) -> None:
    """One program: UNITS units of 16 aligned elements, of 4 elements in a word at any byte, or of one."""
    row_ptr, block = row_of_program(table_ptr, row_width)
    dest_ptr = elements_at(tl.load(row_ptr), DEST_NBYTES, 16 if UNIT == 16 else UNIT * DEST_NBYTES)
    address = tl.load(row_ptr + 1)
    units = (tl.load(row_ptr + 2) // UNIT).to(tl.int32)
    units_per_row = (tl.load(row_ptr + 3) // UNIT).to(tl.int32)
    unit = block * UNITS + tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    is_inside = unit < units
    row = unit // units_per_row
    column = unit - row * units_per_row  # in units
    row_stride = tl.load(row_ptr + 4) // UNIT
    file_row_stride = tl.load(row_ptr + 6)
    if UNIT == 16:
        file_offsets = (row.to(tl.int64) * (file_row_stride // 16) + column) * 16
        bits = tl.load(elements_at(address, 1, 16) + (file_offsets + lane), mask=is_inside)
        offsets = row.to(tl.int64) * row_stride + column
    elif UNIT == 4:
        words = unaligned_elements(address + row.to(tl.int64) * file_row_stride + column * 4, is_inside, 4)
        bits = (words >> (lane * 8)).to(tl.int8)
        offsets = row.to(tl.int64) * row_stride + column
    else:
        file_offsets = row.to(tl.int64) * file_row_stride + column.to(tl.int64) * tl.load(row_ptr + 7)
        bits = unaligned_elements(address + file_offsets, is_inside, 1)
        offsets = row.to(tl.int64) * row_stride + column.to(tl.int64) * tl.load(row_ptr + 5)
    scale_row = (row + tl.load(row_ptr + 10)) // SCALE_BLOCK
    scale_column = (column * UNIT + tl.load(row_ptr + 11)) // SCALE_BLOCK
    scale_ptr = tl.load(row_ptr + 8).to(tl.pointer_type(tl.float32))
    scale = tl.load(scale_ptr + (scale_row * tl.load(row_ptr + 9) + scale_column), mask=is_inside, other=0.0)
    product = to_fp32(bits, "e4m3fn").to(tl.float32, bitcast=True) * scale
    product_bits = product.to(tl.int32, bitcast=True)
    if DEST == "fp32":
        # Which NaN a product is, is the device's choice.
        product_bits = tl.where(product == product, product_bits, 0x7FC00000)
    tl.store(dest_ptr + (offsets * UNIT + lane), from_fp32(product_bits, DEST), mask=is_inside)


def dequant_unpack(
    boxes: Boxes,
    scales: Scales,
    slab: torch.Tensor,
    *,
    memory_dtype: torch.dtype,
    file_strides: Int64s | None = None,
) -> None:
    """Unpack float8_e4m3fn payloads into boxes, each element times its block's scale, on the slab's device and stream.

    The product is rounded to float32, then to ``memory_dtype`` by the rule of `casts`. Asynchronous, and at most two
    launches, as `unpack_cast`.

    Args:
        boxes: (n, 2) of elements of ``memory_dtype``; their payloads may begin at any byte of the slab.
        scales: one row for every box.
        slab: flat uint8, on the device, followed by `SLAB_PADDING_NBYTES` in its own storage; a CPU tensor under
            Triton's interpreter.
        memory_dtype: float32, float16 or bfloat16.
        file_strides: (n, 2) elements; None for row-major payloads.

    Raises:
        ValueError: another dtype, boxes that are not two-dimensional, scales of other shapes or at no possible address,
            a slab that is not flat padded bytes of the kernels' device, or a row that is not in it.
    """
    if memory_dtype not in _DTYPES:
        raise ValueError(f"block-scaled weights become float32, float16 or bfloat16, not {memory_dtype}")
    _check_scales(boxes, scales)
    with on_device_of(slab, on_host=ON_HOST):
        check_padding(slab)
        numels = check_rows(boxes, slab, memory_nbytes=memory_dtype.itemsize, file_nbytes=1, file_strides=file_strides)
        columns = _columns(boxes, scales, slab, numels, file_strides)[:, numels > 0]
        _launch(_buckets(columns, memory_dtype), memory_dtype, slab.device)


def dequant_unpack_reference(
    boxes: Boxes,
    scales: Scales,
    slab: torch.Tensor,
    *,
    memory_dtype: torch.dtype,
    file_strides: Int64s | None = None,
) -> None:
    """What `dequant_unpack` does, by torch on the CPU, one box at a time."""
    for row in range(len(boxes)):
        payload = payload_of(boxes, row, slab, torch.float8_e4m3fn, file_strides)
        if not payload.numel():
            continue
        origins = scales.origins[row].tolist()
        rows, columns = (
            (torch.arange(n, device="cpu") + o) // SCALE_BLOCK for n, o in zip(payload.shape, origins, strict=True)
        )
        strides, shape = [int(scales.strides[row]), 1], [int(rows[-1]) + 1, int(columns[-1]) + 1]
        of_blocks = strided_at(int(scales.addresses[row]), shape, strides, torch.float32)
        product = payload.float() * of_blocks[rows][:, columns]
        product.view(torch.int32)[product.isnan()] = CANONICAL_NANS[torch.float32]
        box_at(boxes, row, memory_dtype).copy_(cast_reference(product, memory_dtype))


def _columns(boxes: Boxes, scales: Scales, slab: torch.Tensor, numels: Int64s, file_strides: Int64s | None) -> Int64s:
    """The twelve numbers of each row, (12, n)."""
    strides = row_major_strides(boxes.lengths) if file_strides is None else file_strides
    payloads = boxes.byte_offsets + slab.data_ptr()
    memory = [boxes.addresses, payloads, numels, boxes.lengths[:, 1], *boxes.strides.T, *strides.T]
    return np.stack([*memory, scales.addresses, scales.strides, *scales.origins.T])


def _buckets(columns: Int64s, dtype: torch.dtype) -> list[tuple[Int64s, int]]:
    in_words = _come_in_units(columns, _WORDS, memory_alignment_nbytes=_WORDS * dtype.itemsize)
    aligned = _come_in_units(columns, _ALIGNED, memory_alignment_nbytes=ALIGNMENT_NBYTES)
    aligned &= (columns[1] % ALIGNMENT_NBYTES == 0) & (columns[6] % ALIGNMENT_NBYTES == 0)
    # Weights of one file are mostly either aligned or not: one launch serves either.
    unit = _ALIGNED if np.array_equal(aligned, in_words) else _WORDS
    buckets = [(columns[:, in_words], unit), (columns[:, ~in_words], _ELEMENTS)]
    return [(bucket, unit) for bucket, unit in buckets if bucket.shape[1]]


def _come_in_units(columns: Int64s, unit: int, *, memory_alignment_nbytes: int) -> Bools:
    """Which rows are units of elements without gaps on both sides and of one scale each, aligned in memory."""
    addresses, _, _, lengths, row_strides, steps, _, file_steps, _, _, _, origins = columns
    are_whole: Bools = (lengths % unit == 0) & (row_strides % unit == 0) & (origins % unit == 0)
    are_whole &= (steps == 1) & (file_steps == 1) & (addresses % memory_alignment_nbytes == 0)
    return are_whole


def _launch(buckets: list[tuple[Int64s, int]], dtype: torch.dtype, device: torch.device) -> None:
    tables = [
        table_of_columns([*columns], units=columns[2] // unit, units_per_program=_UNITS_PER_PROGRAM[unit])
        for columns, unit in buckets
    ]
    for table, numbers, (_, unit) in zip(tables, to_device(tables, device), buckets, strict=True):
        constexprs = _constexprs(dtype, unit)
        _dequant_kernel[(table.nprograms,)](numbers, table.row_width, **constexprs, num_warps=_NUM_WARPS)


def _check_scales(boxes: Boxes, scales: Scales) -> None:
    nrows = len(boxes)
    if boxes.lengths.shape != (nrows, 2):
        raise ValueError(f"block-scaled weights have two dimensions, the boxes' lengths are {boxes.lengths.shape}")
    shapes = scales.addresses.shape, scales.strides.shape, scales.origins.shape
    if shapes != ((nrows,), (nrows,), (nrows, 2)):
        raise ValueError(f"{nrows} boxes, scales of shapes {shapes}")
    wrong = (scales.addresses <= 0) | (scales.addresses % 4 != 0) | (scales.origins < 0).any(axis=1)
    wrong &= (boxes.lengths > 0).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"row {row}: scales at {scales.addresses[row]:#x}, box at {scales.origins[row].tolist()}")


def _constexprs(dtype: torch.dtype, unit: int) -> dict[str, str | int]:
    return {
        "DEST": FLOATS[dtype],
        "DEST_NBYTES": dtype.itemsize,
        "UNIT": unit,
        "UNITS": _UNITS_PER_PROGRAM[unit],
        "SCALE_BLOCK": SCALE_BLOCK,
    }


def _specialisation(dtype: torch.dtype, unit: int) -> Specialisation:
    return Specialisation(
        name=f"dequant[{FLOATS[dtype]},unit={unit}]",
        kernel=_dequant_kernel,
        signature={"table_ptr": "*i64", "row_width": "i32"},
        constexprs=_constexprs(dtype, unit),
        divisible_by_16=("table_ptr",),
        num_warps=_NUM_WARPS,
        loads="v4.b32" if unit == _ALIGNED else "b32",
        stores=access_width(unit, dtype.itemsize),
        max_registers=80,
    )


SPECIALISATIONS = [_specialisation(dtype, unit) for dtype in _DTYPES for unit in (_ALIGNED, _WORDS, _ELEMENTS)]
"""Three for every dtype: aligned on both sides; aligned in memory, any byte in the slab; anything else."""
