"""The global plan of any ranks: torch's items and metadata, and every byte written once, as evenly as can be."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import default_planner as torch_planners
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from gpudcp.columns import SaveColumns
from gpudcp.errors import PlanError
from gpudcp.items import WriteItems, columns_of
from gpudcp.planners import DefaultSavePlanner, balance
from gpudcp.planners.coordinate import GlobalPlan, coordinate
from gpudcp.views import ColumnMetadata

Sizes = tuple[int, ...]


def item_of(
    fqn: str,
    size: Sizes,
    offsets: Sizes | None = None,
    lengths: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    kind: WriteItemType = WriteItemType.SHARD,
) -> WriteItem:
    """A write item as torch's planners make it."""
    at, sizes = torch.Size(offsets or (0,) * len(size)), torch.Size(size if lengths is None else lengths)
    data = TensorWriteData(ChunkStorageMetadata(at, sizes), TensorProperties(dtype=dtype), torch.Size(size))
    return WriteItem(MetadataIndex(fqn, at), kind, tensor_data=data)


def object_of(fqn: str) -> WriteItem:
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)


def planned(ranks: Sequence[Sequence[WriteItem]], *, split: bool = False, to_lowest_rank: bool = False) -> GlobalPlan:
    """Ours, from items that went through the wire as columns."""
    columns = [pickle.loads(pickle.dumps(columns_of(items, None))) for items in ranks]
    return coordinate(columns, split_replicas=split, to_lowest_rank=to_lowest_rank, is_flattened=False)


class Tensor(NamedTuple):
    """A tensor, and how it lies on the ranks."""

    fqn: str
    size: Sizes
    grid: Sizes | None
    """Pieces along each dimension; None: replicated, whole."""
    replicas: int


@st.composite
def tensors(draw: st.DrawFn) -> tuple[int, list[Tensor]]:
    nranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    found = []
    for number in range(draw(st.integers(0, 6))):
        size = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        grid, replicas = None, nranks
        if size and draw(st.booleans()):
            pieces = draw(st.sampled_from([n for n in range(1, nranks + 1) if nranks % n == 0]))
            dim = draw(st.integers(0, len(size) - 1))
            grid = tuple(pieces if d == dim else 1 for d in range(len(size)))
            replicas = nranks // pieces
        found.append(Tensor(f"t{number}", size, grid, replicas))
    return nranks, found


