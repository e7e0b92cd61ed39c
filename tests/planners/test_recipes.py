"""Recipes: saved under gpudcp and under torch, read back by stock torch, bytes compared; and the other way round."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes_child
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner as TorchLoadPlanner
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import gpudcp
from gpudcp import DefaultSavePlanner
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.planners.recipes import (
    DDPLoadBalancingPlanner,
    FP16Planner,
    MetaModelMaterialize,
    RenameLoadPlanner,
    RenameSavePlanner,
    SaveExtraDataPlanner,
)

LOADS: dict[str, Callable[[dict[str, Any], Path, LoadPlanner], None]] = {
    "gpudcp.load": lambda state, path, planner: gpudcp.load(state, path, planner=planner),
    "dcp.load": lambda state, path, planner: dcp.load(
        state, storage_reader=dcp.FileSystemReader(path), planner=planner
    ),
}


def save_under_gpudcp(state: dict[str, Any], path: Path, planner: SavePlanner) -> None:
    gpudcp.save(state, path, planner=planner)


def save_under_torch(state: dict[str, Any], path: Path, planner: SavePlanner) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), planner=planner)


either_save = pytest.mark.parametrize("save", [save_under_gpudcp, save_under_torch])
either_load = pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)


def state_of(number: float) -> dict[str, Any]:
    """Nested, with lists, tensors of several dtypes and objects."""
    return {
        "model": {
            "weight": torch.arange(12.0).view(3, 4) + number,
            "half": torch.full((5,), number, dtype=torch.bfloat16),
        },
        "list": [torch.full((2,), int(number)), {"lr": number}],
        "step": number,
        "betas": [0.9, number],
    }


def read_by_stock(path: Path) -> dict[str, Any]:
    """Everything, as stock torch rebuilds it."""
    found: dict[str, Any] = {}
    dcp.state_dict_loader._load_state_dict(
        found, dcp.FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return found


def check_same(found: Any, expected: Any) -> None:
    """Containers, dtypes, shapes, bits."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    elif isinstance(expected, dict):
        assert sorted(found) == sorted(expected)
        for key, value in expected.items():
            check_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            check_same(mine, theirs)
    else:
        assert found == expected
        assert type(found) is type(expected)


# Renaming


@either_save
def test_a_prefix_is_put_before_every_name(tmp_path: Path, save: Callable[..., None]) -> None:
    """Stock torch reads a nested state dict of the new names."""
    save(state_of(1.0), tmp_path, RenameSavePlanner("ema_"))
    check_same(read_by_stock(tmp_path), {f"ema_{key}": value for key, value in state_of(1.0).items()})


@either_save
def test_a_prefix_is_taken_off_the_names_that_have_it(tmp_path: Path, save: Callable[..., None]) -> None:
    """Of flattened names; the others stay."""
    save(state_of(1.0), tmp_path, RenameSavePlanner("model.", strip=True))
    state = state_of(1.0)
    expected = {
        "weight": state["model"]["weight"],
        "half": state["model"]["half"],
        "list.0": state["list"][0],
        "list.1.lr": 1.0,
        "step": 1.0,
        "betas": state["betas"],
    }
    check_same(read_by_stock(tmp_path), expected)
    nested: dict[str, Any] = {"weight": torch.zeros(3, 4), "list": [torch.zeros(2, dtype=torch.int64), {"lr": 0}]}
    dcp.load(nested, storage_reader=dcp.FileSystemReader(tmp_path))
    check_same(nested, {"weight": state["model"]["weight"], "list": state["list"]})


@either_save
def test_a_callable_renames_what_it_likes(tmp_path: Path, save: Callable[..., None]) -> None:
    """It is given flattened names."""
    given: list[str] = []

    def rename(fqn: str) -> str:
        given.append(fqn)
        return fqn.replace("model.weight", "net.w")

    save(state_of(1.0), tmp_path, RenameSavePlanner(rename))
    assert sorted(given) == ["betas", "list.0", "list.1.lr", "model.half", "model.weight", "step"]
    found = {"net": {"w": torch.zeros(3, 4)}, "model": {"half": torch.zeros(5, dtype=torch.bfloat16)}}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    check_same(
        found, {"net": {"w": state_of(1.0)["model"]["weight"]}, "model": {"half": state_of(1.0)["model"]["half"]}}
    )


