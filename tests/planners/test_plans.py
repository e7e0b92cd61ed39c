"""From state dicts to plans and metadata: torch's answers, and where ours differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from planning_cases import chunk, dtensor, every_kind, hints, rank_of, shard_item
from torch.distributed.checkpoint import default_planner, planner_helpers
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    WriteItem,
    WriteItemType,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from gpudcp import planners
from gpudcp.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


# Plans to save


def test_plans_of_four_ranks_become_torchs_metadata() -> None:
    """Local plans, global plans with hints and without, and the Metadata."""
    plans, theirs = [], []
    for rank in range(4):
        with rank_of(rank, 4):
            state = every_kind(rank, 4)
            plans.append(planners.local_save_plan(state))
            theirs.append(default_planner.create_default_local_save_plan(state, rank == 0))
    assert plans == theirs
    deduped = default_planner.dedup_save_plans(plans)
    deduped[1] = dataclasses.replace(deduped[1], planner_data={"a": ("a",)}, storage_data="storage")
    for rewrite in (True, False):
        found = planners.global_save_plan(deduped, rewrite)
        expected = default_planner.create_default_global_save_plan(deduped, rewrite)
        assert found == expected
        assert [hints(plan.items) for plan in found[0]] == [hints(plan.items) for plan in expected[0]]
    assert list(found[1].state_dict_metadata) == list(expected[1].state_dict_metadata)


def test_a_metadata_only_plan_has_the_shards_of_all_ranks() -> None:
    """Of a ShardedTensor, which knows them; the Metadata is torch's."""
    with rank_of(1, 4):
        state = every_kind(1, 4)
        assert planners.metadata_only_plan(state) == planner_helpers._create_default_metadata_only_plan(state)
        found = planners.local_metadata(state)
        assert found == default_planner._create_default_local_metadata(state)
    entry = found.state_dict_metadata["sharded"]
    assert isinstance(entry, TensorStorageMetadata)
    assert len(entry.chunks) == 4


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([planners.tensor_write_item("a", torch.zeros(2)), planners.tensor_write_item("a", torch.zeros(2))], "TENSOR"),
        ([planners.object_write_item("a"), planners.object_write_item("a")], "BYTE_IO"),
        ([shard_item("a", 0), planners.object_write_item("a")], "BYTE_IO"),
        ([planners.object_write_item("a"), shard_item("a", 0)], "SHARD"),
        ([shard_item("a", 0), shard_item("a", 1, dtype=torch.float16)], "torch.float32 .* torch.float16"),
        ([shard_item("a", 0), shard_item("a", 1, rows=3)], r"\(2, 3\).*\(3, 3\)"),
        ([WriteItem(MetadataIndex("a"), WriteItemType.TENSOR)], "without a chunk"),
    ],
)
def test_items_that_contradict_each_other_are_refused(items: list[WriteItem], named: str) -> None:
    """On one rank and on two; torch lets two dtypes or sizes pass."""
    for plans in ([SavePlan(items)], [SavePlan([item]) for item in items]):
        with pytest.raises(PlanError, match=f"a: .*{named}"):
            planners.global_save_plan(plans)


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
    assert planners.plans_equal(SavePlan([item]), SavePlan([same]))
    assert not planners.plans_equal(SavePlan([item]), SavePlan([other]))


def test_plans_that_differ_elsewhere_differ() -> None:
    """Items, their order, type, name, hint; use; mappings. What the writer put in does not count."""
    a, b = shard_item("a", 0), shard_item("b", 0)
    plan = SavePlan([a, b], planner_data={"a": ("a",)})
    for other in (
        dataclasses.replace(plan, items=[a]),
        dataclasses.replace(plan, items=[b, a]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, type=WriteItemType.TENSOR)]),
        dataclasses.replace(plan, items=[a, planners.object_write_item("b")]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, index=MetadataIndex("b", (0, 0), 1))]),
        dataclasses.replace(plan, items=[a, dataclasses.replace(b, index=MetadataIndex("b", (1, 0)))]),
        dataclasses.replace(plan, usable=False),
        dataclasses.replace(plan, planner_data={"a": ("x", "a")}),
    ):
        assert not planners.plans_equal(plan, other)
        assert not planners.plans_equal(other, plan)
    assert planners.plans_equal(plan, dataclasses.replace(plan, storage_data="other"))


def test_ranks_without_a_new_plan_keep_their_cached_one() -> None:
    """As torch merges; another number of ranks is refused, where torch drops the last ones."""
    old = [SavePlan([planners.object_write_item(f"old{rank}")]) for rank in range(3)]
    unchanged = SavePlan([], usable=False)
    new = SavePlan([planners.object_write_item("new")])
    empty = SavePlan([])
    for deltas in ([unchanged, new, empty], [unchanged] * 3, [new] * 3):
        assert planners.merge_delta_plans(old, deltas) == planner_helpers._merge_delta_local_plans(old, deltas)
    assert planners.merge_delta_plans(old, [unchanged, new, empty]) == [old[0], new, empty]
    with pytest.raises(PlanError, match="plans of 2 ranks, and cached ones of 3"):
        planners.merge_delta_plans(old, [unchanged] * 2)


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
            saves.append(planners.local_save_plan(state))
    _, metadata = planners.global_save_plan(default_planner.dedup_save_plans(saves))
    with rank_of(rank, 4):
        kinds = every_kind(rank, 4)
        wanted = {fqn: kinds[fqn] for fqn in ("rows", "both", "lr")} | {"plain": torch.zeros(3, 4)}
        for strict in (True, False):
            found = planners.local_load_plan(wanted, metadata, strict)
            expected = default_planner.create_default_local_load_plan(wanted, metadata, strict)
            assert set(found.items) == set(expected.items)
            assert len(found.items) == len(expected.items) > 3
        partly = planners.local_load_plan({**wanted, "new": torch.zeros(1)}, metadata, strict=False)
        assert partly == found
    assert planners.global_load_plan([found, partly]) == [found, partly]


def test_all_mismatches_are_named_with_or_without_strict() -> None:
    """Sizes, and objects where tensors were saved; an object's entry fills anything."""
    saved = planners.local_metadata(
        {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(2), "d": [1], "e": torch.zeros(1)}
    )
    wanted = {"a": torch.zeros(3, 2), "b": torch.zeros(1), "c": 0.1, "d": torch.zeros(5), "e": torch.zeros(1)}
    for strict in (True, False):
        with pytest.raises(PlanError) as told:
            planners.local_load_plan(wanted, saved, strict)
        assert str(told.value).split("; ") == [
            "a: size (2, 3) in the checkpoint, (3, 2) in the state dict",
            "b: size () in the checkpoint, (1,) in the state dict",
            "c: a tensor in the checkpoint, a float in the state dict",
        ]


def test_a_value_whose_size_is_a_number_is_no_tensor() -> None:
    """As a NumPy array's is; torch fails there with a TypeError about calling an int."""

    saved = planners.local_metadata({"a": torch.zeros(3)})
    with pytest.raises(PlanError, match="a: a tensor in the checkpoint, a ndarray in the state dict"):
        planners.local_load_plan({"a": np.zeros(3)}, saved)
