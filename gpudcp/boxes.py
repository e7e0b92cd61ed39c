"""Geometry of n-dimensional boxes: integers only, no tensors, no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths, in elements per dimension."""


def row_major_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours along each dimension of a contiguous tensor of these sizes."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def boxes_of_run(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes that cover the row-major elements ``[start, stop)`` of a tensor of these sizes, in row-major order.

    At most two boxes for each dimension and one more: an incomplete first row, whole rows, an incomplete last one.
    """
    if start >= stop:
        return
    if not sizes:
        yield (), ()
        return
    inner = sizes[1:]
    row = prod(inner)
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # all inside one row
        yield from _inside_row(inner, end_whole, start - end_whole * row, stop - end_whole * row)
        return
    if start < first_whole * row:
        yield from _inside_row(inner, first_whole - 1, start - (first_whole - 1) * row, row)
    if first_whole < end_whole:
        yield (first_whole, *(0 for _ in inner)), (end_whole - first_whole, *inner)
    if end_whole * row < stop:
        yield from _inside_row(inner, end_whole, 0, stop - end_whole * row)


def _inside_row(inner: tuple[int, ...], row_index: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, lengths in boxes_of_run(inner, start, stop):
        yield (row_index, *offsets), (1, *lengths)


def extent_of_box(strides: tuple[int, ...], lengths: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided box, both included; 0 for an empty box.

    Strides must not be negative (torch has none).
    """
    if 0 in lengths:
        return 0
    return 1 + sum(stride * (length - 1) for stride, length in zip(strides, lengths, strict=True))


def longest_gap(strides: tuple[int, ...], lengths: tuple[int, ...]) -> int:
    """The most elements that lie side by side between the first and the last of a box, and belong to none of it."""
    longest, extent = 0, 1
    for stride, length in sorted(zip(strides, lengths, strict=True)):
        if length > 1:
            longest = max(longest, stride - extent)
            extent += stride * (length - 1)
    return longest


def is_dense_run(strides: tuple[int, ...], lengths: tuple[int, ...]) -> bool:
    """Whether a strided box, read in row-major order, is one gapless ascending run of memory."""
    step = 1
    for stride, length in zip(reversed(strides), reversed(lengths), strict=True):
        if length == 1:
            continue
        if stride != step:
            return False
        step *= length
    return True