@either_load
@either_save
@pytest.mark.parametrize(
    "arguments",
    [
        {"rename": "ema_"},
        {"rename": "model.", "strip": True},
        {"rename": lambda fqn: fqn[::-1]},
        {"rename": lambda fqn: f"deep.{fqn}.end"},
    ],
    ids=["prefix", "strip", "reversed", "wrapped"],
)
def test_what_was_renamed_is_loaded_by_the_same_rule(
    tmp_path: Path, save: Callable[..., None], load: Callable[..., None], arguments: dict[str, Any]
) -> None:
    """Tensors in place, objects and nested lists too."""
    save(state_of(3.0), tmp_path, RenameSavePlanner(**arguments))
    found = state_of(0.0)
    weight = found["model"]["weight"]
    load(found, tmp_path, RenameLoadPlanner(**arguments))
    check_same(found, state_of(3.0))
    assert found["model"]["weight"] is weight


@either_load
def test_a_stock_checkpoint_is_loaded_under_other_names(tmp_path: Path, load: Callable[..., None]) -> None:
    """What stock saved as ``module.*`` goes into a state dict without it; ``strip`` does the reverse."""
    dcp.save({"module": state_of(4.0)["model"], "step": 4}, checkpoint_id=tmp_path)
    found = {"weight": torch.zeros(3, 4), "half": torch.zeros(5, dtype=torch.bfloat16)}
    load(found, tmp_path, RenameLoadPlanner("module."))
    check_same(found, state_of(4.0)["model"])
    wrapped: dict[str, Any] = {"ddp": {"module": {"weight": torch.zeros(3, 4)}, "step": 0}}
    load(wrapped, tmp_path, RenameLoadPlanner("ddp.", strip=True))
    check_same(wrapped, {"ddp": {"module": {"weight": state_of(4.0)["model"]["weight"]}, "step": 4}})


@either_load
@either_save
def test_unflattened_state_dicts_are_renamed_at_the_top(
    tmp_path: Path, save: Callable[..., None], load: Callable[..., None]
) -> None:
    """Each value under its own key, nested ones whole."""
    state = {"a": torch.arange(4.0), "b": {"nested": 1}, 3: "three"}
    for rename in ("x_", lambda key: f"<{key}>"):
        path = tmp_path / str(callable(rename))
        save(state, path, RenameSavePlanner(rename, flatten_state_dict=False))
        names = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
        assert names == ({"x_a", "x_b", "x_3"} if isinstance(rename, str) else {"<a>", "<b>", "<3>"})
        found: dict[str, Any] = {"a": torch.zeros(4), "b": None}
        load(found, path, RenameLoadPlanner(rename, flatten_state_dict=False))
        check_same(found, {"a": torch.arange(4.0), "b": {"nested": 1}})


@pytest.mark.parametrize("planner", [RenameSavePlanner, RenameLoadPlanner])
def test_two_keys_that_would_share_a_name_are_both_named(planner: Callable[..., Any]) -> None:
    """For a callable and for a prefix that is taken off."""
    with pytest.raises(PlanError, match=r"'a\.x' and 'b\.x' would both have the name 'x'"):
        planner(lambda fqn: fqn[2:]).set_up_planner({"a": {"x": 1}, "b": {"x": 2}})
    with pytest.raises(PlanError, match=r"'model\.x' and 'x' would both have the name 'x'"):
        planner("model.", strip=True).set_up_planner({"model": {"x": 1}, "x": 2})


@pytest.mark.parametrize("planner", [RenameSavePlanner, RenameLoadPlanner])
def test_what_is_no_renaming_is_refused(planner: Callable[..., Any]) -> None:
    """At construction, but for what a callable returns."""
    with pytest.raises(PlanError, match="rename=3"):
        planner(3)
    with pytest.raises(PlanError, match="strip=True"):
        planner(str.upper, strip=True)
    with pytest.raises(PlanError, match="'a' was renamed to None"):
        planner(lambda fqn: None).set_up_planner({"a": 1})  # noqa: ARG005


def test_a_key_that_is_missing_is_named_as_the_checkpoint_would() -> None:
    """By its new name."""
    metadata = _metadata_of({"a": torch.zeros(1)})
    planner = RenameLoadPlanner("x_")
    planner.set_up_planner({"a": torch.zeros(1)}, metadata)
    with pytest.raises(MissingKeyError, match="'x_a'"):
        planner.create_local_plan()


def _metadata_of(state: dict[str, Any]) -> Any:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    return planner.create_global_plan([planner.create_local_plan()])[1]


