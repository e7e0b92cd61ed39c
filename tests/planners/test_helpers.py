"""The steps of planning: torch's private twins give the same, and where ours differ, why."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed.checkpoint import default_planner, planner_helpers
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.planners import helpers

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")

PROPERTY = settings(deadline=None, max_examples=200)


@contextmanager
def rank_of(rank: int, nranks: int) -> Iterator[None]:
    """This process as a rank of a group that never communicates."""
    dist.init_process_group("fake", rank=rank, world_size=nranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensor(
    mesh: DeviceMesh, placements: list[Placement], *sizes: int, device: str = "cpu", requires_grad: bool = False
) -> DTensor:
    """A DTensor of these sizes, as this rank of the mesh holds it."""
    full = torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).view(sizes)
    local = full
    coordinate = mesh.get_coordinate()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard) and coordinate is not None:
            parts = local.chunk(mesh.size(dim), placement.dim)
            at = coordinate[dim]
            local = parts[at] if at < len(parts) else local.narrow(placement.dim, 0, 0)
    made = DTensor.from_local(
        local.contiguous().to(device), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    return made.requires_grad_(requires_grad)


def sharded_tensor(rank: int, nranks: int) -> ShardedTensor:
    """Two rows for each rank."""
    shards = [ShardMetadata([2 * each, 0], [2, 3], f"rank:{each}/cpu") for each in range(nranks)]
    properties = ShardProperties(dtype=torch.float32, requires_grad=True)
    metadata = ShardedTensorMetadata(shards, torch.Size((2 * nranks, 3)), properties)
    local = TensorShard(torch.full((2, 3), float(rank), requires_grad=True), shards[rank])
    return ShardedTensor._init_from_local_shards_and_global_metadata([local], metadata)


def every_kind(rank: int, nranks: int) -> dict[str, Any]:
    """A flat state dict of all kinds of values."""
    line, grid = init_device_mesh("cpu", (nranks,)), init_device_mesh("cpu", (2, nranks // 2))
    return {
        "plain": torch.zeros(3, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "strided": torch.zeros(3, 4).t(),
        "sharded": sharded_tensor(rank, nranks),
        "rows": dtensor(line, [Shard(0)], 7, 3),
        "columns": dtensor(line, [Shard(1)], 2, 9, requires_grad=True),
        "replicated": dtensor(line, [Replicate()], 5),
        "few": dtensor(line, [Shard(0)], 2, 2),
        "both": dtensor(grid, [Shard(0), Shard(1)], 5, 5),
        "twice": dtensor(grid, [Shard(0), Shard(0)], 9, 2),
        "hybrid": dtensor(grid, [Replicate(), Shard(0)], 6, 2),
        "lr": 0.1,
        "none": None,
        "list": [1, 2],
    }


def hints(items: list[Any]) -> list[Any]:
    """Index hints, which torch leaves out when it compares."""
    return [
        (item.dest_index.index, item.storage_index.index) if isinstance(item, ReadItem) else item.index.index
        for item in items
    ]


class Checkpointable:
    """Describes itself, in torch's protocol; two shards of one row each."""

    def __init__(self) -> None:
        self.rows = [torch.full((1, 2), 1.0), torch.full((1, 2), 2.0)]

    def size(self) -> torch.Size:
        return torch.Size((2, 2))

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        assert value is self
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(torch.float32), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk((row, 0), (1, 2)) for row in range(2)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.rows[index.offset[0]]


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


# Values and their items


@pytest.mark.parametrize("rank", range(4))
def test_every_kind_of_value_gives_torchs_items_and_chunks(rank: int) -> None:
    """On each of four ranks; and their read items from a checkpoint of one whole chunk each."""
    with rank_of(rank, 4):
        for fqn, value in every_kind(rank, 4).items():
            expected = planner_helpers._create_write_items(fqn, value)
            found = helpers.write_items_for(fqn, value)
            assert found == expected, fqn
            assert hints(found) == hints(expected)
            entry: Any = BytesStorageMetadata()
            if isinstance(value, torch.Tensor):
                assert helpers.chunk_list(value) == planner_helpers._create_chunk_list(value), fqn
                whole = chunk((0,) * value.ndim, tuple(value.shape))
                entry = TensorStorageMetadata(TensorProperties(), value.size(), [whole])
            assert helpers.read_items_for(fqn, entry, value) == planner_helpers._create_read_items(fqn, entry, value)


