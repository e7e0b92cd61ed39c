"""From values to items: torch's answers, and where ours differ."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import PROPERTY, Checkpointable, chunk, dtensor, every_kind, hints, rank_of, sharded_tensor
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
)
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from gpudcp import planners
from gpudcp.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


# Values and their items


@pytest.mark.parametrize("rank", range(4))
def test_every_kind_of_value_gives_torchs_items_and_chunks(rank: int) -> None:
    """On each of four ranks; and their read items from a checkpoint of one whole chunk each."""
    with rank_of(rank, 4):
        for fqn, value in every_kind(rank, 4).items():
            expected = planner_helpers._create_write_items(fqn, value)
            found = planners.write_items_for(fqn, value)
            assert found == expected, fqn
            assert hints(found) == hints(expected)
            entry: Any = BytesStorageMetadata()
            if isinstance(value, torch.Tensor):
                assert planners.chunk_list(value) == planner_helpers._create_chunk_list(value), fqn
                whole = chunk((0,) * value.ndim, tuple(value.shape))
                entry = TensorStorageMetadata(TensorProperties(), value.size(), [whole])
            assert planners.read_items_for(fqn, entry, value) == planner_helpers._create_read_items(fqn, entry, value)


def test_requires_grad_of_a_dtensor_is_its_own_with_and_without_gradients() -> None:
    """torch's item follows the local tensor's when gradients are off, so that a plan changes with the caller's mode."""
    with rank_of(0, 2):
        value = dtensor(init_device_mesh("cpu", (2,)), [Shard(0)], 4, requires_grad=True)
        (item,) = planners.write_items_for("a", value)
        assert [item] == planner_helpers._create_write_items("a", value)
        with torch.no_grad():
            assert planners.write_items_for("a", value) == [item]
            assert planner_helpers._create_write_items("a", value) != [item]
    assert item.tensor_data is not None
    assert item.tensor_data.properties.requires_grad


def test_a_dtensor_outside_of_this_ranks_mesh_gives_nothing() -> None:
    """No items to write, none to read, no chunks; and no shard."""
    with rank_of(3, 4):
        value = dtensor(DeviceMesh("cpu", [0, 1]), [Shard(0)], 4, 2)
        entry = TensorStorageMetadata(TensorProperties(), value.size(), [chunk((0, 0), (4, 2))])
        assert planners.write_items_for("a", value) == []
        assert planners.chunk_list(value) == []
        assert planners.read_items_for("a", entry, value) == []
        assert planners.local_save_plan({"a": value}) == default_planner.create_default_local_save_plan(
            {"a": value}, False
        )
        metadata = Metadata({"a": entry})
        assert planners.local_load_plan({"a": value}, metadata) == LoadPlan([])
        assert default_planner.create_default_local_load_plan({"a": value}, metadata) == LoadPlan([])
        assert planners.metadata_only_plan({"a": value}).items == []
        with pytest.raises(PlanError, match="a: this rank holds nothing"):
            planners.find_shard(value, MetadataIndex("a", (0, 0)))


def test_a_partial_dtensor_is_refused() -> None:
    """As torch refuses it, for writing, reading and looking up."""
    with rank_of(0, 2):
        value = dtensor(init_device_mesh("cpu", (2,)), [Partial()], 4)
        for call in (
            lambda: planners.write_items_for("a", value),
            lambda: planners.chunk_list(value, fqn="a"),
            lambda: planners.find_shard(value, MetadataIndex("a", (0,))),
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
        (found,) = planners.chunk_list(value)
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
            lambda: planners.write_items_for("a", value),
            lambda: planners.read_items_for("a", entry, value),
            lambda: planners.find_shard(value, MetadataIndex("a", (0,))),
        ):
            with pytest.raises(PlanError, match=r"^a: .*no box describes a shard"):
                call()


def test_a_checkpointable_object_describes_itself() -> None:
    """Its items, chunks and shards are its answers, though it is no tensor."""
    value = Checkpointable()
    items = planners.write_items_for("a", value)
    assert items == planner_helpers._create_write_items("a", value)
    assert len(items) == 2
    assert planners.chunk_list(value) == value.__create_chunk_list__()
    assert planners.find_shard(value, MetadataIndex("a", (1, 0))) is value.rows[1]
    metadata = Metadata({"a": TensorStorageMetadata(TensorProperties(), value.size(), value.__create_chunk_list__())})
    plan = planners.local_load_plan({"a": value}, metadata)
    assert plan == default_planner.create_default_local_load_plan({"a": value}, metadata)
    assert len(plan.items) == 2