@either_load
def test_a_renamed_load_of_a_part_leaves_the_rest(tmp_path: Path, load: Callable[..., None]) -> None:
    """The default planner's arguments go through, by position too."""
    dcp.save({"x_a": torch.ones(2)}, checkpoint_id=tmp_path)
    found = {"a": torch.zeros(2), "b": torch.zeros(2)}
    load(found, tmp_path, RenameLoadPlanner("x_", True, True, True))
    check_same(found, {"a": torch.ones(2), "b": torch.zeros(2)})


# Extra entries


@either_save
def test_extra_entries_are_saved_beside_the_state_dict(tmp_path: Path, save: Callable[..., None]) -> None:
    """Given once, or made at each save; stock torch finds them by name."""
    counter = iter(range(10))
    planner = SaveExtraDataPlanner(lambda: {"count": next(counter), "rng": {"state": torch.arange(3)}})
    for number in range(2):
        save(state_of(1.0), tmp_path / str(number), planner)
        expected = {**state_of(1.0), "count": number, "rng": {"state": torch.arange(3)}}
        check_same(read_by_stock(tmp_path / str(number)), expected)
    state = state_of(1.0)
    save(state, tmp_path / "fixed", SaveExtraDataPlanner({"config": {"layers": 2}}))
    check_same(read_by_stock(tmp_path / "fixed"), {**state_of(1.0), "config": {"layers": 2}})
    assert "config" not in state


def test_extra_entries_never_replace_others() -> None:
    """All that are there already are named."""
    planner = SaveExtraDataPlanner({"step": 1, "new": 2, "betas": 3})
    with pytest.raises(PlanError, match="already: 'step', 'betas'"):
        planner.set_up_planner(state_of(1.0))


# Balancing


def balanced_plans(states: list[dict[str, Any]]) -> list[SavePlan]:
    """The global plans for ranks that have these."""
    plans = []
    for state in states:
        planner = DDPLoadBalancingPlanner()
        planner.set_up_planner(state, is_coordinator=True)
        plans.append(planner.create_local_plan())
    return planner.create_global_plan(plans)[0]


def nbytes_of(plan: SavePlan) -> int:
    total = 0
    for item in plan.items:
        if item.tensor_data is not None:
            total += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return total


def test_each_replica_is_written_once_and_whole_by_the_rank_with_least_to_write() -> None:
    """The largest first, each where least is so far; an object by the lowest rank."""
    state = {f"t{number}": torch.zeros(size) for number, size in enumerate((2, 9, 4, 4, 8, 3))}
    plans = balanced_plans([{**state, "lr": 0.1}] * 3)
    names = [[item.index.fqn for item in plan.items] for plan in plans]
    assert names == [["t1", "lr"], ["t4", "t5"], ["t0", "t2", "t3"]]
    assert [nbytes_of(plan) for plan in plans] == [36, 44, 40]
    assert all(
        item.type == (WriteItemType.BYTE_IO if item.index.fqn == "lr" else WriteItemType.TENSOR)
        for plan in plans
        for item in plan.items
    )


def test_what_one_rank_alone_has_stays_there_and_counts() -> None:
    """The other ranks take the replicas."""
    shared = {"a": torch.zeros(10), "b": torch.zeros(10)}
    plans = balanced_plans([{**shared, "own": torch.zeros(100)}, shared, shared])
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["own"], ["a"], ["b"]]


def test_what_stays_counts_before_anything_is_shared_out() -> None:
    """Though it is smaller than what is."""
    shared = {"a": torch.zeros(10)}
    plans = balanced_plans([{**shared, "own": torch.zeros(5)}, shared])
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["own"], ["a"]]


def test_objects_go_to_the_lowest_rank_that_has_them() -> None:
    """Whatever it has to write: ranks may have different ones."""
    shared = {"a": torch.zeros(2), "lr": 0.1}
    plans = balanced_plans([shared, {**shared, "rng": 1}, {**shared, "rng": 1}])
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["a", "lr"], ["rng"], []]


def test_tensors_of_another_dtype_count_by_their_bytes() -> None:
    """Not by their elements."""
    plans = balanced_plans(
        [{"small": torch.zeros(6, dtype=torch.int8), "large": torch.zeros(4, dtype=torch.float64)}] * 2
    )
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["large"], ["small"]]


@either_save
def test_one_rank_alone_saves_all(tmp_path: Path, save: Callable[..., None]) -> None:
    """As the default planner does."""
    save(state_of(1.0), tmp_path, DDPLoadBalancingPlanner())
    check_same(read_by_stock(tmp_path), state_of(1.0))


def test_balancing_and_plan_caching_exclude_each_other() -> None:
    """By keyword and by position."""
    with pytest.raises(PlanError, match="enable_plan_caching"):
        DDPLoadBalancingPlanner(enable_plan_caching=True)
    with pytest.raises(PlanError, match="enable_plan_caching"):
        DDPLoadBalancingPlanner(True, True, None, False, True)


