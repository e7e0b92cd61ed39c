"""Walking over state dicts and giving them memory: torch's answers, and where ours differ."""

from __future__ import annotations

import collections
import datetime
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planning_cases import dtensor, leaves, rank_of, sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpudcp import planners
from gpudcp.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


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
        found = planners.iterate_state_dict(
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
    planners.iterate_state_dict(ours, dtensor=double, sharded_tensor=double, tensor=double)
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
        planners.init_state_dict(ours)
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


def test_one_meta_tensor_under_two_names_stays_one() -> None:
    """Without a process group, where torch's raises; on the device that is asked for."""
    shared = torch.zeros(2, device="meta")
    state = {"a": shared, "b": {"c": shared}, "d": torch.zeros(2, device="meta")}
    planners.init_state_dict(state, torch.device("cpu"))
    assert state["a"] is state["b"]["c"]  # type: ignore[index]
    assert state["d"] is not state["a"]
    assert not state["a"].is_meta  # type: ignore[union-attr]
    untouched = {"a": torch.zeros(2, device="meta")}
    planners.init_state_dict(untouched, "meta")
    assert untouched["a"].is_meta


def test_a_group_of_the_cpu_and_of_gpus_means_the_cpu() -> None:
    """torch's rule, for plain tensors."""
    with rank_of(0, 1):
        assert planners.materialized(torch.zeros(2, device="meta")).device.type == "cpu"
    dist.init_process_group("cpu:fake", rank=0, world_size=1, store=FakeStore())
    try:
        assert planners.materialized(torch.zeros(2, device="meta")).device.type == "cpu"
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
            planners.init_state_dict({"a": value})
