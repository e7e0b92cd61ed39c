"""The cast rule of `casts` on the device, by integer operations on the elements' bits. Device functions only.

Bits, because nothing else is the same everywhere: the interpreter's own casts truncate, sm_90's fp8 casts saturate
where the rule overflows, and sm_80 has no e4m3. All floating-point types meet in float32. Where floating-point
arithmetic is used, it neither takes nor gives a denormal number that matters: flushing them would change nothing. Only
the conversions between float32 and float64 keep denormals, which the instructions for them do.
"""

from __future__ import annotations

import triton.language as tl

from gpudcp_kernels.triton_api import device_function

# Kernels see globals only as constexprs.
_FP32_INF = tl.constexpr(0x7F800000)
_FP32_NAN = tl.constexpr(0x7FC00000)
_FP32_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_FP64_INF = tl.constexpr(0x7FF0000000000000)
_FP64_NAN = tl.constexpr(0x7FF8000000000000)
_FP64_MAGNITUDE = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# Half a step above float32's largest number: a tie, which goes to the even one, infinity.
_FP64_OVERFLOW = tl.constexpr(0x47EFFFFFF0000000)
_INT32_MIN = tl.constexpr(-0x80000000)


@device_function
def cast_bits(bits: tl.tensor, SOURCE: tl.constexpr, DEST: tl.constexpr) -> tl.tensor:
    """Elements of SOURCE to elements of DEST, both as signed integers of their width; names as in `casts.Cast`."""
    if SOURCE == DEST:
        return bits
    elif SOURCE == "fp64":
        return from_fp32(_fp64_to_fp32(bits), DEST)
    elif SOURCE == "fp32" or SOURCE == "fp16" or SOURCE == "bf16" or SOURCE == "e4m3fn" or SOURCE == "e5m2":
        return from_fp32(to_fp32(bits, SOURCE), DEST)
    elif SOURCE == "bool":
        return from_fp32(tl.where(bits != 0, 0x3F800000, 0), DEST)
    else:
        return _extend(bits, SOURCE, DEST)


@device_function
def to_fp32(bits: tl.tensor, SOURCE: tl.constexpr) -> tl.tensor:
    """float32 bits, exactly; those of float32 itself keep their NaNs as they are."""
    if SOURCE == "fp16":
        return _widen(bits, 16, 10, 15, 0x7C00)
    elif SOURCE == "bf16":
        return _widen(bits, 16, 7, 127, 0x7F80)
    elif SOURCE == "e4m3fn":
        return _widen(bits, 8, 3, 7, 0x7E)
    elif SOURCE == "e5m2":
        return _widen(bits, 8, 2, 15, 0x7C)
    else:
        return bits


@device_function
def from_fp32(bits: tl.tensor, DEST: tl.constexpr) -> tl.tensor:
    """Rounded; to float32 itself as they are."""
    if DEST == "fp64":
        return _fp32_to_fp64(bits)
    elif DEST == "fp16":
        return _narrow(bits, 16, 10, 15, 0x7C00, 0x7E00).to(tl.int16)
    elif DEST == "bf16":
        return _narrow(bits, 16, 7, 127, 0x7F80, 0x7FC0).to(tl.int16)
    elif DEST == "e4m3fn":
        return _narrow(bits, 8, 3, 7, 0x7E, 0x7F).to(tl.int8)
    elif DEST == "e5m2":
        return _narrow(bits, 8, 2, 15, 0x7C, 0x7F).to(tl.int8)
    else:
        return bits


@device_function
def _widen(
    bits: tl.tensor, WIDTH: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr
) -> tl.tensor:
    """To float32 bits from a narrower type whose magnitudes above LARGEST are NaNs."""
    bits = bits.to(tl.int32)
    magnitude = bits & ((1 << (WIDTH - 1)) - 1)
    sign = (bits << (32 - WIDTH)) & _INT32_MIN
    wide = (magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    if BIAS != 127:
        denormal = (magnitude.to(tl.float32) * (2.0 ** (1 - BIAS - MANTISSA))).to(tl.int32, bitcast=True)
        wide = tl.where(magnitude < (1 << MANTISSA), denormal, wide)
        if WIDTH == 16 or MANTISSA == 2:
            wide = tl.where(magnitude == LARGEST, _FP32_INF, wide)
    return tl.where(magnitude > LARGEST, _FP32_NAN, wide | sign)


@device_function
def _narrow(
    bits: tl.tensor,
    WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
    NAN: tl.constexpr,
) -> tl.tensor:
    """From float32 bits to those of a narrower type, in an int32; what rounds past LARGEST (or infinity) becomes it."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    magnitude = bits & _FP32_MAGNITUDE
    rounded = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
    code = rounded - ((127 - BIAS) << MANTISSA)
    if BIAS != 127:
        # Next to SCALE float32's step is the target's smallest denormal: the addition rounds, and leaves the code.
        NORMAL: tl.constexpr = (128 - BIAS) << 23
        SCALE: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
        SCALE_BITS: tl.constexpr = (151 - BIAS - MANTISSA) << 23
        small = tl.minimum(magnitude, NORMAL).to(tl.float32, bitcast=True)
        denormal = (small + SCALE).to(tl.int32, bitcast=True) - SCALE_BITS
        code = tl.where(magnitude < NORMAL, denormal, code)
    sign = (bits >> (32 - WIDTH)) & (1 << (WIDTH - 1))
    return tl.where(magnitude > _FP32_INF, NAN, tl.minimum(code, LARGEST) | sign)


@device_function
def _fp32_to_fp64(bits: tl.tensor) -> tl.tensor:
    is_nan = (bits & _FP32_MAGNITUDE) > _FP32_INF
    wide = tl.where(is_nan, 0, bits).to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    return tl.where(is_nan, _FP64_NAN, wide)


@device_function
def _fp64_to_fp32(bits: tl.tensor) -> tl.tensor:
    magnitude = bits & _FP64_MAGNITUDE
    overflows = magnitude >= _FP64_OVERFLOW
    number = tl.where(overflows, 0, bits).to(tl.float64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    infinity = ((bits >> 32).to(tl.int32) & _INT32_MIN) | _FP32_INF
    return tl.where(magnitude > _FP64_INF, _FP32_NAN, tl.where(overflows, infinity, number))


@device_function
def _extend(bits: tl.tensor, SOURCE: tl.constexpr, DEST: tl.constexpr) -> tl.tensor:
    """Integers: zeros before unsigned ones, the sign before others."""
    if DEST == "b16":
        wide = bits.to(tl.int16)
    elif DEST == "b32":
        wide = bits.to(tl.int32)
    else:
        wide = bits.to(tl.int64)
    if SOURCE == "u8":
        wide = wide & 0xFF
    elif SOURCE == "u16":
        wide = wide & 0xFFFF
    elif SOURCE == "u32":
        wide = wide & 0xFFFFFFFF
    return wide
