"""Columns of numbers: what is packed comes back, and orders are NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpudcp.arrays import pack_array, pack_ids, stable_order, unpack_array, unpack_ids

_INT32 = st.integers(-(1 << 31), (1 << 31) - 1)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), st.integers(1, 400))
def test_a_packed_array_comes_back(values: list[int], times: int) -> None:
    """Of any length and range, compressed or not, also one number again and again."""
    array = np.array(values * times, dtype=np.int64)
    assert np.array_equal(unpack_array(pack_array(array), np.int64), array)
    assert unpack_array(pack_array(array), np.int64).dtype == np.int64


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (2, 3), (1,)])
def test_a_packed_array_keeps_its_shape(shape: tuple[int, ...]) -> None:
    """Also where all elements are one number, or none are there."""
    for array in (np.full(shape, 7, dtype=np.int32), np.arange(np.prod(shape), dtype=np.int32).reshape(shape)):
        found = unpack_array(pack_array(array), np.int32)
        assert found.shape == shape
        assert np.array_equal(found, array)


@given(st.lists(st.tuples(_INT32.filter(lambda first: first < 1 << 30), st.integers(1, 40)), max_size=24))
def test_packed_ids_come_back(runs: list[tuple[int, int]]) -> None:
    """Whatever the runs are, and in few bytes where they are long."""
    ids = np.array([first + place for first, count in runs for place in range(count)], dtype=np.int32)
    packed = pack_ids(ids)
    assert np.array_equal(unpack_ids(packed), ids)
    assert unpack_ids(packed).dtype == np.int32


def test_long_runs_take_few_bytes() -> None:
    """The names of a rank that writes all of its items but some."""
    ids = np.delete(np.arange(10_000, dtype=np.int32), [17, 5000])
    assert pack_ids(ids) == ((0, 18, 5001), (0, 17, 4999, 9998))


@given(st.lists(st.integers(0, (1 << 63) - 1)) | st.lists(st.integers(0, 3), max_size=300))
def test_the_stable_order_is_numpys(keys: list[int]) -> None:
    """Also of keys too large to be sorted with their places beside them."""
    array: Any = np.array(keys, dtype=np.int64)
    assert np.array_equal(stable_order(array), np.argsort(array, kind="stable"))