def test_requires_grad_of_a_dtensor_is_its_own_with_and_without_gradients() -> None:
    """torch's item follows the local tensor's when gradients are off, so that a plan changes with the caller's mode."""
    with rank_of(0, 2):
        value = dtensor(init_device_mesh("cpu", (2,)), [Shard(0)], 4, requires_grad=True)
        (item,) = helpers.write_items_for("a", value)
        assert [item] == planner_helpers._create_write_items("a", value)
        with torch.no_grad():
            assert helpers.write_items_for("a", value) == [item]
            assert planner_helpers._create_write_items("a", value) != [item]
    assert item.tensor_data is not None
    assert item.tensor_data.properties.requires_grad


def test_a_dtensor_outside_of_this_ranks_mesh_gives_nothing() -> None:
    """No items to write, none to read, no chunks; and no shard."""
    with rank_of(3, 4):
        value = dtensor(DeviceMesh("cpu", [0, 1]), [Shard(0)], 4, 2)
        entry = TensorStorageMetadata(TensorProperties(), value.size(), [chunk((0, 0), (4, 2))])
        assert helpers.write_items_for("a", value) == []
        assert helpers.chunk_list(value) == []
        assert helpers.read_items_for("a", entry, value) == []
        assert helpers.local_save_plan({"a": value}) == default_planner.create_default_local_save_plan(
            {"a": value}, False
        )
        metadata = Metadata({"a": entry})
        assert helpers.local_load_plan({"a": value}, metadata) == LoadPlan([])
        assert default_planner.create_default_local_load_plan({"a": value}, metadata) == LoadPlan([])
        assert helpers.metadata_only_plan({"a": value}).items == []
        with pytest.raises(PlanError, match="a: this rank holds nothing"):
            helpers.find_shard(value, MetadataIndex("a", (0, 0)))


def test_a_partial_dtensor_is_refused() -> None:
    """As torch refuses it, for writing, reading and looking up."""
    with rank_of(0, 2):
        value = dtensor(init_device_mesh("cpu", (2,)), [Partial()], 4)
        for call in (
            lambda: helpers.write_items_for("a", value),
            lambda: helpers.chunk_list(value, fqn="a"),
            lambda: helpers.find_shard(value, MetadataIndex("a", (0,))),
        ):
            with pytest.raises(PlanError, match=r"^a: .*not reduced yet"):
                call()
        with pytest.raises(ValueError, match="partial"):
            planner_helpers._create_write_items("a", value)


@pytest.mark.parametrize("rank", range(4))
def test_a_strided_shard_is_a_box_if_those_to_its_right_make_it_one(rank: int) -> None:
    """FSDP over tensor parallelism: torch's box, which is where the rows come from."""
    with rank_of(rank, 4):
        grid = init_device_mesh("cpu", (2, 2))
        full = torch.arange(16.0).view(8, 2)
        value = distribute_tensor(full, grid, [_StridedShard(0, split_factor=2), Shard(0)], src_data_rank=None)
        (found,) = helpers.chunk_list(value)
        assert [found] == planner_helpers._create_chunk_list(value)
        start = found.offsets[0]
        assert torch.equal(value.to_local(), full[start : start + found.sizes[0]])


