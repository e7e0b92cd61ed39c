"""Box geometry against NumPy: index every element, and see whether the arithmetic names the same ones."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.boxes import boxes_of_run, extent_of_box, is_dense_run, longest_gap, row_major_strides

SIZES = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@given(sizes=st.lists(st.integers(0, 1 << 20), max_size=6).map(tuple))
@settings(max_examples=150, deadline=None)
def test_row_major_strides_are_those_of_a_new_torch_tensor(sizes: tuple[int, ...]) -> None:
    """Also for dimensions of size 0, over which torch steps as if they had size 1."""
    if prod(max(size, 1) for size in sizes) < 1 << 60:
        assert row_major_strides(sizes) == torch.empty(sizes, dtype=torch.int8, device="meta").stride()


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    sizes = draw(SIZES)
    start = draw(st.integers(0, prod(sizes)))
    return sizes, start, draw(st.integers(start, prod(sizes)))


@given(run=runs())
@settings(max_examples=400, deadline=None)
def test_boxes_of_a_run_hold_its_elements_once_and_in_order(run: tuple[tuple[int, ...], int, int]) -> None:
    """The elements of all boxes, one after the other, are the run; there are few boxes, and none is empty."""
    sizes, start, stop = run
    elements = np.arange(prod(sizes)).reshape(sizes)
    found: list[int] = []
    boxes = list(boxes_of_run(sizes, start, stop))
    for offsets, lengths in boxes:
        assert len(offsets) == len(lengths) == len(sizes)
        box = elements[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        assert box.shape == lengths
        assert box.size > 0
        found.extend(box.ravel().tolist())
    assert found == list(range(start, stop))
    assert len(boxes) <= 2 * len(sizes) + 1


def test_a_run_of_whole_rows_is_one_box() -> None:
    """The common case: nothing is cut that need not be."""
    assert list(boxes_of_run((6, 4, 5), 20, 100)) == [((1, 0, 0), (4, 4, 5))]
    assert list(boxes_of_run((), 0, 1)) == [((), ())]
    assert list(boxes_of_run((7,), 2, 5)) == [((2,), (3,))]


def test_a_run_inside_the_elements_of_a_huge_tensor_takes_no_time() -> None:
    """The number of boxes does not depend on the number of rows."""
    boxes = list(boxes_of_run((1 << 30, 3, 1 << 10), 5, (1 << 41) + 7))
    assert len(boxes) <= 7
    assert sum(prod(lengths) for _, lengths in boxes) == (1 << 41) + 2


@st.composite
def strided_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    lengths = draw(SIZES)
    strides = draw(st.lists(st.integers(0, 30), min_size=len(lengths), max_size=len(lengths)).map(tuple))
    return strides, lengths


def elements_of(strides: tuple[int, ...], lengths: tuple[int, ...]) -> list[int]:
    """The place in memory of each element, in row-major order."""
    return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*lengths)]


@given(box=strided_boxes())
@settings(max_examples=400, deadline=None)
def test_the_extent_of_a_box_spans_its_first_and_last_element(box: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Both included; an empty box has none."""
    places = elements_of(*box)
    assert extent_of_box(*box) == (max(places) + 1 if places else 0)


@given(box=strided_boxes())
@settings(max_examples=400, deadline=None)
def test_the_longest_gap_is_the_longest_run_of_other_elements(box: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Between two neighbours of the box, in memory, at any depth, overlapping or not."""
    places = sorted(set(elements_of(*box)))
    gaps = [after - before - 1 for before, after in pairwise(places)]
    if places:
        assert longest_gap(*box) == max(gaps, default=0)


@given(box=strided_boxes())
@settings(max_examples=400, deadline=None)
def test_a_dense_run_is_one_whose_elements_lie_side_by_side(box: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """In row-major order, ascending, without a gap: it can be copied as bytes."""
    places = elements_of(*box)
    if places:
        assert is_dense_run(*box) == (places == list(range(len(places))))


@pytest.mark.parametrize(
    ("strides", "lengths", "expected"),
    [
        ((), (), True),
        ((99,), (1,), True),
        ((6, 1), (4, 6), True),
        ((6, 1), (4, 5), False),
        ((6, 1), (1, 5), True),
        ((1, 6), (6, 4), False),
        ((1, 99), (6, 1), True),
        ((0,), (2,), False),
        ((20, 99, 1), (3, 1, 20), True),
    ],
)
def test_dimensions_of_length_one_do_not_break_a_dense_run(
    strides: tuple[int, ...], lengths: tuple[int, ...], expected: bool
) -> None:
    """Whatever their stride, nothing steps along them."""
    assert is_dense_run(strides, lengths) is expected
