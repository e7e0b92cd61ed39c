"""Runs a kernel's PTX on the host: many blocks' threads in step, one NumPy operation an instruction.

What a GPU would answer with an error, or with whatever it likes, raises `PtxError`: an address that is no multiple of
what is read there, bytes of a fence (`ptx_fences`), shared memory that the block does not have, a barrier that some
threads miss, an instruction that is not known here. That one of two threads does not wait for the other goes unseen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ptx_fences
import ptx_traffic
from ptx_instructions import OPERATIONS, WARP, PtxError
from ptx_program import Instruction, Place, Program

Array = npt.NDArray[Any]

_THREADS_AT_ONCE = 8192
_UNWRITTEN = 0xDEADBEEFDEADBEEF
# All that a process may address, but for the first page.
_FIRST = 4096
_SPACE_NBYTES = 2**47 - 4096
_SPACE: Array = np.ndarray(_SPACE_NBYTES, np.uint8, (ctypes.c_uint8 * _SPACE_NBYTES).from_address(_FIRST))


def launch(program: Program, arguments: Sequence[int], *, nblocks: int, shared_nbytes: int) -> None:
    """Run every block of a one-dimensional grid; ``arguments`` are addresses and integers, those missing are 0."""
    values = dict(zip(program.parameters, [*arguments, *[0] * len(program.parameters)], strict=False))
    step = max(_THREADS_AT_ONCE // program.nthreads, 1)
    with np.errstate(all="ignore"):
        for first in range(0, nblocks, step):
            blocks = np.arange(first, min(first + step, nblocks), dtype=np.uint32)
            Machine(program, values, blocks, nblocks, shared_nbytes).run()


class Machine:
    """Some blocks. Registers hold an unsigned number (or a bool) for each of their threads."""

    def __init__(
        self, program: Program, parameters: dict[str, int], blocks: Array, nblocks: int, shared_nbytes: int
    ) -> None:
        self.program = program
        self.parameters = parameters
        self.nthreads = program.nthreads * len(blocks)
        self.mask: Array = np.ones(self.nthreads, bool)
        """The threads for which the current instruction does something."""
        self._opcode = ""
        self._registers: dict[str, Array] = {
            "%tid.x": np.tile(np.arange(program.nthreads, dtype=np.uint32), len(blocks)),
            "%ctaid.x": np.repeat(blocks, program.nthreads),
            "%nctaid.x": np.full(self.nthreads, nblocks, np.uint32),
        }
        self._shared_nbytes = shared_nbytes
        stride = -(-shared_nbytes // 128) * 128
        self._shared: Array = np.full(stride * len(blocks), 0xA5, np.uint8)
        self._shared_at = np.repeat(np.arange(len(blocks)) * stride, program.nthreads)

    def run(self) -> None:
        """Of threads that went different ways those go on that are furthest behind, until they meet the others."""
        end = len(self.program.instructions)
        at = np.zeros(self.nthreads, np.int64)
        while (here := int(at.min())) < end:
            threads = at == here
            are_together = bool(threads.all())
            while here < end:
                instruction = self.program.instructions[here]
                self.mask = threads & self._guard(instruction)
                if instruction.opcode in ("bra", "ret"):
                    target = end if instruction.opcode == "ret" else self.program.labels[str(instruction.operands[0])]
                    if are_together and (self.mask == self.mask[0]).all():
                        here = target if self.mask[0] else here + 1
                        continue
                    at[threads], at[self.mask] = here + 1, target
                    break
                if self.mask.any():
                    self._do(instruction)
                here += 1
                if not are_together:
                    at[threads] = here
                    break
            else:
                return

    def _guard(self, instruction: Instruction) -> Array | bool:
        if instruction.guard is None:
            return True
        predicate = self.read(instruction.guard.lstrip("!"), bool)
        return ~predicate if instruction.guard[0] == "!" else predicate

    def _do(self, instruction: Instruction) -> None:
        self._opcode = instruction.opcode
        try:
            OPERATIONS[instruction.opcode](self, instruction, *instruction.operands)
        except (PtxError, KeyError, ValueError, AssertionError) as err:
            raise PtxError(f"{instruction.text!r}: {type(err).__name__} {err}") from err

    # --- registers ---------------------------------------------------------------------------------------------------

    def read(self, operand: str, dtype: npt.DTypeLike) -> Array:
        """A register or a number for all threads, as of a type."""
        dtype = np.dtype(dtype)
        value = self.register(operand) if operand[0] == "%" else _number(operand, dtype)
        assert value.dtype.itemsize == dtype.itemsize, f"{operand} of {value.dtype} as {dtype}"
        return value.view(dtype)

    def register(self, name: str) -> Array:
        """As it was written. What nobody wrote has a value on which nothing that counts may depend."""
        if name not in self._registers:
            self._registers[name] = np.full(self.nthreads, _UNWRITTEN, np.uint64).astype(
                f"u{self.program.width(name)}" if self.program.width(name) else bool
            )
        return self._registers[name]

    def write(self, name: str, value: Array) -> None:
        """For the threads of the mask. A narrower value is widened by its sign."""
        if name == "_":
            return
        value = self._of_width(np.ascontiguousarray(np.broadcast_to(value, (self.nthreads,))), name)
        self._registers[name] = value if self.mask.all() else np.where(self.mask, value, self.register(name))

    def _of_width(self, value: Array, name: str) -> Array:
        nbytes = self.program.width(name)
        if nbytes == 0:
            return value.astype(bool)
        assert value.dtype.itemsize <= nbytes, f"{value.dtype} into {name}"
        return (value if value.dtype.kind == "f" else value.astype(f"{value.dtype.kind}{nbytes}")).view(f"u{nbytes}")

    # --- memory ------------------------------------------------------------------------------------------------------

    def memory(self, space: str, place: Place, dtype: np.dtype[Any], count: int = 1) -> tuple[Array, Array]:
        """The memory as numbers of a type, and which of them is the first of ``count`` for each thread of the mask."""
        nbytes = dtype.itemsize * count
        if space == "global":
            addresses = (self.read(place.base, np.int64) + place.nbytes)[self.mask]
            memory, at = _SPACE, addresses - _FIRST
        else:
            start = 0 if place.base == "global_smem" else self.read(place.base, np.uint32).astype(np.int64)
            addresses = np.broadcast_to(start + place.nbytes, (self.nthreads,))[self.mask]
            if ((addresses < 0) | (addresses + nbytes > self._shared_nbytes)).any():
                raise PtxError(f"outside the {self._shared_nbytes} bytes of shared memory")
            memory, at = self._shared, addresses + self._shared_at[self.mask]
        if (addresses % nbytes).any():
            raise PtxError(f"addresses that are no multiples of {nbytes}")
        if space == "global":
            ptx_fences.check(addresses, nbytes)
            ptx_traffic.note(self._opcode, np.flatnonzero(self.mask) // WARP, addresses)
        whole = len(memory) // dtype.itemsize * dtype.itemsize
        return memory[:whole].view(f"u{dtype.itemsize}"), at // dtype.itemsize


def _number(operand: str, dtype: np.dtype[Any]) -> Array:
    unsigned = dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")
    if operand == "global_smem":
        return np.zeros((), unsigned)
    number = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
    return np.array(number & (1 << 8 * dtype.itemsize) - 1).astype(unsigned)
