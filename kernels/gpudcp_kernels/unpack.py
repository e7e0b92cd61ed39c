"""Unpack payloads, which may begin at any byte of a slab, into strided boxes of memory, casting on the way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl

from gpudcp_kernels.bits import cast_bits
from gpudcp_kernels.casts import Cast, cast_of, cast_reference, distinct_casts
from gpudcp_kernels.references import box_at, payload_of
from gpudcp_kernels.rows import (
    elements_at,
    is_line,
    payload_elements,
    row_of_program,
    strided_file_offsets,
    unit_offsets,
)
from gpudcp_kernels.specialisation import Specialisation
from gpudcp_kernels.tables import (
    ALIGNMENT_NBYTES,
    Boxes,
    Int64s,
    Rows,
    check_padding,
    on_device_of,
    rows_of,
    table_of,
    to_device,
)
from gpudcp_kernels.triton_api import ON_HOST, access_width, kernel

_NUM_WARPS = 8


@kernel
def _unpack_aligned_kernel(
    table_ptr: tl.tensor,  # int64
    row_width: tl.tensor,
    SOURCE: tl.constexpr,
    DEST: tl.constexpr,
    SOURCE_NBYTES: tl.constexpr,
    DEST_NBYTES: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """One program: UNITS units of UNIT elements, aligned to 16 bytes on both sides."""
    row_ptr, block = row_of_program(table_ptr, row_width)
    numel = tl.load(row_ptr + 2).to(tl.int32)
    first = block * UNITS
    dest_ptr = elements_at(tl.load(row_ptr), DEST_NBYTES, 16)
    source_ptr = elements_at(tl.load(row_ptr + 1), SOURCE_NBYTES, 16)
    unit = tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    is_inside = unit < numel // UNIT - first
    bits = tl.load(source_ptr + first * UNIT + (unit * UNIT + lane), mask=is_inside)
    offsets = unit_offsets(row_ptr, first, unit, UNIT) * UNIT + lane
    tl.store(dest_ptr + offsets, cast_bits(bits, SOURCE, DEST), mask=is_inside)
    # A row of one dimension may end with a part of a unit.
    if block == 0:
        element = numel // UNIT * UNIT + tl.arange(0, UNIT)
        rest = tl.load(source_ptr + element, mask=element < numel)
        tl.store(dest_ptr + element, cast_bits(rest, SOURCE, DEST), mask=element < numel)


@kernel
def _unpack_words_kernel(
    table_ptr: tl.tensor,  # int64
    row_width: tl.tensor,
    SOURCE: tl.constexpr,
    DEST: tl.constexpr,
    SOURCE_NBYTES: tl.constexpr,
    DEST_NBYTES: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """One program: UNITS units of UNIT elements, of 4 bytes (8 if the elements are) and at any byte in the slab."""
    UNIT_NBYTES: tl.constexpr = UNIT * DEST_NBYTES
    row_ptr, block = row_of_program(table_ptr, row_width)
    numel = tl.load(row_ptr + 2).to(tl.int32)
    first = block * UNITS
    dest_ptr = elements_at(tl.load(row_ptr), DEST_NBYTES, UNIT_NBYTES if UNIT_NBYTES < 16 else 16)
    address = tl.load(row_ptr + 1)
    unit = tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    is_inside = unit < numel // UNIT - first
    words_address = address + first.to(tl.int64) * (UNIT * SOURCE_NBYTES)
    words = payload_elements(words_address, unit, is_inside, UNIT * SOURCE_NBYTES)
    if SOURCE_NBYTES == 1:
        bits = (words >> (lane * 8)).to(tl.int8)
    elif SOURCE_NBYTES == 2:
        bits = (words >> (lane * 16)).to(tl.int16)
    else:
        bits = words
    cast = cast_bits(bits, SOURCE, DEST)
    # Two stores: 64-bit offsets that come out of a branch would take up most of the registers.
    if is_line(row_ptr):
        tl.store(dest_ptr + first * UNIT + (unit * UNIT + lane), cast, mask=is_inside)
    else:
        tl.store(dest_ptr + (unit_offsets(row_ptr, first, unit, UNIT) * UNIT + lane), cast, mask=is_inside)
    if UNIT > 1:
        # A row of one dimension may end with a part of a unit.
        if block == 0:
            element = numel // UNIT * UNIT + tl.arange(0, UNIT)
            rest = payload_elements(address, element, element < numel, SOURCE_NBYTES)
            tl.store(dest_ptr + element, cast_bits(rest, SOURCE, DEST), mask=element < numel)


@kernel
def _unpack_elements_kernel(
    table_ptr: tl.tensor,  # int64
    row_width: tl.tensor,
    SOURCE: tl.constexpr,
    DEST: tl.constexpr,
    SOURCE_NBYTES: tl.constexpr,
    DEST_NBYTES: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """One program: UNITS units of one element, each at any byte in the slab, which may be strided; any box."""
    row_ptr, block = row_of_program(table_ptr, row_width)
    numel = tl.load(row_ptr + 2).to(tl.int32)
    first = block * UNITS
    dest_ptr = elements_at(tl.load(row_ptr), DEST_NBYTES, 1)
    address = tl.load(row_ptr + 1)
    unit = tl.arange(0, UNITS)
    is_inside = unit < numel - first
    file_element = (first + unit).to(tl.int64)
    if row_width > 10:
        file_element = strided_file_offsets(row_ptr, first + unit)
    bits = payload_elements(address, file_element, is_inside, SOURCE_NBYTES)
    tl.store(dest_ptr + unit_offsets(row_ptr, first, unit, UNIT), cast_bits(bits, SOURCE, DEST), mask=is_inside)


def unpack_cast(
    boxes: Boxes,
    slab: torch.Tensor,
    *,
    file_dtype: torch.dtype,
    memory_dtype: torch.dtype,
    file_strides: Int64s | None = None,
) -> None:
    """Unpack payloads into boxes, cast by the rule of `casts`; on the slab's device and its current stream.

    Asynchronous: the boxes' memory and the slab must live until the stream has passed. At most two launches, however
    many boxes: those that lie in memory in aligned units, and the others.

    Args:
        boxes: of elements of ``memory_dtype``, each at its own alignment, which must not overlap; their payloads may
            begin at any byte of the slab.
        slab: flat uint8, on the device, followed by `SLAB_PADDING_NBYTES` in its own storage; a CPU tensor under
            Triton's interpreter.
        file_dtype: of the payloads.
        memory_dtype: of the boxes.
        file_strides: (n, d) elements, where payloads are strided too (a stock item of a transposed tensor); None for
            row-major.

    Raises:
        ValueError: the rule has no such cast, the slab is not flat padded bytes of the kernels' device, or a row is not
            in it.
    """
    cast = cast_of(file_dtype, memory_dtype)
    with on_device_of(slab, on_host=ON_HOST):
        check_padding(slab)
        rows = rows_of(
            boxes,
            slab,
            memory_nbytes=memory_dtype.itemsize,
            file_nbytes=file_dtype.itemsize,
            file_strides=file_strides,
        )
        _launch(_buckets(rows, cast), slab.device)


def unpack_cast_reference(
    boxes: Boxes,
    slab: torch.Tensor,
    *,
    file_dtype: torch.dtype,
    memory_dtype: torch.dtype,
    file_strides: Int64s | None = None,
) -> None:
    """What `unpack_cast` does, by torch on the CPU, one box at a time."""
    for row in range(len(boxes)):
        payload = payload_of(boxes, row, slab, file_dtype, file_strides)
        box_at(boxes, row, memory_dtype).copy_(cast_reference(payload, memory_dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One way to unpack a cast's rows."""

    name: str
    kernel: Any
    constexprs: dict[str, str | int]
    unit: int
    units_per_program: int