def items_of(rank: int, every: Sequence[Tensor]) -> list[WriteItem]:
    """A rank's items: its piece of each grid, the whole of what is replicated."""
    items = [object_of("o")]
    for tensor in every:
        if tensor.grid is None:
            items.append(item_of(tensor.fqn, tensor.size, kind=WriteItemType.TENSOR))
            continue
        cells = list(itertools.product(*map(range, tensor.grid)))
        cell = cells[rank % len(cells)]
        offsets, lengths = [], []
        for size, count, place in zip(tensor.size, tensor.grid, cell, strict=True):
            bounds = [size * n // count for n in range(count + 1)]  # uneven, and empty where there is too little
            offsets.append(bounds[place])
            lengths.append(bounds[place + 1] - bounds[place])
        if 0 not in lengths:
            items.append(item_of(tensor.fqn, tensor.size, tuple(offsets), tuple(lengths)))
    return items


@settings(deadline=None, max_examples=150)
@given(tensors())
def test_to_the_lowest_rank_the_plans_and_the_metadata_are_torchs(case: tuple[int, list[Tensor]]) -> None:
    """Items of every rank in their order, index hints, chunks in their order."""
    nranks, every = case
    ranks = [items_of(rank, every) for rank in range(nranks)]
    planner = torch_planners.DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
    expected, metadata = planner.create_global_plan([SavePlan(list(items)) for items in ranks])
    found = planned(ranks, to_lowest_rank=True)
    assert [list(WriteItems(plan)) for plan in found.plans] == [plan.items for plan in expected]
    hints = [[item.index.index for item in WriteItems(plan)] for plan in found.plans]
    assert hints == [[item.index.index for item in plan.items] for plan in expected]
    assert ColumnMetadata(found.checkpoint).plain() == metadata


@settings(deadline=None, max_examples=150)
@given(tensors(), st.booleans(), st.integers(1, 200))
def test_every_element_is_written_once_by_a_rank_that_has_it(
    case: tuple[int, list[Tensor]], split: bool, threshold: int
) -> None:
    """Whole or in pieces; and torch's validation finds nothing to say."""
    nranks, every = case
    ranks = [items_of(rank, every) for rank in range(nranks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "SPLIT_NBYTES", threshold)
        found = planned(ranks, split=split)
    written: dict[str, list[int]] = {tensor.fqn: [0] * math.prod(tensor.size) for tensor in every}
    objects = 0
    for plan, own in zip(found.plans, ranks, strict=True):
        had = {item.index: item for item in own}
        for item in WriteItems(plan):
            if item.tensor_data is None:
                objects += 1
                continue
            chunk, data = item.tensor_data.chunk, item.tensor_data
            mask = np.zeros(data.size, dtype=np.int64)
            mask[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = 1
            written[item.index.fqn] = [
                a + b for a, b in zip(written[item.index.fqn], mask.ravel().tolist(), strict=True)
            ]
            inside = [
                other
                for index, other in had.items()
                if index.fqn == item.index.fqn and contains(other.tensor_data.chunk, chunk)  # type: ignore[union-attr]
            ]
            assert inside, "a rank writes only what it has"
    assert objects == 1
    assert all(count == 1 for counts in written.values() for count in counts)
    metadata = ColumnMetadata(found.checkpoint).plain()
    lists = [SavePlan(list(WriteItems(plan))) for plan in found.plans]
    # Whether all is well, in torch 2.11; what is not, since 2.12.
    assert torch_planners._validate_global_plan(lists, metadata) in (True, [])  # type: ignore[attr-defined]


def contains(outer: ChunkStorageMetadata, inner: ChunkStorageMetadata) -> bool:
    return all(
        a <= b and b + n <= a + m
        for a, m, b, n in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True)
    )


def nbytes_of(plan: SaveColumns) -> int:
    return int(plan.templates.nbytes()[plan.template_ids].sum())


@pytest.mark.parametrize("nranks", [2, 3, 8, 50])
def test_replicas_are_shared_out_evenly(nranks: int) -> None:
    """One tensor is half of the model: the largest rank writes at most 1.05x of the mean."""
    sizes = [(4000, 1024), *[(512, 1024)] * 8, *[(1024,)] * 20]
    items = [item_of(f"t{n}", size, kind=WriteItemType.TENSOR) for n, size in enumerate(sizes)]
    found = planned([items] * nranks, split=True)
    loads = [nbytes_of(plan) for plan in found.plans]
    assert sum(loads) == sum(math.prod(size) * 4 for size in sizes)
    assert max(loads) <= 1.05 * sum(loads) / nranks
    again = planned([items] * nranks, split=True)
    assert [list(WriteItems(plan)) for plan in again.plans] == [list(WriteItems(plan)) for plan in found.plans]


def test_shares_level_out_what_the_ranks_write_besides() -> None:
    """A rank with a large shard of its own gets less of the replicas."""
    own = item_of("own", (3000, 256), (0, 0), (2000, 256)), item_of("own", (3000, 256), (2000, 0), (1000, 256))
    shared = item_of("shared", (3000, 256), kind=WriteItemType.TENSOR)
    found = planned([[own[0], shared], [own[1], shared]], split=True)
    assert [nbytes_of(plan) for plan in found.plans] == [3000 * 1024, 3000 * 1024]


def test_what_cannot_be_cut_is_placed_first() -> None:
    """One row of half of all bytes between two tensors that can make up for it, and large rows of several sizes."""
    sizes = [(50, 1 << 18), (1, 100 << 18), (50, 1 << 18)]
    items = [item_of(f"t{n}", size, kind=WriteItemType.TENSOR) for n, size in enumerate(sizes)]
    found = planned([items] * 2, split=True)
    assert [nbytes_of(plan) for plan in found.plans] == [100 << 20, 100 << 20]
    rows = [item_of(f"r{n}", (1, mib << 18), kind=WriteItemType.TENSOR) for n, mib in enumerate([2, 3, 3, 7, 5, 4])]
    found = planned([rows] * 3, split=True)
    assert sorted(nbytes_of(plan) >> 20 for plan in found.plans) == [7, 8, 9]


def test_replicas_of_sets_of_ranks_that_overlap_are_shared_out_evenly() -> None:
    """The rank in between leaves its own to those who have no other."""
    of_two = [
        item_of("a", (300, 4096), kind=WriteItemType.TENSOR),
        item_of("b", (600, 4096), kind=WriteItemType.TENSOR),
    ]
    found = planned([of_two[:1], of_two, of_two[1:]], split=True)
    loads = [nbytes_of(plan) for plan in found.plans]
    assert max(loads) <= 1.01 * sum(loads) / 3


def test_small_replicas_stay_whole() -> None:
    """A chunk more is not worth it."""
    small = item_of("small", (balance.SPLIT_NBYTES // 8 - 1, 2), kind=WriteItemType.TENSOR)
    found = planned([[small]] * 4, split=True)
    assert sorted(len(plan) for plan in found.plans) == [0, 0, 0, 1]


def test_quantized_replicas_stay_whole() -> None:
    """A part of one would be loaded with its own scale, into a view that the whole tensor does not hear of."""
    item = item_of("q", (2 << 20, 1), dtype=torch.qint8, kind=WriteItemType.TENSOR)
    found = planned([[item], [item]], split=True)
    assert [len(plan) for plan in found.plans] == [1, 0]
    assert found.plans[0].templates.boxes[found.plans[0].template_ids, 2].tolist() == [[2 << 20, 1]]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[((0, 0), (2, 4))], [((1, 0), (3, 4))]], r"t: a chunk of \(2, 4\) at \(0, 0\) and .* overlap"),
        ([[((0, 0), (2, 4))], [((3, 0), (1, 4))]], r"12 elements, .*, 16: .*, a chunk of \(1, 4\) at \(3, 0\)$"),
        ([[((0, 0), (2, 4))], [((2, 0), (3, 4))]], r"t: a chunk of \(3, 4\) at \(2, 0\) leaves .*\(4, 4\)"),
        # Not a grid: the sweep must find it, and must not find what only touches.
        ([[((0, 0), (3, 2))], [((0, 2), (1, 2))], [((1, 2), (3, 2))], [((2, 0), (1, 2))]], "overlap"),
    ],
)
def test_chunks_that_make_no_whole_tensor_are_named(ranks: list[list[tuple[Sizes, Sizes]]], message: str) -> None:
    """With the key and the chunks."""
    items = [[item_of("t", (4, 4), offsets, lengths) for offsets, lengths in own] for own in ranks]
    with pytest.raises(PlanError, match=message):
        planned(items)


