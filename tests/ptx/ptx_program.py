"""PTX as Triton prints it, taken apart: a kernel's parameters, registers, labels and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Operand: TypeAlias = "str | list[str] | Place"
"""A register, a number or a label; several in braces; or what stands in brackets."""


@dataclass(frozen=True, slots=True)
class Place:
    """In memory: bytes after the address that a register holds, or after a name."""

    base: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Instruction:
    text: str
    guard: str | None
    """The predicate without which it does nothing for a thread; with a "!" in front where it must be false."""
    opcode: str
    modifiers: tuple[str, ...]
    """What follows the opcode, dots aside."""
    operands: list[Operand]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of its last modifier: that of its operands, and mostly of its result."""
        return dtype_of(self.modifiers[-1])


@dataclass(frozen=True, slots=True)
class Program:
    nthreads: int
    """Of a block."""
    parameters: tuple[str, ...]
    """All of them, also those of Triton's own behind the kernel's."""
    widths: dict[str, int]
    """Bytes of the registers whose names begin so; 0 for predicates."""
    instructions: list[Instruction]
    labels: dict[str, int]
    """Which instruction is next."""

    def width(self, register: str) -> int:
        return self.widths[register.rstrip("0123456789")]


def dtype_of(name: str) -> np.dtype[np.generic]:
    """Of a PTX type such as "s32"; plain bits are unsigned. Raises ValueError where it is none."""
    if name == "pred":
        return np.dtype(bool)
    if re.fullmatch(r"[busf]\d+", name) is None:
        raise ValueError(f"unknown here: {name}")
    return np.dtype(f"{'u' if name[0] == 'b' else name[0].replace('s', 'i')}{int(name[1:]) // 8}")


def parse(ptx: str) -> Program:
    """The one kernel in it.

    Raises:
        ValueError: a line that is no instruction, label or directive.
    """
    entry = re.search(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    nthreads = re.search(r"\.reqntid (\d+)", ptx)
    if entry is None or nthreads is None:
        raise ValueError("no kernel with a known number of threads")
    body = ptx[ptx.index("{", entry.end()) + 1 : ptx.index("$L__func_end0")]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _lines(body):
        if line.startswith("$"):
            labels[line.rstrip(":")] = len(instructions)
        else:
            instructions.append(_instruction(line))
    return Program(
        nthreads=int(nthreads[1]),
        parameters=tuple(re.findall(rf"{entry[1]}_param_\d+", entry[2])),
        widths={
            prefix: 0 if kind == "pred" else int(kind[1:]) // 8
            for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%\w+)<\d+>;", body)
        },
        instructions=instructions,
        labels=labels,
    )


def _lines(body: str) -> Iterator[str]:
    """Labels and instructions. What inline assembly stands between, comments and braces, is left out."""
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if line and line not in ("{", "}") and not line.startswith("."):
            yield line.rstrip(";")


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z]\w*)((?:(?:\.|::)\w+)*)(?:\s+(.*))?", text)
    if found is None:
        raise ValueError(f"no instruction: {text!r}")
    modifiers = tuple(filter(None, re.split(r"\.|::", found[3])))
    return Instruction(text, found[1], found[2], modifiers, list(_operands(found[4] or "")))


def _operands(text: str) -> Iterator[Operand]:
    for token in re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", text):
        if token[0] == "{":
            yield [part.strip() for part in token[1:-1].split(",")]
        elif token[0] == "[":
            base, _, nbytes = token[1:-1].partition("+")
            yield Place(base.strip(), int(nbytes or 0))
        else:
            yield token