@pytest.fixture(scope="module")
def saved_by_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo ranks saved with recipes; each compared what it loaded, too."""
    directory = tmp_path_factory.mktemp("two_ranks")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels"))),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    command = [sys.executable, str(Path(recipes_child.__file__)), "RANK", str(directory)]
    children = [
        subprocess.Popen(
            [str(rank) if part == "RANK" else part for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for child in children:
            output, _ = child.communicate(timeout=60)
            assert child.returncode == 0, output
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return directory


@pytest.mark.parametrize("storage", ["ours", "torchs"])
def test_two_ranks_share_out_what_they_have_alike(saved_by_two_ranks: Path, storage: str) -> None:
    """Both drivers and storages: what stock reads is what was there, and the files are about as large."""
    path = saved_by_two_ranks / storage / "balanced"
    check_same(read_by_stock(path), recipes_child.replicated_state())
    nbytes = {rank: sum(file.stat().st_size for file in path.glob(f"__{rank}_*")) for rank in range(2)}
    payload = 100_100 * 4 + 240
    assert all(0.45 * payload < each < 0.6 * payload for each in nbytes.values())
    metadata = dcp.FileSystemReader(path).read_metadata()
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            assert len(entry.chunks) == (2 if fqn == "sharded" else 1)


@pytest.mark.parametrize("storage", ["ours", "torchs"])
def test_two_ranks_save_renamed_and_with_extra_entries(saved_by_two_ranks: Path, storage: str) -> None:
    """Read back by stock torch."""
    state = recipes_child.replicated_state()
    renamed = read_by_stock(saved_by_two_ranks / storage / "renamed")
    check_same(renamed, {f"net.{key}": value for key, value in state.items()})
    extra = read_by_stock(saved_by_two_ranks / storage / "extra")
    check_same(extra, {**state, "extra": {"epoch": 3}})


# Casting


@either_save
def test_floating_point_tensors_are_saved_as_float16(tmp_path: Path, save: Callable[..., None]) -> None:
    """By stock storage too, which knows no cast; all else is as it was."""
    save(state_of(1.0), tmp_path, FP16Planner())
    expected = state_of(1.0)
    expected["model"] = {key: value.to(torch.float16) for key, value in expected["model"].items()}
    check_same(read_by_stock(tmp_path), expected)


# Modules on the meta device


class Net(torch.nn.Module):
    """Tied weights, a frozen parameter, buffers of which one is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.out = torch.nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.rand(3).half(), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


def check_is_loaded(model: torch.nn.Module, saved: torch.nn.Module) -> None:
    """Every saved byte, in the module itself, and its parameters as they were."""
    check_same(dict(model.state_dict()), dict(saved.state_dict()))
    for (name, mine), (_, theirs) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        assert type(mine) is torch.nn.Parameter, name
        assert mine.requires_grad == theirs.requires_grad
        assert mine.is_leaf


@either_load
@either_save
def test_a_module_made_on_meta_is_loaded(tmp_path: Path, save: Callable[..., None], load: Callable[..., None]) -> None:
    """As one entry of the state dict; tied parameters are one, and only those the module had are there."""
    saved = Net()
    save({"model": saved.state_dict(), "step": 3}, tmp_path, DefaultSavePlanner())
    model = on_meta()
    found = {"model": model.state_dict(), "step": 0}
    load(found, tmp_path, MetaModelMaterialize("cpu", modules={"model": model}))
    check_is_loaded(model, saved)
    check_same(dict(found["model"]), dict(saved.state_dict()))
    assert found["step"] == 3
    assert model.out.weight is model.embed.weight
    assert found["model"]["out.weight"].data_ptr() == found["model"]["embed.weight"].data_ptr()
    assert model.scratch.is_meta


@either_load
def test_a_module_may_be_the_whole_state_dict_or_load_itself(tmp_path: Path, load: Callable[..., None]) -> None:
    """By its own names; and as a Stateful value, whose ``load_state_dict`` the driver calls."""
    saved = Net()
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path / "whole")
    model = on_meta()
    load(model.state_dict(), tmp_path / "whole", MetaModelMaterialize(modules=model))
    check_is_loaded(model, saved)
    dcp.save({"model": saved}, checkpoint_id=tmp_path / "stateful")
    model = on_meta()
    load({"model": model}, tmp_path / "stateful", MetaModelMaterialize(modules={"model": model}))
    check_is_loaded(model, saved)