@cache
def _variant(name: str, cast: Cast) -> _Variant:
    # Units of a program, and bytes of the wider side: as many accesses in flight as registers allow without spills.
    # 64 elements a thread are too many for casts of 8-bit types on sm_100.
    most_aligned = 1024 if cast.is_move else 8192 // _aligned_unit(cast)
    kernel, unit, most, most_nbytes = {
        "aligned": (_unpack_aligned_kernel, _aligned_unit(cast), most_aligned, 32 << 10),
        "words": (_unpack_words_kernel, _word_unit(cast), 2048, 16 << 10),
        "elements": (_unpack_elements_kernel, 1, 1024, 16 << 10),
    }[name]
    units = min(most, most_nbytes // (unit * max(cast.source_nbytes, cast.dest_nbytes)))
    constexprs: dict[str, str | int] = {
        "SOURCE": cast.source,
        "DEST": cast.dest,
        "SOURCE_NBYTES": cast.source_nbytes,
        "DEST_NBYTES": cast.dest_nbytes,
        "UNIT": unit,
        "UNITS": units,
    }
    return _Variant(name=name, kernel=kernel, constexprs=constexprs, unit=unit, units_per_program=units)


def _buckets(rows: Rows, cast: Cast) -> list[tuple[Rows, _Variant]]:
    unit = _word_unit(cast)
    unit_alignment_nbytes = min(ALIGNMENT_NBYTES, unit * cast.dest_nbytes)
    in_units = rows.come_in_units(unit, memory_alignment_nbytes=unit_alignment_nbytes)
    aligned = rows.come_in_units(_aligned_unit(cast), memory_alignment_nbytes=ALIGNMENT_NBYTES)
    aligned &= rows.file_addresses % ALIGNMENT_NBYTES == 0
    # Of gpudcp's own files every payload is aligned, of stock's nearly none: one launch serves either.
    name = "aligned" if np.array_equal(aligned, in_units) else "words"
    buckets = [(rows.take(in_units), _variant(name, cast)), (rows.take(~in_units), _variant("elements", cast))]
    return [(bucket.dense_if_row_major(), variant) for bucket, variant in buckets if len(bucket)]


def _launch(buckets: list[tuple[Rows, _Variant]], device: torch.device) -> None:
    tables = [table_of(rows, unit=v.unit, units_per_program=v.units_per_program) for rows, v in buckets]
    for table, numbers, (_, variant) in zip(tables, to_device(tables, device), buckets, strict=True):
        variant.kernel[(table.nprograms,)](numbers, table.row_width, **variant.constexprs, num_warps=_NUM_WARPS)


def _aligned_unit(cast: Cast) -> int:
    """Elements of 16 bytes of the narrower side."""
    return ALIGNMENT_NBYTES // min(cast.source_nbytes, cast.dest_nbytes)


def _word_unit(cast: Cast) -> int:
    """Elements of a 4-byte word of the payload."""
    return max(1, 4 // cast.source_nbytes)


def _specialisation(variant: _Variant, cast: Cast) -> Specialisation:
    return Specialisation(
        name=f"unpack_{variant.name}[{cast.source}->{cast.dest}]",
        kernel=variant.kernel,
        signature={"table_ptr": "*i64", "row_width": "i32"},
        constexprs=variant.constexprs,
        divisible_by_16=("table_ptr",),
        num_warps=_NUM_WARPS,
        loads=access_width(variant.unit, cast.source_nbytes) if variant.name == "aligned" else "b32",
        stores=access_width(variant.unit, cast.dest_nbytes),
        max_registers=112,
    )


SPECIALISATIONS = [
    _specialisation(_variant(name, cast), cast)
    for cast in distinct_casts()
    for name in ("aligned", "words", "elements")
]
"""Three for every cast: aligned on both sides; aligned in memory, any byte in the slab; anything else."""
