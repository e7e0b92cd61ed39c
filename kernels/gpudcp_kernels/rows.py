"""Where a unit of a row lies: how kernels read a table of `tables`. Device functions only."""

from __future__ import annotations

import triton.language as tl

from gpudcp_kernels.triton_api import device_function


@device_function
def row_of_program(table_ptr: tl.tensor, row_width: tl.tensor) -> tl.tensor:
    """The row of this program and which of the row's blocks is its own."""
    entry = tl.load(table_ptr + tl.program_id(0))
    row_ptr = table_ptr + tl.num_programs(0) + (entry >> 32) * row_width
    return row_ptr, (entry & 0xFFFFFFFF).to(tl.int32)


@device_function
def elements_at(address: tl.tensor, NBYTES: tl.constexpr, ALIGNMENT_NBYTES: tl.constexpr) -> tl.tensor:
    """A pointer to elements of so many bytes, with the alignment that Triton may rely upon."""
    if NBYTES == 1:
        elements_ptr = address.to(tl.pointer_type(tl.int8))
    elif NBYTES == 2:
        elements_ptr = address.to(tl.pointer_type(tl.int16))
    elif NBYTES == 4:
        elements_ptr = address.to(tl.pointer_type(tl.int32))
    else:
        elements_ptr = address.to(tl.pointer_type(tl.int64))
    return tl.multiple_of(elements_ptr, ALIGNMENT_NBYTES)


@device_function
def is_line(row_ptr: tl.tensor) -> tl.tensor:
    """Whether the row has one dimension only."""
    return tl.load(row_ptr + 2) == tl.load(row_ptr + 3)


@device_function
def unit_offsets(row_ptr: tl.tensor, first: tl.tensor, unit: tl.tensor, UNIT: tl.constexpr) -> tl.tensor:
    """Where units (``first + unit``, int32 counts, row-major) of UNIT elements begin in a box: int64, in units.

    Units of more than one element have no gaps in them and between them; see `tables.Rows.come_in_units`.
    """
    stride = tl.load(row_ptr + 4) if UNIT == 1 else 1
    if is_line(row_ptr):
        offsets = first.to(tl.int64) * stride + unit.to(tl.int64) * stride
    else:
        inner = tl.load(row_ptr + 3)
        length = tl.load(row_ptr + 5)
        units = (inner // UNIT).to(tl.int32)
        at = first + unit
        rest = at // units
        offsets = (at - rest * units).to(tl.int64) * stride
        if inner * length == tl.load(row_ptr + 2):
            offsets += rest.to(tl.int64) * (tl.load(row_ptr + 6) // UNIT)
        else:
            length_2 = length.to(tl.int32)
            length_1 = tl.load(row_ptr + 7).to(tl.int32)
            outer = rest // length_2
            offsets += (rest - outer * length_2).to(tl.int64) * (tl.load(row_ptr + 6) // UNIT)
            outermost = outer // length_1
            offsets += (outer - outermost * length_1).to(tl.int64) * (tl.load(row_ptr + 8) // UNIT)
            offsets += outermost.to(tl.int64) * (tl.load(row_ptr + 9) // UNIT)
    return offsets


@device_function
def strided_file_offsets(row_ptr: tl.tensor, element: tl.tensor) -> tl.tensor:
    """Where elements (int32 counts, row-major in the box) lie in a slab that is strided too: int64 elements."""
    length_3 = tl.load(row_ptr + 3).to(tl.int32)
    length_2 = tl.load(row_ptr + 5).to(tl.int32)
    length_1 = tl.load(row_ptr + 7).to(tl.int32)
    rest = element // length_3
    offsets = (element - rest * length_3).to(tl.int64) * tl.load(row_ptr + 10)
    outer = rest // length_2
    offsets += (rest - outer * length_2).to(tl.int64) * tl.load(row_ptr + 11)
    outermost = outer // length_1
    offsets += (outer - outermost * length_1).to(tl.int64) * tl.load(row_ptr + 12)
    return offsets + outermost.to(tl.int64) * tl.load(row_ptr + 13)


@device_function
def payload_elements(address: tl.tensor, element: tl.tensor, mask: tl.tensor, NBYTES: tl.constexpr) -> tl.tensor:
    """Elements (counts) of a payload at any address, as integers; up to 8 bytes after the last one are read."""
    if NBYTES % 4 == 0:
        # The same shift for all, and words that Triton knows to be neighbours.
        words_ptr = (address & -4).to(tl.pointer_type(tl.uint32)) + element * (NBYTES // 4)
        return _shifted(words_ptr, address, mask, NBYTES)
    else:
        return unaligned_elements(address + element.to(tl.int64) * NBYTES, mask, NBYTES)


@device_function
def unaligned_elements(addresses: tl.tensor, mask: tl.tensor, NBYTES: tl.constexpr) -> tl.tensor:
    """Elements at any addresses, as integers; up to 8 bytes after each are read."""
    return _shifted((addresses & -4).to(tl.pointer_type(tl.uint32)), addresses, mask, NBYTES)


@device_function
def _shifted(words_ptr: tl.tensor, begin: tl.tensor, mask: tl.tensor, NBYTES: tl.constexpr) -> tl.tensor:
    """Elements out of the two or three aligned words that hold each: typed loads need aligned addresses."""
    shift = ((begin & 3) * 8).to(tl.uint64)
    low = tl.load(words_ptr, mask=mask).to(tl.uint64)
    high = tl.load(words_ptr + 1, mask=mask).to(tl.uint64)
    bits = ((high << 32) | low) >> shift
    if NBYTES == 8:
        # In two steps: a shift by 64 bits, where the payload is aligned, would be undefined.
        last = tl.load(words_ptr + 2, mask=mask).to(tl.uint64)
        return (bits | ((last << 32) << (32 - shift))).to(tl.int64, bitcast=True)
    elif NBYTES == 4:
        return bits.to(tl.uint32).to(tl.int32, bitcast=True)
    elif NBYTES == 2:
        return bits.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return bits.to(tl.uint8).to(tl.int8, bitcast=True)