def test_what_describes_its_chunks_needs_no_size() -> None:
    """Nothing is compared then."""

    class Chunked:
        def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
            return [chunk((1,), (1,))]

    metadata = Metadata({"a": TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])})
    for value in (Chunked(), type("Sized", (Chunked,), {"size": 7})()):
        (item,) = planners.local_load_plan({"a": value}, metadata).items
        assert (item.storage_offsets, item.lengths) == ((1,), (1,))


def test_the_local_tensor_of_a_dtensor_may_describe_itself() -> None:
    """torch's LocalShardsWrapper: several shards of one rank, which the DTensor's placements do not tell of."""
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    with rank_of(0, 2):
        local = LocalShardsWrapper([torch.zeros(2, 2), torch.ones(1, 2)], [(0, 0), (2, 0)])
        mesh = init_device_mesh("cpu", (2,))
        value = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((6, 2)), stride=(2, 1))
        items = planners.write_items_for("a", value)
        assert items == planner_helpers._create_write_items("a", value)
        assert [item.index.offset for item in items] == [(0, 0), (2, 0)]
        assert planners.chunk_list(value) == planner_helpers._create_chunk_list(value)
        index = MetadataIndex("a", (2, 0))
        assert planners.find_shard(value, index) is find_state_dict_object({"a": value}, index)


def test_what_is_no_tensor_has_no_chunks() -> None:
    """Nor can it be filled from a tensor; torch blames the metadata there."""
    with pytest.raises(PlanError, match="a list is no tensor"):
        planners.chunk_list([1])
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])
    with pytest.raises(PlanError, match="a: a tensor in the checkpoint, a list in the state dict"):
        planners.read_items_for("a", entry, [1])


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
        found = planners.read_items_for_chunk_list("a", metadata, local)
        expected = planner_helpers.create_read_items_for_chunk_list("a", metadata, local)
        by_hint = sorted(expected, key=lambda item: (item.dest_index.index, item.storage_index.index))
        assert found == by_hint
        assert hints(found) == hints(by_hint)

    check()


def test_chunks_of_other_dimensions_are_refused() -> None:
    """Both numbers are named."""
    entry = TensorStorageMetadata(TensorProperties(), torch.Size((2,)), [chunk((0,), (2,))])
    with pytest.raises(PlanError, match=r"a: saved chunks have 1 dim.* 2$"):
        planners.read_items_for_chunk_list("a", entry, [chunk((0, 0), (2, 1))])


# Shards


@pytest.mark.parametrize("rank", range(2))
def test_an_index_names_what_torch_finds(rank: int) -> None:
    """Of every item that a state dict has: the same memory, or the very same object."""
    with rank_of(rank, 2):
        state = every_kind(rank, 2)
        for item in planners.local_save_plan(state).items:
            found = planners.find_shard(state[item.index.fqn], item.index)
            expected = find_state_dict_object(state, item.index)
            if isinstance(expected, torch.Tensor):
                assert found.data_ptr() == expected.data_ptr()
                assert (found.shape, found.stride()) == (expected.shape, expected.stride())
                assert torch.equal(found, expected)
            else:
                assert found is expected
        plain = state["plain"]
        assert planners.find_shard(plain, MetadataIndex("plain")) is plain
        whole = planners.find_shard(state["rows"], MetadataIndex("rows"))
        assert torch.equal(whole, state["rows"].to_local())


def test_an_index_hint_that_is_wrong_does_no_harm() -> None:
    """The shard is searched for by its offset."""
    with rank_of(1, 2):
        value = sharded_tensor(1, 2)
        for hint in (None, 0, 1, 7, -1):
            found = planners.find_shard(value, MetadataIndex("a", (2, 0), hint))
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
                planners.find_shard(value, index)
            with pytest.raises(ValueError, match=r"'a'|a since"):
                find_state_dict_object({"a": value}, index)
        with pytest.raises(PlanError, match=r"a: no shard at \(0, 0\) here: this rank's starts at \(2, 0\)"):
            planners.find_shard(rows, MetadataIndex("a", (0, 0)))
        assert find_state_dict_object({"a": rows}, MetadataIndex("a", (0, 0))) is not None
