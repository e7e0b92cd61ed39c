"""Joins against torch's own read items, pair by pair, and the batch against joins of one tensor at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gpudcp.errors import PlanError
from gpudcp.planners import joins
from gpudcp.planners.joins import Int64, Overlaps, overlaps, overlaps_batch

Chunk = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths."""
Pair = tuple[int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def columns(chunks: list[Chunk], dims: int) -> tuple[Int64, Int64]:
    """Offsets and lengths as [n, D]."""
    both = np.array(chunks, dtype=np.int64).reshape(len(chunks), 2, dims)
    return both[:, 0], both[:, 1]


def joined(saved: list[Chunk], local: list[Chunk], dims: int) -> list[Pair]:
    """What `overlaps` finds, in its order."""
    return pairs_of(overlaps(*columns(saved, dims), *columns(local, dims)))


def pairs_of(found: Overlaps) -> list[Pair]:
    """One tuple a row."""
    assert all(column.dtype == np.int64 for column in found)
    rows = zip(*(column.tolist() for column in found), strict=True)
    return [(local, saved, tuple(at), tuple(to), tuple(lengths)) for local, saved, at, to, lengths in rows]


def joined_by_torch(saved: list[Chunk], local: list[Chunk]) -> list[Pair]:
    """Torch's read items, by local, then by saved chunk."""

    def chunks(boxes: list[Chunk]) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths)) for offsets, lengths in boxes]

    metadata = TensorStorageMetadata(TensorProperties(), torch.Size([]), chunks(saved))
    items = create_read_items_for_chunk_list("weight", metadata, chunks(local))
    pairs = [
        (
            item.dest_index.index,
            item.storage_index.index,
            tuple(item.storage_offsets),
            tuple(item.dest_offsets),
            tuple(item.lengths),
        )
        for item in items
    ]
    return sorted(pairs)  # type: ignore[arg-type, return-value]


def grid(cuts: list[list[int]]) -> list[Chunk]:
    """Chunks between neighbouring cuts in every dimension; two equal cuts make an empty one."""
    chunks: list[Chunk] = [((), ())]
    for dim_cuts in cuts:
        chunks = [
            ((*offsets, start), (*lengths, stop - start))
            for offsets, lengths in chunks
            for start, stop in pairwise(dim_cuts)
        ]
    return chunks


@st.composite
def grids(draw: st.DrawFn, sizes: tuple[int, ...]) -> list[Chunk]:
    """An uneven grid over the whole tensor, perhaps with chunks repeated or left out, in any order."""
    chunks = grid([[0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size] for size in sizes])
    return (
        draw(st.lists(st.sampled_from(chunks), max_size=12)) if draw(st.booleans()) else draw(st.permutations(chunks))
    )


def any_boxes(dims: int) -> st.SearchStrategy[list[Chunk]]:
    """Boxes that may overlap each other, lie in each other, repeat, and be empty."""
    numbers = st.tuples(*[st.integers(0, 5)] * dims)
    return st.lists(st.tuples(numbers, numbers), max_size=14)


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[int, list[Chunk], list[Chunk]]:
    dims = draw(st.integers(0, 4))
    if draw(st.booleans()):
        return dims, draw(any_boxes(dims)), draw(any_boxes(dims))
    sizes = draw(st.tuples(*[st.integers(0, 9)] * dims))
    return dims, draw(grids(sizes)), draw(grids(sizes))