def test_chunks_off_any_grid_that_make_a_whole_tensor_are_right() -> None:
    """Like bricks."""
    boxes = [((0, 0), (3, 2)), ((0, 2), (1, 2)), ((1, 2), (3, 2)), ((3, 0), (1, 2))]
    found = planned([[item_of("t", (4, 4), *box)] for box in boxes])
    assert found.checkpoint.nrows == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (item_of("t", (4,)), item_of("t", (4,), dtype=torch.float16)),
        (item_of("t", (4,)), item_of("t", (5,))),
        (item_of("t", (4,), (0,), (2,)), item_of("t", (5,), (2,), (2,))),
        (item_of("t", (4,)), object_of("t")),
        (item_of("t", (4,), kind=WriteItemType.TENSOR), item_of("t", (4,), (2,), (2,), kind=WriteItemType.TENSOR)),
    ],
)
def test_ranks_that_contradict_each_other_are_named(one: WriteItem, other: WriteItem) -> None:
    """torch saves one of them without a word."""
    with pytest.raises(PlanError, match=r"^t: .*rank 0: .*rank 1: "):
        planned([[one], [other]])


def test_one_rank_may_save_its_shard_alone() -> None:
    """As with torch: there is nobody to fill the rest."""
    found = planned([[item_of("t", (4,), (1,), (2,))]])
    entry = ColumnMetadata(found.checkpoint).state_dict_metadata["t"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.chunks == [ChunkStorageMetadata(torch.Size([1]), torch.Size([2]))]


def test_an_unchanged_plan_travels_as_a_digest_and_a_changed_one_whole() -> None:
    """Two ranks over three saves; then a dtype changes on one."""
    planners = [DefaultSavePlanner(enable_plan_caching=True) for _ in range(2)]
    states = [{"a": torch.zeros(3), "b": torch.zeros(2)} for _ in range(2)]

    def save() -> tuple[list[SavePlan], list[SavePlan], list[SavePlan]]:
        for planner, state in zip(planners, states, strict=True):
            planner.set_up_planner(state, is_coordinator=planner is planners[0])
        sent = [pickle.loads(pickle.dumps(planner.create_local_plan())) for planner in planners]
        back, _ = planners[0].create_global_plan(sent)
        back = [pickle.loads(pickle.dumps(plan)) for plan in back]
        return sent, back, [planner.finish_plan(plan) for planner, plan in zip(planners, back, strict=True)]

    _, _, first = save()
    sent, back, second = save()
    assert not any(plan.usable or plan.items for plan in (*sent, *back))
    assert [list(plan.items) for plan in second] == [list(plan.items) for plan in first]
    states[1]["b"] = torch.zeros(2, dtype=torch.float16)
    states[0]["b"] = torch.zeros(2, dtype=torch.float16)
    sent, _, third = save()
    assert all(plan.usable for plan in sent)
    dtypes = {
        item.tensor_data.properties.dtype for plan in third for item in plan.items if item.tensor_data is not None
    }
    assert dtypes == {torch.float16, torch.float32}


def test_a_failed_save_leaves_no_stale_plan() -> None:
    """After a global plan that failed, the next save sends all again, and means what it says."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    good, bad = {"t": torch.zeros(3)}, {"t": torch.zeros(4)}
    other = SavePlan([item_of("t", (5,), kind=WriteItemType.TENSOR)])

    def local(state: dict[str, torch.Tensor]) -> SavePlan:
        planner.set_up_planner(state, is_coordinator=True)
        return planner.create_local_plan()

    planner.finish_plan(planner.create_global_plan([local(good)])[0][0])
    assert not local(good).usable
    with pytest.raises(PlanError, match="disagree"):
        planner.create_global_plan([local(bad), other])
    again = local(good)
    assert again.usable
    (final,), _ = planner.create_global_plan([again])
    (item,) = planner.finish_plan(final).items
    assert item.tensor_data is not None
    assert item.tensor_data.size == torch.Size([3])


def test_a_plan_takes_few_bytes_on_the_wire() -> None:
    """At most 16 an item where shapes repeat, 64 where none does."""
    names = [f"model.layers.{n // 9}.block.{n % 9}.weight" for n in range(1500)]
    alike = [item_of(name, (4096, 64 * (n % 9 + 1)), (512, 0), (8, 64 * (n % 9 + 1))) for n, name in enumerate(names)]
    unlike = [item_of(name, (4096 + n, 8 + n), (16, 0), (8 + n, 8 + n)) for n, name in enumerate(names)]
    for items, most in ((alike, 16), (unlike, 64)):
        plan = SavePlan(WriteItems(columns_of(items, None)))  # type: ignore[arg-type]
        assert len(pickle.dumps(plan)) <= most * len(items)
