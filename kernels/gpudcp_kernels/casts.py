"""The rule by which elements are cast, the same on every executor, and its reference in torch. No kernel, no triton.

**The rule.**

- Castable are: all of float64, float32, float16, bfloat16, float8_e4m3fn and float8_e5m2 to one another; bool to all of
  these and to every integer; integers to every integer type that holds all their values; and every dtype of 1, 2, 4, 8
  or 16 bytes to itself.
- A dtype to itself moves bits: NaN payloads, signs of NaNs and denormals stay what they are.
- Between two floating-point dtypes a NaN becomes *the* NaN of the target, positive and quiet, also where the target is
  wider: see `CANONICAL_NANS`.
- Every other value is rounded to nearest, ties to even, denormals included. float64 goes to the 16-bit and 8-bit types
  by way of float32, as torch does: two roundings, which differ from one for values next to a tie.
- float8_e4m3fn saturates: what rounds past 448, infinities too, becomes 448 with its sign. The other types overflow to
  infinity, float8_e5m2 too.
- Integers and bool keep their value. A bool holds 0 or 1.

In every value that is not NaN this is what torch's ``.to()`` does on the CPU (torch 2.13), which the tests compare
exhaustively for sources of 8 and 16 bits.

**Where torch's ``.to()`` differs**, on the CPU:

- In NaNs. To bfloat16 they become 0x7fc0 or 0xffff; to the other types most keep their sign and as much of the payload
  as fits; and for some pairs the same NaN becomes one or the other, as it meets torch's vectorised loop or its scalar
  end.
- In what float8_e4m3fn saturates, up to torch 2.11: there it becomes a NaN with its sign, a few values next to 464 in
  some pairs 448 (saturation came with pytorch/pytorch#178817; 2.12 has not been run). So `in_range_of` goes before
  every ``.to()`` that shall follow the rule.

What ``.to()`` does on CUDA has not been run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

FLOATS: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e5m2: "e5m2",
}
"""The floating-point dtypes of the rule, and what the kernels call them."""

CANONICAL_NANS: dict[torch.dtype, int] = {
    torch.float64: 0x7FF8000000000000,
    torch.float32: 0x7FC00000,
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7F,
}
"""The bits of the one NaN that a cast makes."""

_INTEGERS: dict[torch.dtype, str] = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.uint16: "u16",
    torch.int16: "i16",
    torch.uint32: "u32",
    torch.int32: "i32",
    torch.uint64: "u64",
    torch.int64: "i64",
}

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_E4M3FN_MAX = 448.0

_SUB_BYTE_NAMES = tuple(f"torch.{sign}{nbits}" for sign in ("int", "uint") for nbits in range(1, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """A pair of dtypes as the kernels know it: several pairs are one there, such as all moves of 4-byte elements."""

    source: str
    """A name of `FLOATS`, "bool", "u8" to "i32" for integers that widen, or "b8" to "b64" for bits that move."""
    dest: str
    source_nbytes: int
    """Of an element."""
    dest_nbytes: int

    @property
    def is_move(self) -> bool:
        """Whether the elements' bits stay what they are."""
        return self.source == self.dest


@cache
def cast_of(source: torch.dtype, dest: torch.dtype) -> Cast:
    """The cast that takes elements of one dtype to the other. Elements of 16 bytes are two of 8.

    Raises:
        ValueError: the rule has no such cast.
    """
    names = _names_of(source, dest)
    if names is None:
        raise ValueError(f"no kernel casts {source} to {dest}")
    nbytes = min(source.itemsize, 8), min(dest.itemsize, 8)
    return Cast(source=names[0], dest=names[1], source_nbytes=nbytes[0], dest_nbytes=nbytes[1])


def is_castable(source: torch.dtype, dest: torch.dtype) -> bool:
    """Whether the kernels cast this pair; see the rule."""
    return _names_of(source, dest) is not None


@cache
def distinct_casts() -> tuple[Cast, ...]:
    """Every cast that `cast_of` can return."""
    dtypes = (*FLOATS, *_INTEGERS, torch.bool)
    pairs = (pair for pair in product(dtypes, dtypes) if is_castable(*pair))
    return tuple(dict.fromkeys(cast_of(source, dest) for source, dest in pairs))


def cast_reference(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of a CPU tensor by the rule: the tensor itself where its dtype does not change.

    Raises:
        ValueError: the rule has no such cast.
    """
    cast_of(tensor.dtype, dtype)
    if tensor.dtype == dtype:
        return tensor
    result = in_range_of(dtype, tensor).to(dtype)
    if tensor.dtype in FLOATS:
        result.view(_CARRIERS[dtype.itemsize])[tensor.isnan()] = CANONICAL_NANS[dtype]
    return result


def in_range_of(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a floating-point dtype, without the values that torch's cast to ``dtype`` may fail to saturate.

    For any other ``dtype`` than float8_e4m3fn it is the tensor itself. NaNs stay.
    """
    if dtype != torch.float8_e4m3fn or (tensor.is_cpu and _saturates_on_cpu()):
        return tensor
    # Torch clamps no float8; what it widens to is exact. What is between 448 and 464 would be rounded to 448 anyway.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return wide.clamp(-_E4M3FN_MAX, _E4M3FN_MAX)


@cache
def _saturates_on_cpu() -> bool:
    """Of this torch. Asked, as clamping takes as long as the cast itself."""
    return not bool(torch.full((64,), 1000.0, device="cpu").to(torch.float8_e4m3fn).float().isnan().any())


@cache
def _names_of(source: torch.dtype, dest: torch.dtype) -> tuple[str, str] | None:
    if source == dest:
        if source.itemsize not in (1, 2, 4, 8, 16) or str(source) in _SUB_BYTE_NAMES:
            return None
        bits = f"b{8 * min(source.itemsize, 8)}"
        return bits, bits
    if source in FLOATS and dest in FLOATS:
        return FLOATS[source], FLOATS[dest]
    if source == torch.bool and dest in FLOATS:
        return "bool", FLOATS[dest]
    if dest in _INTEGERS and (source == torch.bool or (source in _INTEGERS and _holds(dest, source))):
        # A target's sign does not matter: what is stored are bits.
        same_width = source.itemsize == dest.itemsize
        return ("b8", "b8") if same_width else (_INTEGERS.get(source, "u8"), f"b{8 * dest.itemsize}")
    return None


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one integer type is a value of the other."""
    low, high = torch.iinfo(narrow), torch.iinfo(wide)
    return high.min <= low.min and low.max <= high.max