@either_load
def test_meta_tensors_without_a_module_get_memory(tmp_path: Path, load: Callable[..., None]) -> None:
    """In the state dict, nested ones too; what has memory keeps it."""
    dcp.save(state_of(2.0), checkpoint_id=tmp_path)
    found = state_of(0.0)
    kept = found["model"]["half"]
    found["model"]["weight"] = torch.empty(3, 4, device="meta")
    found["list"][0] = torch.empty(2, dtype=torch.int64, device="meta")
    load(found, tmp_path, MetaModelMaterialize("cpu"))
    check_same(found, state_of(2.0))
    assert found["model"]["half"] is kept


@either_load
def test_what_the_checkpoint_lacks_stays_on_meta_in_a_partial_load(tmp_path: Path, load: Callable[..., None]) -> None:
    """So that nothing uninitialised is taken for loaded."""
    saved = Net()
    partly = {key: value for key, value in saved.state_dict().items() if not key.startswith("norm")}
    dcp.save({"model": partly}, checkpoint_id=tmp_path)
    model = on_meta()
    planner = MetaModelMaterialize("cpu", allow_partial_load=True, modules={"model": model})
    load({"model": model.state_dict()}, tmp_path, planner)
    check_same(model.embed.weight.detach(), saved.embed.weight.detach())
    assert model.norm.weight.is_meta
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.is_meta


@either_load
@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_one_name_of_tied_parameters_is_enough(tmp_path: Path, load: Callable[..., None], name: str) -> None:
    """In a partial load of a checkpoint that has the other one not."""
    saved = torch.rand(6, 4)
    dcp.save({name: saved}, checkpoint_id=tmp_path)
    model = on_meta()
    load(model.state_dict(), tmp_path, MetaModelMaterialize(modules=model, allow_partial_load=True))
    assert model.out.weight is model.embed.weight
    check_same(model.embed.weight.detach(), saved)


def test_a_plan_that_fails_leaves_the_module_as_it_is(tmp_path: Path) -> None:
    """On the meta device."""
    dcp.save({"model": {"other": torch.zeros(1)}}, checkpoint_id=tmp_path)
    model = on_meta()
    with pytest.raises(MissingKeyError):
        gpudcp.load({"model": model.state_dict()}, tmp_path, planner=MetaModelMaterialize(modules={"model": model}))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_module_without_an_entry_is_refused() -> None:
    """Its key is named."""
    planner = MetaModelMaterialize(modules={"encoder": on_meta()})
    with pytest.raises(PlanError, match="'encoder'"):
        planner.set_up_planner({"model": {}})


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_module_sharded_on_meta_is_loaded(tmp_path: Path) -> None:
    """FSDP2's parameters are DTensors, and FSDP2 goes on using those that were assigned."""
    saved = torch.nn.Linear(4, 3)
    gpudcp.save({"model": saved.state_dict()}, tmp_path, no_dist=True)
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    found = {"model": model.state_dict()}
    gpudcp.load(found, tmp_path, planner=MetaModelMaterialize("cpu", modules={"model": model}), no_dist=True)
    local = {name: value.to_local() for name, value in model.state_dict().items()}
    check_same(local, dict(saved.state_dict()))


@pytest.mark.parametrize(
    "planner",
    [
        RenameSavePlanner("x_"),
        RenameLoadPlanner("x_", strip=True),
        SaveExtraDataPlanner({"a": 1}),
        DDPLoadBalancingPlanner(),
        MetaModelMaterialize("cpu"),
    ],
    ids=lambda planner: type(planner).__name__,
)
def test_recipes_pickle_before_their_first_use(planner: Any) -> None:
    """As saves from another process need it."""
    again = pickle.loads(pickle.dumps(planner))
    assert type(again) is type(planner)
    again.set_up_planner({"x_b": torch.zeros(1)})
    assert next(iter(again.state_dict)).endswith("b")


def test_the_stock_loader_reads_all_that_recipes_write(tmp_path: Path) -> None:
    """One recipe on top of the other, through stock's plain dcp.load."""

    class Both(RenameSavePlanner, SaveExtraDataPlanner):
        """Extra entries, then all renamed."""

    planner = Both("v2.", {"version": 2})
    gpudcp.save(state_of(1.0), tmp_path, planner=planner)
    found = {"v2.model": {"weight": torch.zeros(3, 4)}, "version": 0}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path), planner=TorchLoadPlanner())
    check_same(found, {"v2.model": {"weight": state_of(1.0)["model"]["weight"]}, "version": 2})
