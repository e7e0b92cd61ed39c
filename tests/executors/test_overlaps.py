"""Destinations that share memory are told from those that only lie between one another."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from gpudcp.executors import overlaps
from gpudcp.executors.overlaps import extents_of, in_turns


def bytes_of(box: torch.Tensor) -> set[int]:
    """The address of every byte, one by one."""
    starts = np.array([box.data_ptr()])
    for length, stride in zip(box.shape, box.stride(), strict=True):
        starts = (starts[:, None] + np.arange(length) * stride * box.itemsize).ravel()
    return set((starts[:, None] + np.arange(box.itemsize)).ravel().tolist())


def naive_turns(boxes: list[torch.Tensor]) -> list[slice]:
    cuts: list[int] = [0]
    taken: set[int] = set()
    for number, box in enumerate(boxes):
        if taken & bytes_of(box):
            cuts.append(number)
            taken = set()
        taken |= bytes_of(box)
    return [slice(start, stop) for start, stop in pairwise([*cuts, len(boxes)])]


@st.composite
def boxes_of_one_view(draw: Any) -> list[torch.Tensor]:
    """Permuted boxes of one tensor with padded rows and planes: what chunks of shards are."""
    memory = torch.zeros(4, 6, 8, dtype=draw(st.sampled_from([torch.uint8, torch.float32, torch.complex128])))
    view = memory[:, : draw(st.integers(1, 6)), : draw(st.integers(1, 8))]
    return [_box(draw, view) for _ in range(draw(st.integers(2, 9)))]


@st.composite
def boxes_of_any_views(draw: Any) -> list[torch.Tensor]:
    """Of one piece of memory seen as several dtypes and shapes, from several bytes on, with steps."""
    memory = torch.zeros(720, dtype=torch.uint8)
    boxes = []
    for _ in range(draw(st.integers(2, 7))):
        dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex128]))
        flat = memory[draw(st.integers(0, 2)) * 16 :]
        view = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
        width = draw(st.sampled_from([3, 4, 8]))
        view = view[: len(view) // width * width].view(-1, width)
        if draw(st.booleans()):
            view = view[: len(view) // 2 * 2].view(2, -1, width)
        boxes.append(_box(draw, view[..., :: draw(st.integers(1, 2))]))
    return boxes


def _box(draw: Any, view: torch.Tensor) -> torch.Tensor:
    for dim in range(view.dim()):
        start = draw(st.integers(0, view.shape[dim] - 1))
        view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
    return view.permute(*draw(st.permutations(range(view.dim()))))


@hypothesis.given(boxes_of_one_view())
@hypothesis.settings(max_examples=300, deadline=None)
def test_boxes_of_a_tensor_are_cut_exactly_where_memory_is_shared(boxes: list[torch.Tensor]) -> None:
    """Against the sets of all addresses."""
    assert in_turns(boxes) == naive_turns(boxes)


@hypothesis.given(boxes_of_any_views())
@hypothesis.settings(max_examples=300, deadline=None)
def test_no_run_shares_memory(boxes: list[torch.Tensor]) -> None:
    """Whatever the views are; there may be more runs than needed."""
    runs = in_turns(boxes)
    assert [box for run in runs for box in range(len(boxes))[run]] == list(range(len(boxes)))
    for run in runs:
        addresses = [bytes_of(box) for box in boxes[run]]
        assert len(set().union(*addresses)) == sum(map(len, addresses))


def test_pieces_of_a_tensor_are_one_run() -> None:
    """Columns, tiles, single rows of columns, the parts of a fused weight, halves of a convolution's filters."""
    weight = torch.zeros(64, 48)
    assert in_turns([*weight.split(7, dim=1)]) == [slice(0, 7)]
    tiles = [tile for rows in weight.split(9) for tile in rows.split(11, dim=1)]
    assert in_turns(tiles) == [slice(0, len(tiles))]
    assert in_turns([*weight[:, :5].split(1), weight[:, 5:]]) == [slice(0, 65)]
    assert in_turns([weight.t()[3:9], weight[:, 9:], weight[:, :3]]) == [slice(0, 3)]
    filters = torch.zeros(6, 8, 3, 3, 2)
    assert in_turns([*filters.split(3, dim=1), *torch.zeros(5, 6).split(2, dim=1)]) == [slice(0, 6)]
    assert in_turns([filters[..., :1], filters[..., 1:]]) == [slice(0, 2)]
    assert in_turns([filters[:, :, 1:, :2], filters[:, :, :1], filters[:, :, 1:, 2:]]) == [slice(0, 3)]


def test_tensors_that_share_memory_take_turns() -> None:
    """Tied ones, parts of one another, an element of a column, bytes of one element."""
    weight = torch.zeros(20, 30)
    other = torch.zeros(3)
    assert in_turns([weight, other, weight]) == [slice(0, 2), slice(2, 3)]
    assert in_turns([weight.view(-1)[1:51], weight, other]) == [slice(0, 1), slice(1, 3)]
    assert in_turns([weight[:, 3:7], weight[:, :3], weight[5, 6:9]]) == [slice(0, 2), slice(2, 3)]
    assert in_turns([weight[0, :1].view(torch.int16)[1:], weight[0, :1].view(torch.uint8)[1:3]]) == [
        slice(0, 1),
        slice(1, 2),
    ]
    assert in_turns([weight] * 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert in_turns([weight[::2], other, weight[1::2], other]) == [slice(0, 3), slice(3, 4)]


@hypothesis.given(boxes_of_any_views())
@hypothesis.settings(max_examples=200, deadline=None)
def test_extents_are_the_first_and_last_bytes(boxes: list[torch.Tensor]) -> None:
    """Of any strides."""
    for box, (start, end) in zip(boxes, extents_of(boxes).tolist(), strict=True):
        assert (start, end) == (min(bytes_of(box)), max(bytes_of(box)) + 1)


def test_a_sequence_with_too_many_pairs_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than to look at all of them; within each half those that share are found."""
    columns = [*torch.zeros(10, 9).split(1, dim=1)]
    assert len(in_turns(columns)) == 1
    monkeypatch.setattr(overlaps, "_MOST_PAIRS", 9)
    assert in_turns(columns) == [slice(0, 4), slice(4, 6), slice(6, 9)]
    assert in_turns([*columns[:5], columns[4], *columns[:3]]) == [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 9)]


def test_very_many_columns_take_little_memory() -> None:
    """20,000 that lie between one another are 200 million pairs."""
    columns = [*torch.zeros(3, 20_000).unbind(1)]
    tracemalloc.start()
    try:
        runs = in_turns(columns)
        _, most_nbytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(runs) < 100
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    assert most_nbytes < 100 << 20


@pytest.mark.parametrize("boxes", [[], [torch.zeros(3)]])
def test_one_or_none_is_one_run(boxes: list[torch.Tensor]) -> None:
    """There is nothing to tell apart."""
    assert in_turns(boxes) == [slice(0, len(boxes))]
