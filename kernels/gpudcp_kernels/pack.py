"""Pack strided boxes of memory into a slab, casting on the way."""

from __future__ import annotations

import torch
import triton.language as tl

from gpudcp_kernels.bits import cast_bits
from gpudcp_kernels.casts import Cast, cast_of, cast_reference, distinct_casts
from gpudcp_kernels.references import box_at
from gpudcp_kernels.rows import elements_at, row_of_program, unit_offsets
from gpudcp_kernels.specialisation import Specialisation
from gpudcp_kernels.tables import ALIGNMENT_NBYTES, Boxes, Rows, on_device_of, rows_of, table_of, to_device
from gpudcp_kernels.triton_api import ON_HOST, access_width, kernel

_NUM_WARPS = 8
# Of the wider side: eight 16-byte accesses in flight a thread there, four on the narrower, and no spills.
_NBYTES_PER_PROGRAM = 32 << 10
_MAX_UNITS_PER_PROGRAM = 1024
# Of a cast: 32 elements a thread; with 64 of them, casts of 8-bit types spill on sm_100.
_MAX_CAST_ELEMENTS_PER_PROGRAM = 8192
_ELEMENTS_PER_PROGRAM = 1024


@kernel
def _pack_kernel(
    table_ptr: tl.tensor,  # int64
    row_width: tl.tensor,
    SOURCE: tl.constexpr,
    DEST: tl.constexpr,
    SOURCE_NBYTES: tl.constexpr,
    DEST_NBYTES: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """One program: UNITS units of UNIT elements. Units of more than one are aligned to 16 bytes on both sides."""
    ALIGNMENT: tl.constexpr = 16 if UNIT > 1 else 1
    row_ptr, block = row_of_program(table_ptr, row_width)
    numel = tl.load(row_ptr + 2).to(tl.int32)
    first = block * UNITS
    source_ptr = elements_at(tl.load(row_ptr), SOURCE_NBYTES, ALIGNMENT)
    address = tl.load(row_ptr + 1)
    dest_ptr = elements_at(address, DEST_NBYTES, ALIGNMENT)
    unit = tl.arange(0, UNITS)[:, None]
    lane = tl.arange(0, UNIT)[None, :]
    is_inside = unit < numel // UNIT - first
    bits = tl.load(source_ptr + (unit_offsets(row_ptr, first, unit, UNIT) * UNIT + lane), mask=is_inside)
    cast = cast_bits(bits, SOURCE, DEST)
    if UNIT > 1:
        tl.store(dest_ptr + first * UNIT + (unit * UNIT + lane), cast, mask=is_inside)
        # A row of one dimension may end with a part of a unit.
        if block == 0:
            element = numel // UNIT * UNIT + tl.arange(0, UNIT)
            rest = tl.load(source_ptr + element, mask=element < numel)
            tl.store(dest_ptr + element, cast_bits(rest, SOURCE, DEST), mask=element < numel)
    elif address % DEST_NBYTES == 0:
        tl.store(dest_ptr + first + unit, cast, mask=is_inside)
    else:
        bytes_ptr = elements_at(address, 1, 1) + (first.to(tl.int64) + unit) * DEST_NBYTES
        for byte in tl.static_range(DEST_NBYTES):
            tl.store(bytes_ptr + byte, (cast >> (8 * byte)).to(tl.int8), mask=is_inside)


def pack_cast(boxes: Boxes, slab: torch.Tensor, *, memory_dtype: torch.dtype, file_dtype: torch.dtype) -> None:
    """Pack boxes into a slab, row-major, cast by the rule of `casts`; on the slab's device and its current stream.

    Asynchronous: the boxes' memory and the slab must live until the stream has passed. At most two launches, however
    many boxes: those that are aligned on both sides, and the others.

    Args:
        boxes: of elements of ``memory_dtype``, each at its own alignment; their ranges in the slab must not overlap.
        slab: flat uint8, on the device; a CPU tensor under Triton's interpreter.
        memory_dtype: of the boxes.
        file_dtype: of their elements in the slab.

    Raises:
        ValueError: the rule has no such cast, the slab is not flat bytes of the kernels' device, or a row is not in it.
    """
    cast = cast_of(memory_dtype, file_dtype)
    with on_device_of(slab, on_host=ON_HOST):
        rows = rows_of(boxes, slab, memory_nbytes=memory_dtype.itemsize, file_nbytes=file_dtype.itemsize)
        unit = _aligned_unit(cast)
        are_aligned = rows.come_in_units(unit, memory_alignment_nbytes=ALIGNMENT_NBYTES)
        are_aligned &= rows.file_addresses % ALIGNMENT_NBYTES == 0
        _launch([(rows.take(are_aligned), unit), (rows.take(~are_aligned), 1)], cast, slab.device)


def pack_cast_reference(
    boxes: Boxes, slab: torch.Tensor, *, memory_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    """What `pack_cast` does, by torch on the CPU, one box at a time."""
    for row in range(len(boxes)):
        packed = cast_reference(box_at(boxes, row, memory_dtype), file_dtype)
        packed = packed.clone(memory_format=torch.contiguous_format).view(-1)
        start = int(boxes.byte_offsets[row])
        slab[start : start + packed.nbytes] = packed.view(torch.uint8)


def _launch(buckets: list[tuple[Rows, int]], cast: Cast, device: torch.device) -> None:
    buckets = [(rows, unit) for rows, unit in buckets if len(rows)]
    tables = [table_of(rows, unit=unit, units_per_program=_units_per_program(cast, unit)) for rows, unit in buckets]
    for table, numbers, (_, unit) in zip(tables, to_device(tables, device), buckets, strict=True):
        constexprs = _constexprs(cast, unit)
        _pack_kernel[(table.nprograms,)](numbers, table.row_width, **constexprs, num_warps=_NUM_WARPS)


def _aligned_unit(cast: Cast) -> int:
    """Elements of 16 bytes of the narrower side."""
    return ALIGNMENT_NBYTES // min(cast.source_nbytes, cast.dest_nbytes)


def _units_per_program(cast: Cast, unit: int) -> int:
    if unit == 1:
        return _ELEMENTS_PER_PROGRAM
    most = _MAX_UNITS_PER_PROGRAM if cast.is_move else _MAX_CAST_ELEMENTS_PER_PROGRAM // unit
    return min(most, _NBYTES_PER_PROGRAM // (unit * max(cast.source_nbytes, cast.dest_nbytes)))


def _constexprs(cast: Cast, unit: int) -> dict[str, str | int]:
    return {
        "SOURCE": cast.source,
        "DEST": cast.dest,
        "SOURCE_NBYTES": cast.source_nbytes,
        "DEST_NBYTES": cast.dest_nbytes,
        "UNIT": unit,
        "UNITS": _units_per_program(cast, unit),
    }


def _specialisation(cast: Cast, unit: int) -> Specialisation:
    return Specialisation(
        name=f"pack[{cast.source}->{cast.dest},{'elements' if unit == 1 else 'aligned'}]",
        kernel=_pack_kernel,
        signature={"table_ptr": "*i64", "row_width": "i32"},
        constexprs=_constexprs(cast, unit),
        divisible_by_16=("table_ptr",),
        num_warps=_NUM_WARPS,
        loads=access_width(unit, cast.source_nbytes),
        stores=access_width(unit, cast.dest_nbytes),
        max_registers=80,
    )


SPECIALISATIONS = [_specialisation(cast, unit) for cast in distinct_casts() for unit in (_aligned_unit(cast), 1)]
"""Two for every cast: aligned on both sides, and any other."""
