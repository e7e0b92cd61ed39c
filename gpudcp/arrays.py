"""Columns of numbers: how they are packed for a message, and which of their rows are the same."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Column = NDArray[Any]
Path = tuple[Any, ...]

_Hashes = NDArray[np.uint64]

NONE = -1
"""In a column of numbers: there is none."""


PackedArray = tuple[str, tuple[int, ...], bytes | int]
"""Type of the elements in the bytes, shape, and the bytes, which may be compressed; or what every element is."""

PackedTable = tuple[str, list[int], bytes]
"""Type of the numbers in the bytes, and what is added to those of each column."""
PackedRuns = tuple[tuple[int, ...], tuple[int, ...]]
"""Of runs of numbers: what each begins with; where each begins, and the last one ends."""

_MOST_RUNS = 16
_COMPRESSED_NBYTES = 1 << 10
"""From here on, zlib takes less time than it takes to set it up."""


def narrowed(array: Column) -> Column:
    """The same integers in the narrowest type that holds them all."""
    return array.astype(_narrowest(*_range(array)))


def _range(array: Column) -> tuple[int, int]:
    # The ufuncs themselves, as most arrays are so small that the methods around them cost more.
    return (int(np.minimum.reduce(array, None)), int(np.maximum.reduce(array, None))) if array.size else (0, 0)


def _narrowest(low: int, high: int) -> str:
    is_signed = low < 0
    bits = max(low if low >= 0 else ~low, high if high >= 0 else ~high).bit_length() + is_signed
    return ("<i" if is_signed else "<u") + ("1" if bits <= 8 else "2" if bits <= 16 else "4" if bits <= 32 else "8")


def pack_array(array: Column) -> PackedArray:
    """An array of integers in few bytes: the narrowest type that holds them, compressed where that is shorter."""
    low, high = _range(array)
    narrow = _narrowest(low, high)
    if low == high:
        return narrow, array.shape, low
    data = array.astype(narrow).tobytes()
    if len(data) >= _COMPRESSED_NBYTES:
        data = min(data, zlib.compress(data, 1), key=len)
    return narrow, array.shape, data


def unpack_array(packed: PackedArray, dtype: type[Any]) -> Column:
    """The array, with elements of ``dtype``."""
    narrow, shape, data = packed
    if isinstance(data, int):
        return np.full(shape, data, dtype=dtype)
    if len(data) < math.prod(shape) * int(narrow[2:]):
        data = zlib.decompress(data)
    return np.frombuffer(data, dtype=narrow).reshape(shape).astype(dtype)


def pack_table(columns: Sequence[Column]) -> PackedTable:
    """Columns of one length, as one array, which is unpacked at once: each counts from its least number on."""
    table = np.stack(columns, dtype=np.int64)
    lows = table.min(axis=1, initial=0) if table.size == 0 else table.min(axis=1)
    table -= lows[:, None]
    narrow = _narrowest(0, int(table.max(initial=0)))
    return narrow, lows.tolist(), table.astype(narrow).tobytes()


def unpack_table(packed: PackedTable) -> Int64:
    """The columns, one after the other."""
    narrow, lows, data = packed
    table = np.frombuffer(data, dtype=narrow).reshape(len(lows), -1).astype(np.int64)
    table += np.array(lows)[:, None]
    return table


def pack_ids(ids: Int32) -> PackedArray | PackedRuns:
    """Numbers most of which are one more than the one before: with what runs of such begin, and where."""
    breaks = np.nonzero(ids[1:] - ids[:-1] != 1)[0]
    if not len(ids) or len(breaks) > _MOST_RUNS:
        return pack_array(ids)
    firsts = [0, *(breaks + 1).tolist()]
    return tuple(ids[firsts].tolist()), (*firsts, len(ids))


def unpack_ids(packed: PackedArray | PackedRuns) -> Int32:
    """What `pack_ids` was given."""
    if len(packed) == 3:
        return unpack_array(packed, np.int32)
    values, bounds = packed
    runs = [
        np.arange(value, value + end - first) for value, first, end in zip(values, bounds, bounds[1:], strict=False)
    ]
    return np.concatenate(runs).astype(np.int32)


def stable_order(keys: Column) -> Int64:
    """What ``np.argsort(keys, kind="stable")`` gives, of keys that are not negative.

    Each key and its place are sorted as one number where 63 bits hold both: NumPy sorts numbers faster than places.
    """
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)) >> (63 - bits):
        return np.argsort(keys, kind="stable")
    packed = (keys.astype(np.int64) << bits) | np.arange(len(keys))
    packed.sort()
    return packed & ((1 << bits) - 1)


def distinct_numbers(numbers: Column) -> tuple[Int64, Int64]:
    """The distinct ones of many small numbers, ascending, and the place of each number among those."""
    used = np.nonzero(np.bincount(numbers))[0]
    places = np.zeros(int(used[-1]) + 1 if len(used) else 0, dtype=np.int64)
    places[used] = np.arange(len(used))
    return used, places[numbers]


def distinct_rows(table: Int64) -> tuple[Int64, Int64]:
    """First row of each distinct row of a table of integers, and the number of every row's among those."""
    hashes = _row_hashes(table)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    if not np.array_equal(table[first[inverse]], table):  # two rows with one hash: one in 2^64 pairs
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _row_hashes(table: Int64) -> _Hashes:
    """64 well-mixed bits for each row."""
    hashes = np.full(len(table), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in table.T:
        hashes = _mixed(hashes ^ column.astype(np.uint64))
    return hashes


def _mixed(values: _Hashes) -> _Hashes:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