def test_a_strided_shard_of_rows_that_lie_apart_is_refused() -> None:
    """torch describes rows 0, 1, 4, 5 as rows 0 to 3, and loads those."""
    with rank_of(0, 2):
        line = init_device_mesh("cpu", (2,))
        value = distribute_tensor(torch.arange(8.0), line, [_StridedShard(0, split_factor=2)], src_data_rank=None)
        assert value.to_local().tolist() == [0, 1, 4, 5]
        assert planner_helpers._create_chunk_list(value) == [chunk((0,), (4,))]
        entry = TensorStorageMetadata(TensorProperties(), value.size(), [chunk((0,), (8,))])
        for call in (
            lambda: helpers.write_items_for("a", value),
            lambda: helpers.read_items_for("a", entry, value),
            lambda: helpers.find_shard(value, MetadataIndex("a", (0,))),
        ):
            with pytest.raises(PlanError, match=r"^a: .*no box describes a shard"):
                call()


def test_a_checkpointable_object_describes_itself() -> None:
    """Its items, chunks and shards are its answers, though it is no tensor."""
    value = Checkpointable()
    items = helpers.write_items_for("a", value)
    assert items == planner_helpers._create_write_items("a", value)
    assert len(items) == 2
    assert helpers.chunk_list(value) == value.__create_chunk_list__()
    assert helpers.find_shard(value, MetadataIndex("a", (1, 0))) is value.rows[1]
    metadata = Metadata({"a": TensorStorageMetadata(TensorProperties(), value.size(), value.__create_chunk_list__())})
    plan = helpers.local_load_plan({"a": value}, metadata)
    assert plan == default_planner.create_default_local_load_plan({"a": value}, metadata)
    assert len(plan.items) == 2


def test_what_describes_its_chunks_needs_no_size() -> None:
    """Nothing is compared then."""

    class Chunked:
        def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
            return [chunk((1,), (1,))]

    metadata = Metadata({"a": TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])})
    for value in (Chunked(), type("Sized", (Chunked,), {"size": 7})()):
        (item,) = helpers.local_load_plan({"a": value}, metadata).items
        assert (item.storage_offsets, item.lengths) == ((1,), (1,))


def test_the_local_tensor_of_a_dtensor_may_describe_itself() -> None:
    """torch's LocalShardsWrapper: several shards of one rank, which the DTensor's placements do not tell of."""
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    with rank_of(0, 2):
        local = LocalShardsWrapper([torch.zeros(2, 2), torch.ones(1, 2)], [(0, 0), (2, 0)])
        mesh = init_device_mesh("cpu", (2,))
        value = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 2)), stride=(2, 1))
        items = helpers.write_items_for("a", value)
        assert items == planner_helpers._create_write_items("a", value)
        assert [item.index.offset for item in items] == [(0, 0), (2, 0)]
        assert helpers.chunk_list(value) == planner_helpers._create_chunk_list(value)
        index = MetadataIndex("a", (2, 0))
        assert helpers.find_shard(value, index) is find_state_dict_object({"a": value}, index)


def test_what_is_no_tensor_has_no_chunks() -> None:
    """Nor can it be filled from a tensor; torch blames the metadata there."""
    with pytest.raises(PlanError, match="a list is no tensor"):
        helpers.chunk_list([1])
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])
    with pytest.raises(PlanError, match="a: a tensor in the checkpoint, a list in the state dict"):
        helpers.read_items_for("a", entry, [1])


# Read items


@st.composite
def grids(draw: st.DrawFn, sizes: tuple[int, ...]) -> list[ChunkStorageMetadata]:
    """Disjoint chunks that cover a tensor, in any order, empty ones among them."""
    cuts = [sorted(draw(st.lists(st.integers(0, size), max_size=4))) for size in sizes]
    spans = [list(itertools.pairwise([0, *at, size])) for at, size in zip(cuts, sizes, strict=True)]
    boxes = [chunk(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*spans)]
    return draw(st.permutations(boxes))


@st.composite
def two_grids(draw: st.DrawFn) -> tuple[TensorStorageMetadata, list[ChunkStorageMetadata]]:
    sizes = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    saved, local = draw(grids(sizes)), draw(grids(sizes))
    kept = draw(st.integers(0, len(local)))
    return TensorStorageMetadata(TensorProperties(), torch.Size(sizes), saved), local[:kept]


