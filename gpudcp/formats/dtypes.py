"""The dtypes a checkpoint can hold: how a pickle names them, and which ones widen to which without loss."""

from __future__ import annotations

from functools import cache

import torch

STORAGE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
"""Dtypes that torch pickles by a storage class; every other one is an UntypedStorage with its dtype beside it."""

DTYPES_BY_STORAGE_NAME = {name: dtype for dtype, name in STORAGE_NAMES.items()}

QUANTIZED_DTYPES = frozenset({torch.qint8, torch.quint8, torch.qint32})

# Sub-byte integers, which torch.save has no name for; quantized ones, which torch cannot copy; and raw bits, whose size
# DCP asks torch.iinfo for, in vain.
_UNSAVABLE_NAMES = (
    *(f"{sign}{n}" for sign in ("int", "uint") for n in range(1, 8)),
    *("quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without ``torch.``, as pickles spell it."""
    return str(dtype).removeprefix("torch.")


@cache
def is_savable(dtype: torch.dtype) -> bool:
    """Whether stock DCP can save and load a tensor of this dtype."""
    return dtype_name(dtype) not in _UNSAVABLE_NAMES


def widens_exactly(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of ``source`` is a value of ``target``, so that a cast loses nothing."""
    if source == target:
        return True
    if source == torch.bool:
        # Not every floating-point type: float8_e8m0fnu has no zero.
        return target in _MANTISSA_BITS or target in _INTEGERS
    if source in _INTEGERS and target in _INTEGERS:
        narrow, wide = torch.iinfo(source), torch.iinfo(target)
        return wide.min <= narrow.min and narrow.max <= wide.max
    if source in _MANTISSA_BITS and target in _MANTISSA_BITS:
        low, high = torch.finfo(source), torch.finfo(target)
        return (
            _MANTISSA_BITS[source] <= _MANTISSA_BITS[target]
            and low.max <= high.max
            # The smallest denormal of the narrow type must be a value of the wide one.
            and low.smallest_normal * 2.0 ** -_MANTISSA_BITS[source]
            >= high.smallest_normal * 2.0 ** -_MANTISSA_BITS[target]
        )
    return (source, target) == (torch.complex64, torch.complex128)


_INTEGERS = frozenset(
    {
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)

_MANTISSA_BITS = {
    torch.float64: 52,
    torch.float32: 23,
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}
