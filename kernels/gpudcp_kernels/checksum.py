"""CRC-32 (the zip polynomial) of byte ranges of a slab, and patches that write finished ones into it.

CRCs are collected in *slots*: an int32 tensor on the device, each slot the CRC-32 of one payload, whose parts may lie
in several slabs. A part counts with a power of x that stands for the payload's bytes after it, so parts may be added in
any order and no CRC is ever combined. Nothing here waits for the device except `finished`.

How a lane divides without tables and without shifts: over GF(2), P(x)^(2^m) = P(x^(2^m)). If the 32-bit words of a
lane lie 32 * LANES bits apart and LANES is a power of two, then y = x^(32 * LANES) is itself a root of the CRC's
polynomial P. So a lane divides by P in y: each word is XORed with the 14 earlier quotient words that P's taps name, all
32 bit positions at once, in 7 instructions. Only the last 32 quotient words remain to be evaluated: they are weighted
by polynomials in x (`polynomials.remainder_factors`), which is a 32 x 32 matrix of bits, then one Horner scheme in x.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from gpudcp_kernels.chunks import Parts, Variant, are_small, end_words, large_table, small_table
from gpudcp_kernels.polynomials import POLYNOMIAL, Int64s, UInt32s, remainder_factors
from gpudcp_kernels.specialisation import Specialisation
from gpudcp_kernels.tables import ALIGNMENT_NBYTES, Table, on_device_of, to_device
from gpudcp_kernels.triton_api import IS_INTERPRETING, ON_HOST, device_function, kernel

SMALL_NBYTES = 32 << 10
"""Ranges of up to so many bytes are one chunk each."""

# Eight lanes read 32 bytes, the least that a GPU fetches: whole ranges of a few KiB keep their lanes busy.
_SMALL = Variant(lanes=8, groups=16, max_words=SMALL_NBYTES // 4 + 2)
# Chunks of 256 KiB: what follows the division costs a lane as much as some 100 words, of the 256 that it then has.
_LARGE = Variant(lanes=256, groups=1, max_words=1 << 16)
_PATCHES, _PATCH_WARPS = 256, 4

_AS_INT32 = tl.constexpr(POLYNOMIAL - (1 << 32))


@device_function
def _full_block(block_ptr: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    """The 32 words of every lane in one block."""
    words: tl.tuple = ()
    for t in tl.static_range(32):
        words = words + (tl.load(block_ptr + t * LANES),)
    return words


@device_function
def _first_block(
    block_ptr: tl.tensor, step: tl.tensor, start: tl.tensor, fix: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    """Likewise, zeros for words before `start`, the lane's first word, to which `fix` is added."""
    words: tl.tuple = ()
    for t in tl.static_range(32):
        word = tl.load(block_ptr + t * LANES, mask=step + t >= start, other=0)
        words = words + (word ^ tl.where(step + t == start, fix, 0),)
    return words


@device_function
def _times_x(a: tl.tensor) -> tl.tensor:
    return ((a >> 1) & 0x7FFFFFFF) ^ (((a << 31) >> 31) & _AS_INT32)