def test_each_pair_of_chunks_that_overlap_gives_torchs_item() -> None:
    """As sets, hints included; ours in the order of the local chunks, then of the saved ones."""

    @PROPERTY
    @given(two_grids())
    def check(case: tuple[TensorStorageMetadata, list[ChunkStorageMetadata]]) -> None:
        metadata, local = case
        found = helpers.read_items_for_chunk_list("a", metadata, local)
        expected = planner_helpers.create_read_items_for_chunk_list("a", metadata, local)
        by_hint = sorted(expected, key=lambda item: (item.dest_index.index, item.storage_index.index))
        assert found == by_hint
        assert hints(found) == hints(by_hint)

    check()


def test_chunks_of_other_dimensions_are_refused() -> None:
    """Both numbers are named."""
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])
    with pytest.raises(PlanError, match=r"a: saved chunks have 1 dim.* 2$"):
        helpers.read_items_for_chunk_list("a", entry, [chunk((0, 0), (2, 1))])


# Shards


@pytest.mark.parametrize("rank", range(2))
def test_an_index_names_what_torch_finds(rank: int) -> None:
    """Of every item that a state dict has: the same memory, or the very same object."""
    with rank_of(rank, 2):
        state = every_kind(rank, 2)
        for item in helpers.local_save_plan(state).items:
            found = helpers.find_shard(state[item.index.fqn], item.index)
            expected = find_state_dict_object(state, item.index)
            if isinstance(expected, torch.Tensor):
                assert found.data_ptr() == expected.data_ptr()
                assert (found.shape, found.stride()) == (expected.shape, expected.stride())
                assert torch.equal(found, expected)
            else:
                assert found is expected
        plain = state["plain"]
        assert helpers.find_shard(plain, MetadataIndex("plain")) is plain
        whole = helpers.find_shard(state["rows"], MetadataIndex("rows"))
        assert torch.equal(whole, state["rows"].to_local())


def test_an_index_hint_that_is_wrong_does_no_harm() -> None:
    """The shard is searched for by its offset."""
    with rank_of(1, 2):
        value = sharded_tensor(1, 2)
        for hint in (None, 0, 1, 7, -1):
            found = helpers.find_shard(value, MetadataIndex("a", (2, 0), hint))
            assert found is value.local_shards()[0].tensor


def test_an_index_that_names_no_shard_here_is_refused() -> None:
    """torch hands out a DTensor's shard for any offset."""
    with rank_of(1, 2):
        rows = dtensor(init_device_mesh("cpu", (2,)), [Shard(0)], 4, 2)
        wrong: list[tuple[Any, MetadataIndex]] = [
            (torch.zeros(3), MetadataIndex("a", (1,))),
            (torch.zeros(3), MetadataIndex("a", (0, 0))),
            (0.1, MetadataIndex("a", (0,))),
            (sharded_tensor(1, 2), MetadataIndex("a", (0, 0))),
            (sharded_tensor(1, 2), MetadataIndex("a")),
        ]
        for value, index in wrong:
            with pytest.raises(PlanError, match="a: "):
                helpers.find_shard(value, index)
            with pytest.raises(ValueError, match=r"'a'|a since"):
                find_state_dict_object({"a": value}, index)
        with pytest.raises(PlanError, match=r"a: no shard at \(0, 0\) here: this rank's starts at \(2, 0\)"):
            helpers.find_shard(rows, MetadataIndex("a", (0, 0)))
        assert find_state_dict_object({"a": rows}, MetadataIndex("a", (0, 0))) is not None


# Plans to save