@pytest.fixture(params=["in Python", "at once", "sweep", "sweep in small parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of boxes takes the same way, which their number would have chosen."""
    limits = {
        "in Python": {"_PAIRS_IN_PYTHON": 1 << 40, "_CUTS_IN_PYTHON": 1 << 40},
        "at once": {"_PAIRS_IN_PYTHON": -1, "_PAIRS_AT_ONCE": 1 << 40},
        "sweep": {"_PAIRS_IN_PYTHON": -1, "_PAIRS_AT_ONCE": 0},
        "sweep in small parts": {"_PAIRS_IN_PYTHON": -1, "_PAIRS_AT_ONCE": 0, "_CANDIDATES_AT_ONCE": 3},
    }
    for name, limit in limits[request.param].items():
        monkeypatch.setattr(joins, name, limit)


@pytest.mark.usefixtures("way")
@given(sides=two_sides())
# The fixture sets module constants once for all examples, which is what is meant.
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_are_those_of_torch_whichever_way_they_are_found(sides: tuple[int, list[Chunk], list[Chunk]]) -> None:
    """The same items with the same offsets and lengths: empty boxes, 0-d tensors, no chunks and repeated ones too."""
    dims, saved, local = sides
    assert joined(saved, local, dims) == joined_by_torch(saved, local)


@given(sides=two_sides())
@settings(max_examples=250, deadline=None)
def test_pairs_are_those_of_torch_with_the_limits_as_they_are(sides: tuple[int, list[Chunk], list[Chunk]]) -> None:
    """The way is chosen by the number of boxes."""
    dims, saved, local = sides
    assert joined(saved, local, dims) == joined_by_torch(saved, local)


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("sizes", [(600, 30), (30, 600), (7, 600, 5), (600,)])
def test_hundreds_of_chunks_join_as_in_torch(sizes: tuple[int, ...], is_swapped: bool) -> None:
    """Long enough for a sweep, whether sharded along the longest dimension or another one."""
    dim = sizes.index(600)
    saved, local = (
        grid([[*range(0, 600, step), 600] if d == dim else [0, size] for d, size in enumerate(sizes)])
        for step in (2, 3)
    )
    if is_swapped:
        saved, local = local, saved
    assert len(saved) * len(local) > joins._PAIRS_AT_ONCE
    found = joined(saved, local, len(sizes))
    assert found == joined_by_torch(saved, local)
    assert len(found) == 400


def test_a_long_box_among_many_short_ones_is_found_by_all_of_them() -> None:
    """A sweep that trusts that boxes end in the order in which they start would lose it."""
    saved: list[Chunk] = [((row,), (1,)) for row in range(400)]
    saved[7:7] = [((0,), (400,)), ((3,), (300,))]
    local: list[Chunk] = [((row,), (2,)) for row in range(0, 400, 2)]
    assert joined(saved, local, 1) == joined_by_torch(saved, local)


def test_candidates_are_as_few_as_the_dimension_that_separates_the_boxes_allows() -> None:
    """Not the longest one, in which every box meets every other: 20,000 x 20,000 pairs would never fit."""
    count, width = 20_000, 1 << 40
    starts = np.arange(count)
    offsets = np.stack([np.zeros(count, dtype=np.int64), starts], axis=1)
    lengths = np.stack([np.full(count, width), np.ones(count, dtype=np.int64)], axis=1)
    found = overlaps(offsets, lengths, offsets, lengths)
    assert np.array_equal(found.local, starts)
    assert np.array_equal(found.saved, starts)
    assert not found.storage_offsets.any()
    assert not found.dest_offsets.any()
    assert np.array_equal(found.lengths, lengths)


@pytest.mark.parametrize("cuts", [[[0, 5, 9], [*range(301)]], [[*range(301)], [0, 5, 9]]])
def test_a_sweep_goes_along_the_dimension_that_leaves_the_fewest_candidates(cuts: list[list[int]]) -> None:
    """A grid of 2 x 300: 2 partners along one dimension, 300 along the other, which both tell boxes apart."""
    boxes = joins._Boxes.of(*columns(grid(cuts), 2))
    dims = joins._telling_dims(boxes, boxes)
    assert dims == [0, 1]
    assert joins._best_sweep(boxes, boxes, dims).candidate_count == 600 * 2


@pytest.mark.parametrize(
    ("saved", "local", "lengths"),
    [
        pytest.param(((2,), (0,)), ((0,), (4,)), [(0,)], id="saved, inside"),
        pytest.param(((0,), (4,)), ((2,), (0,)), [(0,)], id="local, inside"),
        pytest.param(((0,), (0,)), ((0,), (4,)), [], id="at the start"),
        pytest.param(((4,), (0,)), ((0,), (4,)), [], id="at the end"),
        pytest.param(((2,), (0,)), ((2,), (0,)), [], id="both, at one place"),
        pytest.param(((0, 0), (0, 4)), ((0, 0), (0, 4)), [], id="a tensor without rows"),
        pytest.param(((), ()), ((), ()), [()], id="no dimensions"),
    ],
)
@pytest.mark.usefixtures("way")
def test_an_empty_box_overlaps_only_what_it_lies_strictly_inside(
    saved: Chunk, local: Chunk, lengths: list[tuple[int, ...]]
) -> None:
    """As in torch, which makes an item of no elements of it."""
    found = joined([saved], [local], len(saved[0]))
    assert [pair[-1] for pair in found] == lengths
    assert found == joined_by_torch([saved], [local])


@pytest.mark.parametrize(("saved_count", "local_count"), [(0, 0), (0, 3), (3, 0), (0, 500), (500, 0)])
@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.usefixtures("way")
def test_no_boxes_on_one_side_overlap_nothing(saved_count: int, local_count: int, dims: int) -> None:
    """Columns of no rows, still with their dimensions."""
    box: Chunk = ((0,) * dims, (1,) * dims)
    found = overlaps(*columns([box] * saved_count, dims), *columns([box] * local_count, dims))
    assert [column.shape for column in found] == [(0,), (0,), (0, dims), (0, dims), (0, dims)]


def test_boxes_of_different_dimensions_are_refused() -> None:
    """Both numbers are named."""
    flat, square = columns([((0,), (4,))], 1), columns([((0, 0), (2, 2))], 2)
    with pytest.raises(PlanError, match="saved boxes have 1 dimensions, local ones 2"):
        overlaps(*flat, *square)
    starts = np.array([0, 1])
    with pytest.raises(PlanError, match="saved boxes have 2 dimensions, local ones 1"):
        overlaps_batch(starts, *square, starts, *flat)
    with pytest.raises(PlanError, match="saved boxes of 1 tensors, local boxes of 0"):
        overlaps_batch(starts, *flat, starts[:1], *columns([], 1))


def batch_of(tensors: list[tuple[int, list[Chunk], list[Chunk]]]) -> Overlaps:
    """All tensors at once, filled up to the most dimensions that one has."""
    most = max((dims for dims, _, _ in tensors), default=0)

    def side(lists: list[list[Chunk]]) -> tuple[Int64, Int64, Int64]:
        starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        filled = [
            (offsets + (0,) * (most - len(offsets)), lengths + (1,) * (most - len(lengths)))
            for chunks in lists
            for offsets, lengths in chunks
        ]
        return starts, *columns(filled, most)

    return overlaps_batch(*side([saved for _, saved, _ in tensors]), *side([local for _, _, local in tensors]))


def one_by_one(tensors: list[tuple[int, list[Chunk], list[Chunk]]]) -> list[Pair]:
    """What the batch should find."""
    most = max((dims for dims, _, _ in tensors), default=0)
    pairs, first_saved, first_local = [], 0, 0
    for dims, saved, local in tensors:
        zeros, ones = (0,) * (most - dims), (1,) * (most - dims)
        pairs += [
            (to_row + first_local, at_row + first_saved, at + zeros, to + zeros, lengths + ones)
            for to_row, at_row, at, to, lengths in joined(saved, local, dims)
        ]
        first_saved, first_local = first_saved + len(saved), first_local + len(local)
    return pairs


@pytest.mark.parametrize("pairs_a_chunk", [0, 1, joins._PAIRS_A_CHUNK])
@pytest.mark.parametrize("candidates_at_once", [3, joins._CANDIDATES_AT_ONCE])
@given(tensors=st.lists(two_sides(), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_finds_what_its_tensors_find_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
    pairs_a_chunk: int,
    candidates_at_once: int,
    tensors: list[tuple[int, list[Chunk], list[Chunk]]],
) -> None:
    """Tensors of different dimensions, without chunks, of one and of many; in the same order, by row number."""
    monkeypatch.setattr(joins, "_PAIRS_A_CHUNK", pairs_a_chunk)
    monkeypatch.setattr(joins, "_CANDIDATES_AT_ONCE", candidates_at_once)
    assert pairs_of(batch_of(tensors)) == one_by_one(tensors)


def test_a_batch_of_thousands_of_tensors_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one saved or one local chunk are never looked at one by one."""
    rows: list[Chunk] = grid([[0, 2, 4, 6, 8]])
    whole: list[Chunk] = [((0,), (8,))]
    tensors = [(1, whole, whole), (1, rows, whole), (1, whole, rows), (1, rows, rows[2:3])] * 1000
    expected = one_by_one(tensors)
    monkeypatch.setattr(joins, "_pairs", lambda *_: pytest.fail("a tensor by itself"))
    assert pairs_of(batch_of(tensors)) == expected
