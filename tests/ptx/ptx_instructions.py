"""What each PTX instruction does to the registers of a `Machine`: those that Triton makes of these kernels.

Written after section 9.7 of NVIDIA's "PTX ISA 8.7". What is not here raises `PtxError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from ptx_program import Instruction, Place, dtype_of

if TYPE_CHECKING:
    from ptx_machine import Machine

Array: TypeAlias = npt.NDArray[Any]
Operation: TypeAlias = Callable[..., None]

WARP = 32
_MEMBERS = "-1"  # of a warp: all


class PtxError(RuntimeError):
    """What a kernel must not do, or what is not known here."""


def _only(instruction: Instruction, *known: str) -> None:
    """There may be no other modifiers before the types."""
    if unknown := set(instruction.modifiers) - set(known):
        raise PtxError(f"unknown here: {', '.join(sorted(unknown))}")


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _elementwise(function: Callable[[Array, Array], Array], *types: str) -> Operation:
    """Of two operands of a type, which is the result's too."""

    def operation(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
        _only(instruction, "lo", "rn", *types)
        if instruction.modifiers[-1] == "f32x2":  # two in a register
            x, y = (np.broadcast_to(machine.read(each, "u8"), machine.nthreads).copy().view("f4") for each in (a, b))
            machine.write(dest, _with_gpus_nans(function(x, y)).view("u8"))
        else:
            result = function(machine.read(a, instruction.dtype), machine.read(b, instruction.dtype))
            machine.write(dest, _with_gpus_nans(result))

    return operation


def _mul(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
    if "wide" in instruction.modifiers:
        machine.write(dest, _factor(machine, instruction, a) * _factor(machine, instruction, b))
    else:
        _elementwise(np.multiply, "s32", "s64", "f32", "f32x2")(machine, instruction, dest, a, b)


def _mad(machine: Machine, instruction: Instruction, dest: str, a: str, b: str, c: str) -> None:
    product = _factor(machine, instruction, a) * _factor(machine, instruction, b)
    machine.write(dest, product + machine.read(c, product.dtype))


def _factor(machine: Machine, instruction: Instruction, operand: str) -> Array:
    _only(instruction, "lo", "wide", "s32", "u32", "s64")
    dtype = instruction.dtype
    return machine.read(operand, dtype).astype(
        f"{dtype.kind}{dtype.itemsize * (1 + ('wide' in instruction.modifiers))}"
    )


def _div(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
    _only(instruction, "s32")
    x, y = machine.read(a, "i4").astype("i8"), machine.read(b, "i4").astype("i8")
    y = np.where(y == 0, 1, y)  # undefined, and no error
    machine.write(dest, (np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))).astype("i4"))


def _neg(machine: Machine, instruction: Instruction, dest: str, a: str) -> None:
    _only(instruction, "s32", "s64")
    machine.write(dest, -machine.read(a, instruction.dtype))


def _abs(machine: Machine, instruction: Instruction, dest: str, a: str) -> None:
    _only(instruction, "f32")
    machine.write(dest, _with_gpus_nans(np.abs(machine.read(a, "f4"))))


def _with_gpus_nans(result: Array) -> Array:
    """Arithmetic of a GPU has one NaN, whatever went in; it is nobody's canonical one."""
    return np.where(np.isnan(result), np.uint32(0x7FFFFFFF).view("f4"), result) if result.dtype == "f4" else result


# --- bits ------------------------------------------------------------------------------------------------------------


def _shl(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
    _only(instruction, "b16", "b32", "b64")
    value, by, most = _shifted(machine, instruction, a, b)
    machine.write(dest, np.where(by > most, 0, value << np.minimum(by, most)).astype(value.dtype))


def _shr(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
    _only(instruction, "s16", "s32", "s64", "u16", "u32", "u64")
    value, by, most = _shifted(machine, instruction, a, b)
    is_gone = (by > most) & (value.dtype.kind == "u")
    machine.write(dest, np.where(is_gone, 0, value >> np.minimum(by, most)).astype(value.dtype))


def _shifted(machine: Machine, instruction: Instruction, a: str, b: str) -> tuple[Array, Array, Array]:
    """The value, how far, and how far at most without losing all of it."""
    dtype = instruction.dtype
    nbits = 8 * dtype.itemsize
    return machine.read(a, dtype), np.minimum(machine.read(b, "u4"), nbits).astype(dtype), np.array(nbits - 1, dtype)


def _bfe(machine: Machine, instruction: Instruction, dest: str, a: str, start: str, length: str) -> None:
    _only(instruction, "s32", "s64", "u32", "u64")
    dtype = instruction.dtype
    above = 8 * dtype.itemsize - int(start) - int(length)
    if above < 0 or int(length) == 0:
        raise PtxError("a field past the register's end")
    value = (machine.read(a, f"u{dtype.itemsize}") << np.array(above, f"u{dtype.itemsize}")).view(dtype)
    machine.write(dest, value >> np.array(above + int(start), dtype))


def _lop3(machine: Machine, instruction: Instruction, dest: str, a: str, b: str, c: str, table: str) -> None:
    _only(instruction, "b32")
    x, y, z = (machine.read(each, "u4") for each in (a, b, c))
    ways = [(x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z) for k in range(8)]
    chosen = [way for k, way in enumerate(ways) if int(table, 0) >> k & 1]
    machine.write(dest, np.bitwise_or.reduce([np.zeros(machine.nthreads, "u4"), *chosen]))


def _prmt(machine: Machine, instruction: Instruction, dest: str, a: str, b: str, selector: str) -> None:
    _only(instruction, "b32")
    both = machine.read(b, "u4").astype("u8") << np.uint64(32) | machine.read(a, "u4")
    result = np.zeros(machine.nthreads, "u4")
    for k in range(4):
        nibble = machine.read(selector, "u4") >> np.uint32(4 * k) & np.uint32(15)
        byte = (both >> (8 * (nibble & 7)).astype("u8") & np.uint64(255)).astype("u4")
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte) << np.uint32(8 * k)
    machine.write(dest, result)


# --- predicates and moves --------------------------------------------------------------------------------------------

_RELATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "ge": np.greater_equal,
    "gt": np.greater,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


def _setp(machine: Machine, instruction: Instruction, dest: str, a: str, b: str) -> None:
    relation, dtype = instruction.modifiers[0], instruction.dtype
    if relation not in _RELATIONS or len(instruction.modifiers) != 2 or (dtype.kind == "f") != (relation == "num"):
        raise PtxError("a comparison unknown here")
    machine.write(dest, _RELATIONS[relation](machine.read(a, dtype), machine.read(b, dtype)))


def _selp(machine: Machine, instruction: Instruction, dest: str, a: str, b: str, predicate: str) -> None:
    dtype = instruction.dtype
    machine.write(dest, np.where(machine.read(predicate, bool), machine.read(a, dtype), machine.read(b, dtype)))


def _mov(machine: Machine, instruction: Instruction, dest: str | list[str], source: str | list[str]) -> None:
    """Also several registers into a wide one, and back."""
    if instruction.modifiers == ("pred",):
        machine.write(str(dest), machine.read(str(source), bool))
        return
    nbytes = instruction.dtype.itemsize
    if isinstance(source, list):
        parts = [np.broadcast_to(machine.read(each, f"u{nbytes // len(source)}"), machine.nthreads) for each in source]
        machine.write(str(dest), np.stack(parts, axis=1).view(f"u{nbytes}")[:, 0])
    elif isinstance(dest, list):
        whole = np.broadcast_to(machine.read(source, f"u{nbytes}"), machine.nthreads).copy()
        for each, part in zip(dest, whole.view(f"u{nbytes // len(dest)}").reshape(-1, len(dest)).T, strict=True):
            machine.write(each, part)
    else:
        machine.write(dest, machine.read(source, f"u{nbytes}"))


def _cvt(machine: Machine, instruction: Instruction, dest: str, a: str) -> None:
    """Between integers, and to floating-point types, rounded to nearest even; denormals stay."""
    *modes, to, of = instruction.modifiers
    target, source = dtype_of(to), dtype_of(of)
    if set(modes) - {"rn"} or (source.kind == "f") > (target.kind == "f") or "f16" in (to, of):
        raise PtxError("a conversion unknown here")
    value = machine.register(a).astype(f"u{source.itemsize}").view(source)  # a register may be wider than its type
    machine.write(dest, value.astype(target))


# --- memory ----------------------------------------------------------------------------------------------------------


def _ld(machine: Machine, instruction: Instruction, dest: str | list[str], place: Place) -> None:
    space, dtype = instruction.modifiers[0], instruction.dtype
    if space == "param":
        if place.nbytes:
            raise PtxError("a part of a parameter")
        value = np.array(machine.parameters[place.base] & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
        machine.write(str(dest), value.view(dtype))
        return
    registers = _vector(instruction, dest)
    memory, at = machine.memory(space, place, dtype, len(registers))
    for k, register in enumerate(registers):
        value = np.zeros(machine.nthreads, dtype)
        value[machine.mask] = memory[at + k].view(dtype)
        machine.write(register, value)


def _st(machine: Machine, instruction: Instruction, place: Place, source: str | list[str]) -> None:
    registers = _vector(instruction, source)
    memory, at = machine.memory(instruction.modifiers[0], place, instruction.dtype, len(registers))
    for k, register in enumerate(registers):
        memory[at + k] = machine.register(register).astype(memory.dtype)[machine.mask]  # its low bytes


def _vector(instruction: Instruction, registers: str | list[str]) -> list[str]:
    """The registers of a load or store, as many as it says."""
    _only(instruction, "global", "shared", "v2", "v4", "b8", "b16", "b32", "b64")
    registers = registers if isinstance(registers, list) else [registers]
    if len(registers) != next((int(each[1:]) for each in instruction.modifiers if each[0] == "v"), 1):
        raise PtxError(f"{len(registers)} registers")
    return registers


def _atom(machine: Machine, instruction: Instruction, _dest: str, place: Place, source: str) -> None:
    """The old value, which no kernel uses, is not written."""
    if instruction.modifiers != ("global", "gpu", "relaxed", "xor", "b32"):
        raise PtxError("atomics unknown here")
    memory, at = machine.memory("global", place, instruction.dtype)
    words, which = np.unique(at, return_inverse=True)
    values = memory[words]
    np.bitwise_xor.at(values, which, machine.read(source, "u4")[machine.mask])
    memory[words] = values


def _ldmatrix(machine: Machine, instruction: Instruction, dests: list[str], place: Place) -> None:
    """Four matrices of 8 rows of 16 bytes; a lane's address is that of a row, and a lane gets four bytes of a row."""
    if instruction.modifiers != ("sync", "aligned", "m8n8", "x4", "shared", "b16") or not machine.mask.all():
        raise PtxError("matrices unknown here")
    memory, at = machine.memory("shared", place, np.dtype("u4"), 4)
    lanes = np.arange(WARP)
    for dest, rows in zip(dests, at.reshape(-1, 4, 8).transpose(1, 0, 2), strict=True):
        machine.write(dest, memory[rows[:, lanes // 4] + lanes % 4].reshape(-1))


# --- warps and blocks ------------------------------------------------------------------------------------------------


def _shfl(machine: Machine, instruction: Instruction, dest: str, source: str, *how: str) -> None:
    by, clamp, members = how
    if instruction.modifiers != ("sync", "bfly", "b32") or (clamp, members) != ("31", _MEMBERS):
        raise PtxError("a shuffle unknown here")
    machine.write(dest, _of_warps(machine, source)[:, np.arange(WARP) ^ int(by)].reshape(-1))


def _redux(machine: Machine, instruction: Instruction, dest: str, source: str, members: str) -> None:
    if instruction.modifiers != ("sync", "xor", "b32") or (machine.read(members, "i4") != int(_MEMBERS)).any():
        raise PtxError("a reduction unknown here")
    machine.write(dest, np.repeat(np.bitwise_xor.reduce(_of_warps(machine, source), axis=1), WARP))


def _of_warps(machine: Machine, source: str) -> Array:
    if not machine.mask.all():
        raise PtxError("some lanes of a warp are missing")
    return machine.read(source, "u4").reshape(-1, WARP)


def _bar(machine: Machine, instruction: Instruction, _number: str) -> None:
    if instruction.modifiers != ("sync",):
        raise PtxError("a barrier unknown here")
    blocks = machine.mask.reshape(-1, machine.program.nthreads)
    if (blocks.any(axis=1) != blocks.all(axis=1)).any():
        raise PtxError("some threads of a block are missing")


_BITS = ("b16", "b32", "b64", "pred")

OPERATIONS: dict[str, Operation] = {
    "abs": _abs,
    "add": _elementwise(np.add, "s32", "s64", "f32", "f32x2"),
    "and": _elementwise(np.bitwise_and, *_BITS),
    "atom": _atom,
    "bar": _bar,
    "bfe": _bfe,
    "cvt": _cvt,
    "div": _div,
    "ld": _ld,
    "ldmatrix": _ldmatrix,
    "lop3": _lop3,
    "mad": _mad,
    "min": _elementwise(np.minimum, "s32", "u32"),
    "mov": _mov,
    "mul": _mul,
    "neg": _neg,
    "or": _elementwise(np.bitwise_or, *_BITS),
    "prmt": _prmt,
    "redux": _redux,
    "selp": _selp,
    "setp": _setp,
    "shfl": _shfl,
    "shl": _shl,
    "shr": _shr,
    "st": _st,
    "sub": _elementwise(np.subtract, "s32", "s64"),
    "xor": _elementwise(np.bitwise_xor, *_BITS),
}
"""By opcode; called with the machine, the instruction and its operands. Branches are the machine's own."""