def test_plans_of_four_ranks_become_torchs_metadata() -> None:
    """Local plans, global plans with hints and without, and the Metadata."""
    plans, theirs = [], []
    for rank in range(4):
        with rank_of(rank, 4):
            state = every_kind(rank, 4)
            plans.append(helpers.local_save_plan(state))
            theirs.append(default_planner.create_default_local_save_plan(state, rank == 0))
    assert plans == theirs
    deduped = default_planner.dedup_save_plans(plans)
    deduped[1] = dataclasses.replace(deduped[1], planner_data={"a": ("a",)}, storage_data="storage")
    for rewrite in (True, False):
        found = helpers.global_save_plan(deduped, rewrite)
        expected = default_planner.create_default_global_save_plan(deduped, rewrite)
        assert found == expected
        assert [hints(plan.items) for plan in found[0]] == [hints(plan.items) for plan in expected[0]]
    assert list(found[1].state_dict_metadata) == list(expected[1].state_dict_metadata)


def test_a_metadata_only_plan_has_the_shards_of_all_ranks() -> None:
    """Of a ShardedTensor, which knows them; the Metadata is torch's."""
    with rank_of(1, 4):
        state = every_kind(1, 4)
        assert helpers.metadata_only_plan(state) == planner_helpers._create_default_metadata_only_plan(state)
        found = helpers.local_metadata(state)
        assert found == default_planner._create_default_local_metadata(state)
    entry = found.state_dict_metadata["sharded"]
    assert isinstance(entry, TensorStorageMetadata)
    assert len(entry.chunks) == 4


def shard_item(fqn: str, row: int, *, dtype: torch.dtype = torch.float32, rows: int = 2) -> WriteItem:
    """One row of a tensor."""
    data = TensorWriteData(chunk((row, 0), (1, 3)), TensorProperties(dtype), torch.Size((rows, 3)))
    return WriteItem(MetadataIndex(fqn, (row, 0)), WriteItemType.SHARD, tensor_data=data)


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([helpers.tensor_write_item("a", torch.zeros(2)), helpers.tensor_write_item("a", torch.zeros(2))], "TENSOR"),
        ([helpers.object_write_item("a"), helpers.object_write_item("a")], "BYTE_IO"),
        ([shard_item("a", 0), helpers.object_write_item("a")], "BYTE_IO"),
        ([helpers.object_write_item("a"), shard_item("a", 0)], "SHARD"),
        ([shard_item("a", 0), shard_item("a", 1, dtype=torch.float16)], "torch.float32 .* torch.float16"),
        ([shard_item("a", 0), shard_item("a", 1, rows=3)], r"\(2, 3\).*\(3, 3\)"),
        ([WriteItem(MetadataIndex("a"), WriteItemType.TENSOR)], "without a chunk"),
    ],
)
def test_items_that_contradict_each_other_are_refused(items: list[WriteItem], named: str) -> None:
    """On one rank and on two; torch lets two dtypes or sizes pass."""
    for plans in ([SavePlan(items)], [SavePlan([item]) for item in items]):
        with pytest.raises(PlanError, match=f"a: .*{named}"):
            helpers.global_save_plan(plans)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: {"properties": dataclasses.replace(data.properties, dtype=torch.int32)},
        lambda data: {"properties": dataclasses.replace(data.properties, requires_grad=True)},
        lambda _: {"size": torch.Size((9, 3))},
        lambda _: {"chunk": chunk((0, 0), (2, 3))},
        lambda _: {"chunk": chunk((1, 0), (1, 3))},
    ],
)
def test_plans_that_differ_in_a_tensors_description_differ(change: Callable[[Any], dict[str, Any]]) -> None:
    """torch's comparison sees neither dtype nor other properties."""
    item = shard_item("a", 0)
    assert item.tensor_data is not None
    other = dataclasses.replace(item, tensor_data=dataclasses.replace(item.tensor_data, **change(item.tensor_data)))
    same = dataclasses.replace(item)
    assert helpers.plans_equal(SavePlan([item]), SavePlan([same]))
    assert not helpers.plans_equal(SavePlan([item]), SavePlan([other]))


