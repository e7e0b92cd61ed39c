"""Fixed-width rows of opcodes and numbers, filled by NumPy block by block.

Opcodes: Python's pickletools, protocol 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudcp.arrays import Column, Int64

GET = b"j"  # LONG_BINGET, then the memo index as 4 bytes
_GET_BYTE = b"h"  # BINGET, then the memo index as 1 byte

ROWS_AT_ONCE = 1 << 12
"""Filled column by column while they are in the core's cache."""


def get(index: int) -> bytes:
    """What fetches an object from the memo."""
    return _GET_BYTE + index.to_bytes(1, "little") if index < 256 else GET + index.to_bytes(4, "little")


class Numbers(NamedTuple):
    """A column of rows: little-endian numbers of one type, given for a block of the rows."""

    dtype: str
    of: Callable[[Any], Column]


def integers(values: Column) -> tuple[bytes | Numbers, ...]:
    """An opcode and a column: integers in few bytes, the same for all, where none is negative."""
    most = int(values.max(initial=0))
    if most < 1 << 16:
        return b"M", Numbers("<u2", values.__getitem__)  # BININT2
    if most < 1 << 31:
        return b"J", Numbers("<i4", values.__getitem__)  # BININT, which is signed
    if most < 1 << 32:
        return b"\x8a\x05", Numbers("<u4", values.__getitem__), b"\0"  # LONG1 of 5 bytes, two's complement
    return b"\x8a\x08", Numbers("<i8", values.__getitem__)


def fetched(gets: Column, ids: Column | None = None) -> tuple[bytes | Numbers, ...]:
    """An opcode and a column: what has these indices in the memo, or those that the numbers ``ids`` say."""
    if len(gets) and int(gets.min()) == int(gets.max()):
        return (get(int(gets[0])),)
    return GET, Numbers("<u4", gets.__getitem__ if ids is None else lambda rows: gets[ids[rows]])


class Rows:
    """Rows of equal length: constants and columns of numbers side by side.

    Args:
        rows: the numbers that the columns are asked for, block by block.
        parts: what a row has.
    """

    def __init__(self, rows: Int64 | range, *parts: bytes | Numbers) -> None:
        self._rows = rows
        self._columns = [part for part in parts if isinstance(part, Numbers)]
        template, offsets = bytearray(), []
        for part in parts:
            if isinstance(part, Numbers):
                offsets.append(len(template))
                template += bytes(int(part.dtype[2:]))
            else:
                template += part
        self.width = len(template)
        self.nbytes = len(rows) * self.width
        self._template = bytes(template)
        names, formats = [str(number) for number in range(len(offsets))], [each.dtype for each in self._columns]
        self._fields: Any = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self.width})

    def block(self, first: int, end: int) -> NDArray[np.uint8]:
        """These rows, end excluded: n x width."""
        at = slice(first, end) if isinstance(self._rows, range) else self._rows[first:end]
        filled = np.empty(end - first, dtype=f"V{self.width}")
        filled[:] = self._template
        fields = filled.view(self._fields)
        for name, column in zip(self._fields.names, self._columns, strict=True):
            fields[name] = column.of(at)
        return filled.view(np.uint8).reshape(end - first, self.width)

    def blocks(self) -> Iterator[memoryview]:
        """All bytes, in memory of their own."""
        for first in range(0, len(self._rows), ROWS_AT_ONCE):
            yield self.block(first, min(first + ROWS_AT_ONCE, len(self._rows))).reshape(-1).data