@device_function
def _multiply(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    product = a ^ a
    for bit in tl.static_range(32):
        product = _times_x(product) ^ (((a << (31 - bit)) >> 31) & b)
    return product


if IS_INTERPRETING:

    @device_function
    def _xor3(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
        return a ^ b ^ c

else:

    @device_function
    def _xor3(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
        # By name: of plain XORs LLVM computes those that several words share but once, two at a time, which on a GPU,
        # where an instruction takes three operands (0x96 is the truth table of their sum), is a quarter more of them.
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@device_function
def _xor(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a ^ b


@kernel
def _crc_kernel(
    table_ptr: tl.tensor,  # int64, see `chunks`
    slab_ptr: tl.tensor,  # uint8
    slots_ptr: tl.tensor,  # int32
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    REMAINDER_FACTORS: tl.constexpr,
) -> None:
    """GROUPS chunks a program, LANES lanes a chunk. Chunks are aligned at their end: zeros in front change nothing."""
    program = tl.program_id(0)
    blocks = tl.load(table_ptr + 2 * program).to(tl.int32)
    masked_blocks = tl.load(table_ptr + 2 * program + 1).to(tl.int32)
    thread = tl.arange(0, LANES * GROUPS)
    lane = thread % LANES
    programs = tl.num_programs(0)
    nchunks = programs * GROUPS
    columns_ptr = table_ptr + 2 * programs
    factors_ptr = columns_ptr + 7 * nchunks
    column_ptr = columns_ptr + program * GROUPS + thread // LANES
    end_word = tl.load(column_ptr)
    words = tl.load(column_ptr + nchunks).to(tl.int32)
    head_mask = tl.load(column_ptr + 2 * nchunks).to(tl.int32)
    init = tl.load(column_ptr + 3 * nchunks)
    tail_mask = tl.load(column_ptr + 4 * nchunks)
    slot = tl.load(column_ptr + 5 * nchunks)
    factor = tl.load(column_ptr + 6 * nchunks)

    end_ptr = slab_ptr.to(tl.pointer_type(tl.int32)) + end_word
    # The first word's lane removes the bytes before the range and adds the CRC's initial ones; the next lane the rest.
    prefix = blocks * 32 * LANES - words
    start = (prefix - lane + LANES - 1) // LANES
    is_first = lane == prefix % LANES
    is_second = lane == (prefix + 1) % LANES
    head = tl.load(end_ptr - words, mask=is_first & (head_mask != 0), other=0) & head_mask
    fix = tl.where(is_first, head ^ init.to(tl.int32), tl.where(is_second, (init >> 32).to(tl.int32), 0))

    zero = tl.full((LANES * GROUPS,), 0, tl.int32)
    state: tl.tuple = ()
    for _ in tl.static_range(32):
        state = state + (zero,)
    block_ptr = end_ptr - blocks * (32 * LANES) + lane
    block = 0
    while block < blocks:
        if block < masked_blocks:
            new = _first_block(block_ptr, block * 32, start, fix, LANES)
        else:
            new = _full_block(block_ptr, LANES)
        for t in tl.static_range(32):
            quotient = _xor3(state[t], state[(t + 1) % 32], state[(t + 2) % 32])
            quotient = _xor3(quotient, state[(t + 4) % 32], state[(t + 5) % 32])
            quotient = _xor3(quotient, state[(t + 7) % 32], state[(t + 8) % 32])
            quotient = _xor3(quotient, state[(t + 10) % 32], state[(t + 11) % 32])
            quotient = _xor3(quotient, state[(t + 12) % 32], state[(t + 16) % 32])
            quotient = _xor3(quotient, state[(t + 22) % 32], state[(t + 23) % 32])
            quotient = _xor3(quotient, state[(t + 26) % 32], new[t])
            state = state[:t] + (quotient,) + state[t + 1 :]
        block_ptr += 32 * LANES
        block += 1

    remainder = zero
    for power in tl.static_range(32):
        coefficient = zero
        for t in tl.static_range(32):
            if (REMAINDER_FACTORS[t] >> power) & 1:
                coefficient ^= state[t]
        remainder = _times_x(remainder) ^ coefficient

    # Bytes after the range, in its last one or two words, are taken out again.
    garbage = tl.where(lane == LANES - 1, (tail_mask >> 32).to(tl.int32), tail_mask.to(tl.int32))
    garbage = tl.where(lane >= LANES - 2, garbage, 0)
    remainder ^= tl.load(end_ptr + (lane - LANES), mask=garbage != 0, other=0) & garbage
    if GROUPS == 1:
        remainder = _multiply(tl.load(factors_ptr + lane).to(tl.int32), remainder)
        total = tl.reduce(remainder, 0, _xor)
        chunk_factor = tl.load(columns_ptr + 6 * nchunks + program).to(tl.int32)
        chunk_slot = tl.load(columns_ptr + 5 * nchunks + program)
        tl.atomic_xor(slots_ptr + chunk_slot, _multiply(chunk_factor, total), sem="relaxed")
    else:
        remainder = _multiply(tl.load(factors_ptr + factor * LANES + lane).to(tl.int32), remainder)
        tl.atomic_xor(slots_ptr + slot, remainder, sem="relaxed")


@kernel
def _patch_kernel(
    table_ptr: tl.tensor,  # int64: slots, then byte offsets
    npatches: tl.tensor,
    slots_ptr: tl.tensor,  # int32
    slab_ptr: tl.tensor,  # uint8
    PATCHES: tl.constexpr,
) -> None:
    """PATCHES patches a program, byte by byte: they may begin anywhere."""
    byte = tl.program_id(0) * (4 * PATCHES) + tl.arange(0, 4 * PATCHES)
    patch = byte // 4
    exists = patch < npatches
    slot = tl.load(table_ptr + patch, mask=exists, other=0)
    byte_offset = tl.load(table_ptr + npatches + patch, mask=exists, other=0)
    crc = tl.load(slots_ptr + slot, mask=exists, other=0)
    tl.store(slab_ptr + byte_offset + byte % 4, (crc >> (8 * (byte % 4))).to(tl.uint8), mask=exists)


def new_slots(count: int, device: torch.device) -> torch.Tensor:
    """Slots that no part was added to yet: int32 (count,), filled on the current stream."""
    return torch.full((count,), -1, dtype=torch.int32, device=device)


def add_parts(slots: torch.Tensor, slab: torch.Tensor, parts: Parts) -> None:
    """Add the CRC-32 of parts to their slots; on the slab's device and its current stream.

    Asynchronous: slab and slots must live until the stream has passed. At most two launches, however many parts: small
    ones, many in a program, and the others, cut into chunks. Parts may be added in any order and on any stream.

    Args:
        slots: from `new_slots`, on the slab's device.
        slab: flat uint8 on the device, at an address divisible by 16 and with 7 readable bytes after its end; a CPU
            tensor under Triton's interpreter.
        parts: what to add.

    Raises:
        ValueError: a part lies outside the slab or its slot does not exist; slab or slots are not what is said above.
    """
    with on_device_of(slab, on_host=ON_HOST):
        _check_memory(slots, slab)
        _check_parts(slots, slab, parts)
        small = are_small(parts, max_nbytes=SMALL_NBYTES)
        launches = [(small_table(parts.take(small), _SMALL), _SMALL)] if small.any() else []
        launches += [(large_table(parts.take(~small), _LARGE), _LARGE)] if not small.all() else []
        numbers = to_device([table for table, _ in launches], slab.device)
        for (table, variant), table_on_device in zip(launches, numbers, strict=True):
            _crc_kernel[(table.nprograms,)](
                table_on_device, slab, slots, **_constexprs(variant), num_warps=_num_warps(variant)
            )


def crc32_ranges(slab: torch.Tensor, byte_offsets: Int64s, nbytes: Int64s) -> torch.Tensor:
    """The CRC-32 of every range of a slab, as `add_parts` computes it: int32 (n,) bit patterns, on the device."""
    slots = new_slots(len(nbytes), slab.device)
    parts = Parts(
        byte_offsets=byte_offsets,
        nbytes=nbytes,
        slots=np.arange(len(nbytes)),
        are_first=np.ones(len(nbytes), np.bool_),
        nbytes_after=np.zeros(len(nbytes), np.int64),
    )
    add_parts(slots, slab, parts)
    return slots


def write_patches(slab: torch.Tensor, slots: torch.Tensor, *, patch_slots: Int64s, byte_offsets: Int64s) -> None:
    """Write the CRC-32 of slots into a slab, four bytes each, little-endian, at any byte; on the current stream.

    One launch, asynchronous. All parts of the slots must have been added earlier in the order of the stream. A slot may
    be written to several places.

    Args:
        slab: flat uint8 on the device; a CPU tensor under Triton's interpreter.
        slots: from `new_slots`, on the slab's device.
        patch_slots: (n,) which slot.
        byte_offsets: (n,) where in the slab.

    Raises:
        ValueError: a patch lies outside the slab or its slot does not exist; slab or slots are not what is said above.
    """
    with on_device_of(slab, on_host=ON_HOST):
        _check_memory(slots, slab)
        npatches = len(patch_slots)
        if byte_offsets.shape != (npatches,):
            raise ValueError(f"{npatches} patch slots, byte offsets of shape {byte_offsets.shape}")
        _check_ranges(slab, byte_offsets, np.full(npatches, 4))
        _check_slots(slots, patch_slots)
        if npatches == 0:
            return
        nprograms = -(-npatches // _PATCHES)
        table = Table(numbers=np.concatenate((patch_slots, byte_offsets)), nprograms=nprograms, row_width=2)
        (numbers,) = to_device([table], slab.device)
        _patch_kernel[(nprograms,)](numbers, npatches, slots, slab, PATCHES=_PATCHES, num_warps=_PATCH_WARPS)


def finished(slots: torch.Tensor) -> UInt32s:
    """The CRC-32s on the host. Waits for the slots' device."""
    return slots.cpu().numpy().view(np.uint32)


def crc32_ranges_reference(slab: torch.Tensor, byte_offsets: Int64s, nbytes: Int64s) -> torch.Tensor:
    """What `crc32_ranges` gives, by zlib."""
    payload = slab.cpu().numpy().tobytes()
    crcs = [zlib.crc32(payload[start : start + n]) for start, n in zip(byte_offsets, nbytes, strict=True)]
    return torch.from_numpy(np.array(crcs, np.uint32).view(np.int32))


def write_patches_reference(
    slab: torch.Tensor, slots: torch.Tensor, *, patch_slots: Int64s, byte_offsets: Int64s
) -> None:
    """What `write_patches` does, on the CPU."""
    for slot, start in zip(patch_slots, byte_offsets, strict=True):
        slab[start : start + 4] = slots[slot : slot + 1].view(torch.uint8)


def _check_memory(slots: torch.Tensor, slab: torch.Tensor) -> None:
    if slots.dtype != torch.int32 or slots.ndim != 1 or not slots.is_contiguous() or slots.device != slab.device:
        raise ValueError(
            f"slots are {slots.dtype} {tuple(slots.shape)} on {slots.device}, the slab is on {slab.device}"
        )
    # Triton compiles once more for memory that is less aligned.
    for name, tensor in (("slots", slots), ("slab", slab)):
        if tensor.data_ptr() % ALIGNMENT_NBYTES:
            raise ValueError(f"{name} at address {tensor.data_ptr():#x}, not a multiple of {ALIGNMENT_NBYTES}")


def _check_parts(slots: torch.Tensor, slab: torch.Tensor, parts: Parts) -> None:
    _check_ranges(slab, parts.byte_offsets, parts.nbytes)
    _check_slots(slots, parts.slots)
    _refuse(parts.nbytes_after < 0, lambda row: f"{parts.nbytes_after[row]} bytes after it")
    readable = slab.untyped_storage().nbytes() - slab.storage_offset()
    ends = 4 * end_words(parts)
    _refuse(ends > readable, lambda row: f"reads up to byte {ends[row]}, the slab has {readable} with its padding")


def _check_ranges(slab: torch.Tensor, byte_offsets: Int64s, nbytes: Int64s) -> None:
    _refuse(
        (byte_offsets < 0) | (nbytes < 0) | (byte_offsets + nbytes > slab.numel()),
        lambda row: f"{nbytes[row]} bytes at {byte_offsets[row]}, the slab has {slab.numel()}",
    )


def _check_slots(slots: torch.Tensor, wanted: Int64s) -> None:
    _refuse((wanted < 0) | (wanted >= len(slots)), lambda row: f"slot {wanted[row]}, there are {len(slots)}")


def _refuse(are_wrong: npt.ArrayLike, text: Callable[[int], str]) -> None:
    if np.any(are_wrong):
        row = int(np.argmax(are_wrong))
        raise ValueError(f"row {row}: {text(row)}")


def _constexprs(variant: Variant) -> dict[str, object]:
    factors = remainder_factors(variant.lanes)
    return {"LANES": variant.lanes, "GROUPS": variant.groups, "REMAINDER_FACTORS": factors}


def _num_warps(variant: Variant) -> int:
    return variant.lanes * variant.groups // 32


def _specialisation(name: str, variant: Variant) -> Specialisation:
    return Specialisation(
        name=f"crc32[{name}]",
        kernel=_crc_kernel,
        signature={"table_ptr": "*i64", "slab_ptr": "*u8", "slots_ptr": "*i32"},
        constexprs=_constexprs(variant),
        divisible_by_16=("table_ptr", "slab_ptr", "slots_ptr"),
        num_warps=_num_warps(variant),
        loads="b32",
        stores=None,
        max_registers=96,
        operations_per_word=7.5,
    )


SPECIALISATIONS = [
    _specialisation("small", _SMALL),
    _specialisation("large", _LARGE),
    Specialisation(
        name="crc32[patches]",
        kernel=_patch_kernel,
        signature={"table_ptr": "*i64", "npatches": "i32", "slots_ptr": "*i32", "slab_ptr": "*u8"},
        constexprs={"PATCHES": _PATCHES},
        divisible_by_16=("table_ptr", "slots_ptr", "slab_ptr"),
        num_warps=_PATCH_WARPS,
        loads="b32",
        stores="b8",
        max_registers=56,
    ),
]