def test_plans_that_differ_elsewhere_differ() -> None:
    """Items, their order, type, name, hint; use; mappings. What the writer put in does not count."""
    a, b = shard_item("a", 0), shard_item("b", 0)
    plan = SavePlan([a, b], planner_data={"a": ("a",)})
    for other in (
        dataclasses.replace(plan, items=[a]),
        dataclasses.replace(plan, items=[b, a]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, type=WriteItemType.TENSOR)]),
        dataclasses.replace(plan, items=[a, helpers.object_write_item("b")]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, index=MetadataIndex("b", (0, 0), 1))]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, index=MetadataIndex("b", (1, 0)))]),
        dataclasses.replace(plan, usable=False),
        dataclasses.replace(plan, planner_data={"a": ("x", "a")}),
    ):
        assert not helpers.plans_equal(plan, other)
        assert not helpers.plans_equal(other, plan)
    assert helpers.plans_equal(plan, dataclasses.replace(plan, storage_data="other"))


def test_ranks_without_a_new_plan_keep_their_cached_one() -> None:
    """As torch merges; another number of ranks is refused, where torch drops the last ones."""
    old = [SavePlan([helpers.object_write_item(f"old{rank}")]) for rank in range(3)]
    unchanged = SavePlan([], usable=False)
    new = SavePlan([helpers.object_write_item("new")])
    empty = SavePlan([])
    for deltas in ([unchanged, new, empty], [unchanged] * 3, [new] * 3):
        assert helpers.merge_delta_plans(old, deltas) == planner_helpers._merge_delta_local_plans(old, deltas)
    assert helpers.merge_delta_plans(old, [unchanged, new, empty]) == [old[0], new, empty]
    with pytest.raises(PlanError, match="plans of 2 ranks, and cached ones of 3"):
        helpers.merge_delta_plans(old, [unchanged] * 2)


# Plans to load


@pytest.mark.parametrize("rank", range(4))
def test_a_load_plan_is_torchs_whoever_saved(rank: int) -> None:
    """A checkpoint of two ranks, loaded by four; as sets of items."""
    saves = []
    for saver in range(2):
        with rank_of(saver, 2):
            line = init_device_mesh("cpu", (2,))
            state = {
                "rows": dtensor(line, [Shard(1)], 7, 3),
                "both": dtensor(line, [Shard(0)], 5, 5),
                "plain": torch.zeros(3, 4),
                "lr": 0.1,
                "unused": 1,
            }
            saves.append(helpers.local_save_plan(state))
    _, metadata = helpers.global_save_plan(default_planner.dedup_save_plans(saves))
    with rank_of(rank, 4):
        kinds = every_kind(rank, 4)
        wanted = {fqn: kinds[fqn] for fqn in ("rows", "both", "lr")} | {"plain": torch.zeros(3, 4)}
        for strict in (True, False):
            found = helpers.local_load_plan(wanted, metadata, strict)
            expected = default_planner.create_default_local_load_plan(wanted, metadata, strict)
            assert set(found.items) == set(expected.items)
            assert len(found.items) == len(expected.items) > 3
        partly = helpers.local_load_plan({**wanted, "new": torch.zeros(1)}, metadata, strict=False)
        assert partly == found
    assert helpers.global_load_plan([found, partly]) == [found, partly]


def test_all_missing_keys_are_named_with_what_comes_closest() -> None:
    """And, in the same error, what does not fit."""
    saved = helpers.local_metadata(
        {"model.layer.0.weight": torch.zeros(2), "model.layer.0.bias": torch.zeros(2), "here": torch.zeros(2), "lr": 1}
    )
    wanted = {
        "model.layers.0.weight": torch.zeros(2),
        "model.layers.0.bias": torch.zeros(2),
        "zzzzzz": 1,
        "here": torch.zeros(3),
    }
    with pytest.raises(MissingKeyError) as told:
        helpers.local_load_plan(wanted, saved)
    text = str(told.value)
    assert "'model.layers.0.weight' (it has 'model.layer.0.weight'" in text
    assert "'model.layers.0.bias' (it has 'model.layer.0.bias'" in text
    assert "'zzzzzz'" in text
    assert "'zzzzzz' (" not in text
    assert "here: size (2,) in the checkpoint, (3,) in the state dict" in text


