"""Boxes of memory, their places in a slab, and the tables in which they travel to a kernel. No kernel, no triton.

A launch covers every row in one 1-d grid: the table begins with one entry a program (row << 32 | block of the row),
then come the rows themselves, `row_width` numbers each. Rows of one dimension need the first five numbers only:

    0  address in memory       5  length of dimension 2      10  file stride of dimension 3
    1  address in the slab     6  stride of dimension 2      11  file stride of dimension 2
    2  elements                7  length of dimension 1      12  file stride of dimension 1
    3  length of dimension 3   8  stride of dimension 1      13  file stride of dimension 0
    4  stride of dimension 3   9  stride of dimension 0

Dimension 3 is the innermost; strides are of the memory side, in elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Int64s: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

MAX_DIMS = 4
"""Of a row in a kernel, after adjacent dimensions are merged. Boxes of more become several rows."""

SLAB_PADDING_NBYTES = 32
"""Bytes after the end of a slab that kernels may read (and never use). Its owner allocates them."""

ALIGNMENT_NBYTES = 16
"""Of the widest load and store."""

# Kernels count the elements of a row with 32 bits.
_MAX_NUMEL = 2**31 - 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Strided boxes in memory, one a row, and where their elements lie in a slab: row-major from `byte_offsets` on."""

    addresses: Int64s
    """(n,) of each box's first element. What they point to must stay alive until the kernel ran."""
    byte_offsets: Int64s
    """(n,) into the slab."""
    lengths: Int64s
    """(n, d) elements; boxes of fewer dimensions have ones."""
    strides: Int64s
    """(n, d) elements, in memory."""

    def __post_init__(self) -> None:
        nrows = len(self.addresses)
        if self.addresses.shape != (nrows,) or self.byte_offsets.shape != (nrows,):
            raise ValueError(
                f"addresses {self.addresses.shape} and byte offsets {self.byte_offsets.shape} are no columns"
            )
        if self.lengths.ndim != 2 or self.lengths.shape != self.strides.shape or len(self.lengths) != nrows:
            raise ValueError(f"{nrows} addresses, lengths of shape {self.lengths.shape}, strides {self.strides.shape}")
        for name in ("addresses", "byte_offsets", "lengths", "strides"):
            dtype = getattr(self, name).dtype
            if dtype != np.int64:
                raise ValueError(f"{name} are {dtype}, not int64")

    def __len__(self) -> int:
        return len(self.addresses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Boxes ready for a kernel: none empty, adjacent dimensions merged, at most `MAX_DIMS` left."""

    addresses: Int64s
    """(n,) in memory."""
    file_addresses: Int64s
    """(n,) in the slab."""
    numels: Int64s
    lengths: Int64s
    """(n, 1) or (n, MAX_DIMS); shorter boxes have ones in front."""
    strides: Int64s
    file_strides: Int64s | None
    """None: every row is row-major in the slab."""

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, which: Bools) -> Rows:
        """The rows where the mask is true."""
        if which.all():
            return self
        return Rows(
            addresses=self.addresses[which],
            file_addresses=self.file_addresses[which],
            numels=self.numels[which],
            lengths=self.lengths[which],
            strides=self.strides[which],
            file_strides=None if self.file_strides is None else self.file_strides[which],
        )

    def come_in_units(self, unit: int, *, memory_alignment_nbytes: int) -> Bools:
        """Which rows are runs of ``unit`` elements that begin aligned in memory and lie there without gaps.

        Rows of one dimension may end with a part of a unit.
        """
        are_units: Bools = (self.addresses & (memory_alignment_nbytes - 1) == 0) & (self.strides[:, -1] == 1)
        if self.lengths.shape[1] > 1:
            odd = (self.lengths[:, -1] % unit != 0) | (self.strides[:, :-1] % unit != 0).any(axis=1)
            are_units &= (self.lengths[:, -1] == self.numels) | ~odd
        if self.file_strides is not None:
            are_units &= self._are_row_major(self.file_strides)
        return are_units

    def dense_if_row_major(self) -> Rows:
        """Without file strides, if those say no more than that every row is row-major in the slab."""
        if self.file_strides is None or not self._are_row_major(self.file_strides).all():
            return self
        return replace(self, file_strides=None)

    def _are_row_major(self, file_strides: Int64s) -> Bools:
        are_row_major: Bools = ((file_strides == row_major_strides(self.lengths)) | (self.lengths == 1)).all(axis=1)
        return are_row_major


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What one launch reads, as numbers."""

    numbers: Int64s
    nprograms: int
    row_width: int


def rows_of(
    boxes: Boxes, slab: torch.Tensor, *, memory_nbytes: int, file_nbytes: int, file_strides: Int64s | None = None
) -> Rows:
    """The rows of boxes whose elements have so many bytes in memory and in the slab.

    Args:
        boxes: where the elements are.
        slab: flat uint8.
        memory_nbytes: of an element in memory; 16 where an element is two of 8.
        file_nbytes: likewise in the slab.
        file_strides: (n, d) elements, in the slab; None for row-major. Not negative.

    Raises:
        ValueError: a row lies outside the slab, has an address of zero, a negative length, or too many elements.
    """
    check_rows(boxes, slab, memory_nbytes=memory_nbytes, file_nbytes=file_nbytes, file_strides=file_strides)
    lengths, strides = boxes.lengths, boxes.strides
    if memory_nbytes == 16 or not lengths.shape[1]:
        # Elements of 16 bytes are pairs of 8, numbers without a dimension are lines of one: one more dimension.
        parts = 2 if memory_nbytes == 16 else 1
        lengths, strides = _with_dimension(lengths, parts), _with_dimension(strides * parts, 1)
        file_strides = None if file_strides is None else _with_dimension(file_strides * parts, 1)
        memory_nbytes, file_nbytes = min(memory_nbytes, 8), min(file_nbytes, 8)
    numels = np.prod(lengths, axis=1)
    rows = Rows(
        addresses=boxes.addresses,
        file_addresses=boxes.byte_offsets + slab.data_ptr(),
        numels=numels,
        lengths=lengths,
        strides=strides,
        file_strides=file_strides,
    )
    return collapse(rows.take(numels != 0), memory_nbytes=memory_nbytes, file_nbytes=file_nbytes)


def collapse(rows: Rows, *, memory_nbytes: int, file_nbytes: int) -> Rows:
    """Merge the dimensions that are adjacent on both sides, then cut rows that have more than `MAX_DIMS` left.

    What comes back has one dimension if every row has, else `MAX_DIMS`; and no file strides if none is needed.
    """
    rows = rows.dense_if_row_major()
    if (rows.lengths[:, :-1] != 1).any():
        rows = _merge(rows)
    are_lines = (rows.lengths[:, :-1] == 1).all(axis=1)
    inner_strides = np.where(rows.lengths[:, -1] == 1, 1, rows.strides[:, -1])
    if are_lines.all() and rows.file_strides is None:
        return replace(rows, lengths=rows.lengths[:, -1:], strides=inner_strides[:, None])
    rows = replace(rows, strides=np.column_stack((rows.strides[:, :-1], inner_strides)))
    if (rows.lengths[:, :-MAX_DIMS] != 1).any():
        rows = _cut(rows, memory_nbytes=memory_nbytes, file_nbytes=file_nbytes)
    return _of_max_dims(rows)


def table_of(rows: Rows, *, unit: int, units_per_program: int) -> Table:
    """The table of a launch whose programs handle so many units of so many elements; a row's rest goes to its first."""
    lengths, strides = rows.lengths.T, rows.strides.T
    columns = [rows.addresses, rows.file_addresses, rows.numels, lengths[-1], strides[-1]]
    if len(lengths) > 1:
        columns += [lengths[2], strides[2], lengths[1], strides[1], strides[0]]
    if rows.file_strides is not None:
        columns += [*rows.file_strides.T[::-1]]
    return table_of_columns(columns, units=rows.numels // unit, units_per_program=units_per_program)


def table_of_columns(columns: Sequence[Int64s], *, units: Int64s, units_per_program: int) -> Table:
    """A table of rows of these numbers, each with so many units of work."""
    nrows, row_width = len(units), len(columns)
    blocks = np.maximum(-(-units // units_per_program), 1)
    ends = np.cumsum(blocks)
    nprograms = int(ends[-1])
    numbers = np.empty(nprograms + nrows * row_width, np.int64)
    # Program p works on block p - (first program of its row).
    first_entries = (np.arange(nrows, dtype=np.int64) << 32) - (ends - blocks)
    np.add(np.repeat(first_entries, blocks), np.arange(nprograms), out=numbers[:nprograms])
    for column, place in zip(columns, numbers[nprograms:].reshape(nrows, row_width).T, strict=True):
        place[:] = column
    return Table(numbers=numbers, nprograms=nprograms, row_width=row_width)


def row_major_strides(lengths: Int64s) -> Int64s:
    """Of boxes without gaps, (n, d)."""
    after = np.cumprod(lengths[:, :0:-1], axis=1)[:, ::-1]
    return np.column_stack((after, np.ones(len(lengths), np.int64)))


def to_device(tables: Sequence[Table], device: torch.device) -> list[torch.Tensor]:
    """The tables' numbers on a device, one tensor each, by one copy on the current stream that nobody waits for."""
    starts = np.cumsum([0, *(-(-table.numbers.size // 2) * 2 for table in tables)])  # 16-byte aligned, each
    host = torch.empty(int(starts[-1]), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    numbers = host.numpy()
    for table, start in zip(tables, starts, strict=False):
        numbers[start : start + table.numbers.size] = table.numbers
    # Host memory that is pinned and copied from is not reused before the copy is done: its allocator sees to it.
    everything = host.to(device, non_blocking=True)
    return [everything[start : start + table.numbers.size] for table, start in zip(tables, starts, strict=False)]


def on_device_of(slab: torch.Tensor, *, on_host: bool) -> AbstractContextManager[Any]:
    """The guard under which kernels are launched.

    Raises:
        ValueError: the slab is not flat bytes, or not in memory that the kernels of this process can reach.
    """
    if slab.dtype != torch.uint8 or slab.ndim != 1 or not slab.is_contiguous():
        raise ValueError(f"a slab is flat uint8, not {slab.dtype} of shape {tuple(slab.shape)}")
    if slab.device.type != ("cpu" if on_host else "cuda"):
        where = "on the host" if on_host else "on a GPU"
        raise ValueError(f"the slab is on {slab.device}, the kernels run {where}")
    return nullcontext() if on_host else torch.cuda.device(slab.device)


def check_rows(
    boxes: Boxes, slab: torch.Tensor, *, memory_nbytes: int, file_nbytes: int, file_strides: Int64s | None
) -> Int64s:
    """How many elements each row has. Raises ValueError, with the row and the numbers, where `rows_of` says so."""
    lengths, addresses, begins = boxes.lengths, boxes.addresses, boxes.byte_offsets
    _refuse((lengths < 0).any(axis=1), lambda row: f"lengths {lengths[row].tolist()}")
    numels: Int64s = np.prod(lengths, axis=1)
    spans = numels
    are_filled = numels > 0
    if file_strides is not None:
        if file_strides.shape != lengths.shape or file_strides.dtype != np.int64:
            raise ValueError(f"file strides are {file_strides.dtype} {file_strides.shape}, lengths {lengths.shape}")
        _refuse((file_strides < 0).any(axis=1), lambda row: f"file strides {file_strides[row].tolist()}")
        spans = np.where(are_filled, ((lengths - 1) * file_strides).sum(axis=1) + 1, 0)
    _refuse(numels > _MAX_NUMEL, lambda row: f"{numels[row]} elements, at most {_MAX_NUMEL} fit")
    _refuse(are_filled & (addresses <= 0), lambda row: f"address {addresses[row]} of {numels[row]} elements")
    alignment = min(memory_nbytes, 8)
    misplaced = are_filled & (addresses % alignment != 0)
    _refuse(misplaced, lambda row: f"address {addresses[row]:#x} is not a multiple of {alignment}")
    ends = begins + spans * file_nbytes
    outside = (begins < 0) | (ends > slab.numel())
    _refuse(outside, lambda row: f"bytes {begins[row]} to {ends[row]}, the slab has {slab.numel()}")
    return numels


def check_padding(slab: torch.Tensor) -> None:
    """Raise ValueError unless the slab's storage goes on for `SLAB_PADDING_NBYTES` after it."""
    after = slab.untyped_storage().nbytes() - slab.storage_offset() - slab.numel()
    if after < SLAB_PADDING_NBYTES:
        raise ValueError(f"the slab is followed by {after} bytes, kernels may read {SLAB_PADDING_NBYTES}")


def _merge(rows: Rows) -> Rows:
    """Drop dimensions of length one and merge those that lie without a gap on both sides; what is left stands right."""
    n, d = rows.lengths.shape
    sides = [rows.strides] if rows.file_strides is None else [rows.strides, rows.file_strides]
    lengths, strides = np.ones((n, d), np.int64), [np.zeros((n, d), np.int64) for _ in sides]
    every, at = np.arange(n), np.full(n, d - 1)
    length, steps = rows.lengths[:, -1], [side[:, -1] for side in sides]
    for j in range(d - 2, -1, -1):
        outer, outer_steps = rows.lengths[:, j], [side[:, j] for side in sides]
        is_gapless = np.logical_and.reduce([o == s * length for o, s in zip(outer_steps, steps, strict=True)])
        starts_new = ~is_gapless & (outer != 1) & (length != 1)
        lengths[every, at] = length
        for side, step in zip(strides, steps, strict=True):
            side[every, at] = step
        at = at - starts_new
        takes_outer = starts_new | (length == 1)
        length = np.where(starts_new, outer, length * outer)
        steps = [np.where(takes_outer, o, s) for o, s in zip(outer_steps, steps, strict=True)]
    lengths[every, at] = length
    for side, step in zip(strides, steps, strict=True):
        side[every, at] = step
    file_strides = None if rows.file_strides is None else strides[1]
    return replace(rows, lengths=lengths, strides=strides[0], file_strides=file_strides)


def _cut(rows: Rows, *, memory_nbytes: int, file_nbytes: int) -> Rows:
    """One row for every index into the outer dimensions, those before the last `MAX_DIMS`."""
    outer, inner = rows.lengths[:, :-MAX_DIMS], rows.lengths[:, -MAX_DIMS:]
    file_strides = row_major_strides(rows.lengths) if rows.file_strides is None else rows.file_strides
    pieces = np.prod(outer, axis=1)
    row = np.repeat(np.arange(len(rows)), pieces)
    index = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    addresses, file_addresses = rows.addresses[row], rows.file_addresses[row]
    for j in range(outer.shape[1] - 1, -1, -1):
        index, position = np.divmod(index, outer[row, j])
        addresses += position * rows.strides[row, j] * memory_nbytes
        file_addresses += position * file_strides[row, j] * file_nbytes
    return Rows(
        addresses=addresses,
        file_addresses=file_addresses,
        numels=np.prod(inner, axis=1)[row],
        lengths=inner[row],
        strides=rows.strides[row, -MAX_DIMS:],
        file_strides=None if rows.file_strides is None else rows.file_strides[row, -MAX_DIMS:],
    )


def _of_max_dims(rows: Rows) -> Rows:
    missing = MAX_DIMS - rows.lengths.shape[1]
    if missing <= 0:
        last = np.s_[:, -MAX_DIMS:]
        file_strides = None if rows.file_strides is None else rows.file_strides[last]
        return replace(rows, lengths=rows.lengths[last], strides=rows.strides[last], file_strides=file_strides)
    ones, zeros = np.ones((len(rows), missing), np.int64), np.zeros((len(rows), missing), np.int64)
    return replace(
        rows,
        lengths=np.column_stack((ones, rows.lengths)),
        strides=np.column_stack((zeros, rows.strides)),
        file_strides=None if rows.file_strides is None else np.column_stack((zeros, rows.file_strides)),
    )


def _with_dimension(columns: Int64s, value: int) -> Int64s:
    return np.column_stack((columns, np.full(len(columns), value, np.int64)))


def _refuse(are_wrong: npt.NDArray[np.bool_] | np.bool_, text: Callable[[int], str]) -> None:
    if are_wrong.any():
        row = int(np.argmax(are_wrong))
        raise ValueError(f"row {row}: {text(row)}")
