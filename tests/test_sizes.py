"""Sizes as a table: the same sizes come back, alone, joined, pickled."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from gpudcp.sizes import SizeTable

SIZES = st.lists(st.none() | st.lists(st.integers(0, 1 << 62), max_size=5).map(torch.Size), max_size=9)


@given(SIZES)
def test_a_table_is_the_sequence_of_its_sizes(sizes: list[torch.Size | None]) -> None:
    """No size, an empty one, and those that differ in trailing zeros alone are different."""
    table = SizeTable.of(sizes)
    assert list(table) == sizes
    assert all(each is None or type(each) is torch.Size for each in table)
    assert list(pickle.loads(pickle.dumps(table))) == sizes
    assert list(table[1:]) == sizes[1:]


@given(st.lists(SIZES, max_size=4))
def test_joined_tables_are_one_after_the_other(parts: list[list[torch.Size | None]]) -> None:
    """Also of different dimensions."""
    joined = SizeTable.joined(map(SizeTable.of, parts))
    assert list(joined) == [size for part in parts for size in part]


@given(SIZES, st.data())
def test_distinct_sizes_are_told_apart(sizes: list[torch.Size | None], data: st.DataObject) -> None:
    """Equal ones have one number, and the first row of a number has that size."""
    repeated = sizes + data.draw(st.lists(st.sampled_from(sizes), max_size=9)) if sizes else []
    first, numbers = SizeTable.of(repeated).distinct()
    assert [repeated[row] for row in first[numbers].tolist()] == repeated
    assert len(first) == len(set(repeated))