def test_a_name_that_the_state_dict_has_too_is_not_proposed() -> None:
    """It is taken: 'weight2' is missing because it is new, not because 'weight' is meant."""
    saved = helpers.local_metadata({"weight": torch.zeros(2)})
    with pytest.raises(MissingKeyError, match=r"the checkpoint has no 'weight2'$"):
        helpers.local_load_plan({"weight": torch.zeros(2), "weight2": torch.zeros(2)}, saved)


def test_a_thousand_missing_keys_are_all_named_without_comparing_them_all() -> None:
    """Only the first ten are compared, with the likeliest hundred of a bounded number of names."""
    saved = helpers.local_metadata({f"layers.{i}.weight": i for i in range(30_000)})
    wanted = {f"layer.{i}.weight": 0 for i in range(1000)}
    with pytest.raises(MissingKeyError) as told:
        helpers.local_load_plan(wanted, saved)
    text = str(told.value)
    assert all(f"'layer.{i}.weight'" in text for i in range(1000))
    assert "'layer.7.weight' (it has 'layers.7.weight'" in text
    assert text.count("(it has") == 10


def test_all_mismatches_are_named_with_or_without_strict() -> None:
    """Sizes, and objects where tensors were saved; an object's entry fills anything."""
    saved = helpers.local_metadata(
        {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(2), "d": [1], "e": torch.zeros(1)}
    )
    wanted = {"a": torch.zeros(3, 2), "b": torch.zeros(1), "c": 0.1, "d": torch.zeros(5), "e": torch.zeros(1)}
    for strict in (True, False):
        with pytest.raises(PlanError) as told:
            helpers.local_load_plan(wanted, saved, strict)
        assert str(told.value).split("; ") == [
            "a: size (2, 3) in the checkpoint, (3, 2) in the state dict",
            "b: size () in the checkpoint, (1,) in the state dict",
            "c: a tensor in the checkpoint, a float in the state dict",
        ]


def test_a_value_whose_size_is_a_number_is_no_tensor() -> None:
    """As a NumPy array's is; torch fails there with a TypeError about calling an int."""

    saved = helpers.local_metadata({"a": torch.zeros(3)})
    with pytest.raises(PlanError, match="a: a tensor in the checkpoint, a ndarray in the state dict"):
        helpers.local_load_plan({"a": np.zeros(3)}, saved)


# State dicts


def test_tensors_are_replaced_in_place_by_their_kind() -> None:
    """In dicts and lists, which stay the same objects, and in tuples, which keep their type; nothing else changes."""
    Pair = collections.namedtuple("Pair", "left right")
    when = datetime.datetime(2026, 1, 1)
    with rank_of(0, 2):
        tensor = torch.zeros(1)
        rows = dtensor(init_device_mesh("cpu", (2,)), [Shard(0)], 4)
        shards = sharded_tensor(0, 2)
        inner = [tensor, 2]
        untouched = (1, "two")
        state = {
            "list": inner,
            "pair": Pair(tensor, 1),
            "tuple": (rows, None),
            "untouched": untouched,
            "nested": collections.OrderedDict(deep={"shards": shards}),
            "when": when,
        }
        found = helpers.iterate_state_dict(
            state,
            dtensor=lambda value: ("dtensor", value is rows),
            sharded_tensor=lambda value: ("sharded", value is shards),
            tensor=lambda value: ("tensor", value is tensor),
        )
    assert found is state
    assert state["list"] is inner
    assert state["untouched"] is untouched
    assert state["when"] is when
    assert inner == [("tensor", True), 2]
    assert state["pair"] == Pair(("tensor", True), 1)
    assert type(state["pair"]) is Pair
    assert state["tuple"] == (("dtensor", True), None)
    assert state["nested"] == {"deep": {"shards": ("sharded", True)}}


def test_walking_gives_what_torchs_walk_gives() -> None:
    """Of the types that torch knows."""

    def state() -> dict[str, Any]:
        return {"a": torch.zeros(2), "b": [1, {"c": (torch.ones(1), None)}], "d": "text"}

    def double(tensor: torch.Tensor) -> list[float]:
        return (tensor * 2).tolist()

    ours, theirs = state(), state()
    helpers.iterate_state_dict(ours, dtensor=double, sharded_tensor=double, tensor=double)
    planner_helpers._iterate_state_dict(theirs, double, double, double)
    assert ours == theirs


@pytest.mark.parametrize("rank", range(3))
def test_meta_tensors_get_the_memory_that_torch_gives_them(rank: int) -> None:
    """Plain and strided ones, and uneven DTensors, one without a row here; what has memory stays as it is."""

    def state() -> dict[str, Any]:
        line = init_device_mesh("cpu", (3,))
        return {
            "plain": torch.zeros(2, 3, dtype=torch.float16, device="meta"),
            "strided": torch.zeros(2, 3, device="meta").t(),
            "parameter": torch.nn.Parameter(torch.zeros(2, device="meta")),
            "uneven": {"rows": dtensor(line, [Shard(0)], 7, 2, device="meta", requires_grad=True)},
            "few": [dtensor(line, [Shard(1)], 2, 2, device="meta")],
            "replicated": dtensor(line, [Replicate()], 4, device="meta"),
        }

    with rank_of(rank, 3):
        ours, theirs = state(), state()
        kept = ours["kept"] = torch.ones(2)
        helpers.init_state_dict(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planner_helpers._init_state_dict(theirs)
        assert ours.pop("kept") is kept
        flat = [(value, name) for value, name in leaves(ours)]
        for (found, name), (expected, _) in zip(flat, leaves(theirs), strict=True):
            assert type(found) is type(expected), name
            assert found.device == torch.device("cpu")
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert found.requires_grad == expected.requires_grad
            if isinstance(found, DTensor):
                assert found.placements == expected.placements
                assert found.to_local().shape == expected.to_local().shape
                assert found.to_local().device == torch.device("cpu")


def leaves(value: Any, name: str = "") -> Iterator[tuple[Any, str]]:
    """All that is in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}.{key}")
    else:
        yield value, name


def test_one_meta_tensor_under_two_names_stays_one() -> None:
    """Without a process group, where torch's raises; on the device that is asked for."""
    shared = torch.zeros(2, device="meta")
    state = {"a": shared, "b": {"c": shared}, "d": torch.zeros(2, device="meta")}
    helpers.init_state_dict(state, torch.device("cpu"))
    assert state["a"] is state["b"]["c"]  # type: ignore[index]
    assert state["d"] is not state["a"]
    assert not state["a"].is_meta  # type: ignore[union-attr]
    untouched = {"a": torch.zeros(2, device="meta")}
    helpers.init_state_dict(untouched, "meta")
    assert untouched["a"].is_meta


def test_a_group_of_the_cpu_and_of_gpus_means_the_cpu() -> None:
    """torch's rule, for plain tensors."""
    with rank_of(0, 1):
        assert helpers.materialized(torch.zeros(2, device="meta")).device.type == "cpu"
    dist.init_process_group("cpu:fake", rank=0, world_size=1, store=FakeStore())
    try:
        assert helpers.materialized(torch.zeros(2, device="meta")).device.type == "cpu"
    finally:
        dist.destroy_process_group()


def test_a_sharded_tensor_on_meta_is_refused() -> None:
    """There is no public way to give it memory."""
    with rank_of(0, 2):
        shards = [ShardMetadata([2 * each], [2], f"rank:{each}/meta") for each in range(2)]
        metadata = ShardedTensorMetadata(shards, torch.Size((4,)), ShardProperties(dtype=torch.float32))
        local = TensorShard(torch.zeros(2, device="meta"), shards[0])
        value = ShardedTensor._init_from_local_shards_and_global_metadata([local], metadata)
        with pytest.raises(PlanError, match="ShardedTensor on the meta device"):
            helpers.init_state_dict({"a": value})
