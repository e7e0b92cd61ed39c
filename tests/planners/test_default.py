"""The default planners: torch's plans, torch's answers, and where ours differ, why."""

from __future__ import annotations

import collections
import dataclasses
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner as torch_planners
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

import gpudcp
from gpudcp import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.errors import CorruptCheckpointError, MissingKeyError, PlanError, UnsafeCheckpointError
from gpudcp.planners import tensor_write_item
from gpudcp.planners.local import is_whole

pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning")


def ordinary_state() -> dict[str, Any]:
    """What both planners describe alike."""
    return {
        "model": {"weight": torch.arange(12.0).view(3, 4), "bias": torch.zeros(3, dtype=torch.bfloat16)},
        "list": [torch.ones(2), {"a": 1}],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "strided": torch.arange(12).view(3, 4).t(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "lr": 0.1,
        "none": None,
    }


def planned(planner: SavePlanner, state: dict[str, Any]) -> tuple[list[SavePlan], Metadata]:
    planner.set_up_planner(state, is_coordinator=True)
    return planner.create_global_plan([planner.create_local_plan()])


# Saving


@pytest.mark.parametrize("flatten_state_dict", [True, False])
def test_an_ordinary_state_is_planned_as_torch_plans_it(flatten_state_dict: bool) -> None:
    """Items, metadata and planner data, field by field."""
    ours = planned(DefaultSavePlanner(flatten_state_dict), ordinary_state())
    torchs = planned(torch_planners.DefaultSavePlanner(flatten_state_dict), ordinary_state())
    assert ours == torchs
    assert len(ours[0][0].items) > 5


def test_replicas_are_dropped_as_torch_drops_them() -> None:
    """Two ranks with the same tensors, by the argument that torch's planner takes."""
    plans = []
    for kind in (DefaultSavePlanner, torch_planners.DefaultSavePlanner):
        planner = kind(dedup_save_to_lowest_rank=True)
        planner.set_up_planner(ordinary_state(), is_coordinator=True)
        local = planner.create_local_plan()
        plans.append(planner.create_global_plan([local, local]))
    assert plans[0] == plans[1]
    assert sum(len(plan.items) for plan in plans[0][0]) == len(local.items)


def test_every_item_resolves_to_what_torch_resolves_it_to() -> None:
    """Tensors are the very same objects; objects are bytes that load to the same."""
    state = ordinary_state()
    ours, torchs = DefaultSavePlanner(), torch_planners.DefaultSavePlanner()
    (plan,), _ = planned(ours, state)
    planned(torchs, state)
    for item in plan.items:
        mine, theirs = ours.resolve_data(item), torchs.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            assert isinstance(mine, io.BytesIO)
            mine.seek(0)
            theirs.seek(0)
            assert torch.load(mine, weights_only=True) == torch.load(theirs, weights_only=True)
        else:
            assert mine is theirs


def test_the_deprecated_argument_is_warned_of_as_torch_warns(caplog: pytest.LogCaptureFixture) -> None:
    """In the log."""
    with caplog.at_level(logging.WARNING):
        DefaultSavePlanner(dedup_replicated_tensors=True)
    assert "dedup_replicated_tensors" in caplog.text


@pytest.fixture
def plan_cache() -> Iterator[None]:
    """torch's cache of plans is a class attribute: this test starts and leaves it empty."""
    names = [name for name in vars(SavePlanner) if name.startswith("_cached")]
    for name in names:
        getattr(SavePlanner, name).clear()
    yield
    for name in names:
        getattr(SavePlanner, name).clear()


@pytest.mark.usefixtures("plan_cache")
def test_a_changed_dtype_is_seen_though_plan_caching_is_asked_for(tmp_path: Path) -> None:
    """torch's cache compares shapes alone: its second checkpoint says float32 of a bfloat16 tensor."""
    described = {}
    for name, kind in (("ours", DefaultSavePlanner), ("torchs", torch_planners.DefaultSavePlanner)):
        for dtype in (torch.float32, torch.bfloat16):
            planner = kind(enable_plan_caching=True)
            dcp.save({"weight": torch.ones(4, dtype=dtype)}, checkpoint_id=tmp_path / f"{name}{dtype}", planner=planner)
            metadata = dcp.FileSystemReader(tmp_path / f"{name}{dtype}").read_metadata()
            weight = metadata.state_dict_metadata["weight"]
            assert isinstance(weight, TensorStorageMetadata)
            described[name] = weight.properties.dtype
    assert described == {"ours": torch.bfloat16, "torchs": torch.float32}


def without_b(plan: SavePlan) -> SavePlan:
    return dataclasses.replace(plan, items=[item for item in plan.items if item.index.fqn != "b"])


def with_a_as_float16(plan: SavePlan) -> SavePlan:
    for item in plan.items:
        if item.index.fqn == "a" and item.tensor_data is not None:
            item.tensor_data.properties.dtype = torch.float16
    return plan


def with_other_paths(plan: SavePlan) -> SavePlan:
    if not plan.usable:  # as with torch's planner, it has no paths then
        return plan
    return dataclasses.replace(plan, planner_data={**plan.planner_data, "a": ("x", "a"), "more": ("more",)})


def with_a_changed_path(plan: SavePlan) -> SavePlan:
    if plan.usable:
        plan.planner_data["a"] = ("x", "a")  # type: ignore[index]
    return plan


def sorted_by_name(plan: SavePlan) -> SavePlan:
    plan.items.sort(key=lambda item: item.index.fqn)
    return plan


def unchanged(plan: SavePlan) -> SavePlan:
    return plan


CHANGES = [without_b, with_a_as_float16, with_other_paths, with_a_changed_path, sorted_by_name, unchanged]


def changing(base: type[Any], change: Callable[[SavePlan], SavePlan]) -> type[Any]:
    """A default planner whose local plans somebody changes."""

    class Changing(base):  # type: ignore[misc]
        def create_local_plan(self) -> SavePlan:
            return change(super().create_local_plan())

    return Changing


@pytest.mark.parametrize("change", CHANGES)
def test_a_local_plan_that_a_subclass_changes_is_planned_as_torch_plans_it(
    change: Callable[[SavePlan], SavePlan],
) -> None:
    """Items and planner data, replaced or changed in place."""
    state = {"b": torch.zeros(3), "a": torch.ones(3), "c": 1}
    ours, torchs = (
        planned(changing(each, change)(), state) for each in (DefaultSavePlanner, torch_planners.DefaultSavePlanner)
    )
    assert ours == torchs


@pytest.mark.parametrize("change", CHANGES)
def test_a_local_plan_that_a_subclass_changes_may_be_cached(
    tmp_path: Path, change: Callable[[SavePlan], SavePlan]
) -> None:
    """A rank whose plan has not changed says so of what it made, which the coordinator never saw."""
    state = {"b": torch.zeros(3), "a": torch.ones(3), "c": 1}
    once = changing(DefaultSavePlanner, change)()
    expected = dict(gpudcp.save(state, tmp_path / "once", planner=once).state_dict_metadata)
    planner = changing(DefaultSavePlanner, change)(enable_plan_caching=True)
    for step in range(3):
        state["c"] = step
        assert gpudcp.save(state, tmp_path / "cached", planner=planner).state_dict_metadata == expected
        found = {"a": torch.zeros(3), "c": None}
        gpudcp.load(found, tmp_path / "cached")
        assert torch.equal(found["a"], torch.ones(3))  # type: ignore[arg-type]
        assert found["c"] == step


@pytest.mark.parametrize("planner_data", [{"a": "x"}, {"a": ["a"]}, {"a": (None,)}, {1: ("a",)}])
def test_planner_data_that_are_no_paths_are_refused(planner_data: Any) -> None:
    """torch saves them, and fails where it rebuilds a state dict; what is no mapping at all is left alone, as there."""
    planner = changing(DefaultSavePlanner, lambda plan: dataclasses.replace(plan, planner_data=planner_data))()
    with pytest.raises(PlanError, match="is no path in a state dict"):
        planned(planner, {"a": torch.ones(2)})
    planner = changing(DefaultSavePlanner, lambda plan: dataclasses.replace(plan, planner_data="a rank's own"))()
    plans, metadata = planned(planner, {"a": torch.ones(2)})
    assert plans[0].planner_data == "a rank's own"
    assert metadata.planner_data == {"a": ("a",)}


def test_without_flattening_planner_data_are_the_planners_own() -> None:
    """torch looks at them only where it flattens."""
    planner = changing(DefaultSavePlanner, lambda plan: dataclasses.replace(plan, planner_data={"rank": 0}))(False)
    plans, metadata = planned(planner, {"a": torch.ones(2)})
    assert plans[0].planner_data == {"rank": 0}
    assert metadata.planner_data is None


def test_caching_works_where_every_rank_saves_for_itself(tmp_path: Path) -> None:
    """The storage's ticket of this save travels with the word that the plan has not changed."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for step in range(3):
        state = {"a": torch.full((4,), float(step))}
        gpudcp.save(state, tmp_path, planner=planner, use_collectives=False)
        found = {"a": torch.zeros(4)}
        gpudcp.load(found, tmp_path)
        assert torch.equal(found["a"], state["a"])


@pytest.mark.parametrize("base", [DefaultSavePlanner, torch_planners.DefaultSavePlanner])
@pytest.mark.parametrize("is_in_place", [True, False])
def test_values_that_a_subclass_puts_in_place_of_the_planned_ones_are_saved(
    tmp_path: Path, base: type[Any], is_in_place: bool
) -> None:
    """As one that offloads or gathers does, once the plan is made."""

    class Replacing(base):  # type: ignore[misc]
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            replaced = {fqn: value * 10 for fqn, value in self.state_dict.items()}
            if is_in_place:
                self.state_dict.update(replaced)
            else:
                self.state_dict = replaced
            return super().finish_plan(new_plan)  # type: ignore[no-any-return]

    gpudcp.save({"a": torch.ones(4)}, tmp_path, planner=Replacing())
    found = {"a": torch.zeros(4)}
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["a"], torch.full((4,), 10.0))


def test_values_that_a_subclass_puts_in_place_of_the_planned_ones_are_loaded_into(tmp_path: Path) -> None:
    """Tensors of the same shape elsewhere."""
    gpudcp.save({"a": torch.ones(3)}, tmp_path)
    elsewhere: dict[str, torch.Tensor] = {}

    class Replacing(DefaultLoadPlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            elsewhere.update({fqn: torch.zeros_like(value) for fqn, value in self.state_dict.items()})
            self.state_dict = {**elsewhere}
            return super().finish_plan(new_plan)

    gpudcp.load({"a": torch.zeros(3)}, tmp_path, planner=Replacing())
    assert elsewhere["a"].tolist() == [1, 1, 1]


class Parts:
    """Says itself what its items are, under names of its own."""

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [tensor_write_item(f"{fqn}.{name}", torch.empty(2)) for name in "ab"]


@pytest.mark.parametrize("base", [DefaultSavePlanner, torch_planners.DefaultSavePlanner])
def test_a_value_may_choose_the_names_of_its_items(tmp_path: Path, base: type[Any]) -> None:
    """The planner that knows of it looks them up."""

    class Knowing(base):  # type: ignore[misc]
        def lookup_object(self, index: MetadataIndex) -> Any:
            return torch.full((2,), float("ab".index(index.fqn[-1])))

    gpudcp.save({"parts": Parts()}, tmp_path, planner=Knowing())
    found = {"parts.a": torch.ones(2), "parts.b": torch.zeros(2)}
    gpudcp.load(found, tmp_path)
    assert [value.tolist() for value in found.values()] == [[0, 0], [1, 1]]


class Subclass(torch.Tensor):
    """With memory of its own."""


WHOLE: dict[str, tuple[Callable[[], object], bool]] = {
    "plain": (lambda: torch.ones(2), False),
    "parameter": (lambda: torch.nn.Parameter(torch.ones(2)), False),
    "buffer": (lambda: torch.nn.Buffer(torch.ones(2)), False),
    "strided": (lambda: torch.ones(2, 3).t(), False),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8), False),
    "object": (lambda: "text", False),
    "dict": (lambda: {"a": torch.ones(2).to_sparse()}, False),
    "sparse": (lambda: torch.ones(2).to_sparse(), True),
    "sparse_parameter": (lambda: torch.nn.Parameter(torch.ones(2).to_sparse()), True),
    "csr": (lambda: torch.ones(2, 2).to_sparse_csr(), True),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), True),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), True),
    "opaque": (lambda: torch.ones(2, 2).to_mkldnn(), True),
    "subclass": (lambda: torch.ones(2).as_subclass(Subclass), True),
    "wrapper": (lambda: TwoTensor(torch.ones(2), torch.ones(2)), True),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", WHOLE)
def test_what_no_box_describes_is_recognised(kind: str) -> None:
    """Everything but strided tensors of plain memory; what describes itself, as DTensor does, is left to do so."""
    make, expected = WHOLE[kind]
    assert is_whole(make()) == expected
    assert hasattr(DTensor, "__create_write_items__")


def test_what_no_box_describes_is_planned_as_an_object() -> None:
    """By one BYTE_IO item; the planner's own state dict is whole again afterwards."""
    state = {**ordinary_state(), "sparse": torch.ones(3).to_sparse()}
    planner = DefaultSavePlanner()
    (plan,), metadata = planned(planner, state)
    (item,) = [item for item in plan.items if item.index.fqn == "sparse"]
    assert (item.type, item.index) == (WriteItemType.BYTE_IO, MetadataIndex("sparse"))
    assert not isinstance(metadata.state_dict_metadata["sparse"], TensorStorageMetadata)
    assert planner.state_dict["sparse"] is state["sparse"]
    assert planner.plan.items == plan.items or len(planner.plan.items) == len(plan.items)


def test_an_unsavable_dtype_is_refused_before_anything_is_planned() -> None:
    """Wherever it is nested."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": {"b": [torch.empty(2, dtype=torch.int4)]}}, is_coordinator=True)
    with pytest.raises(PlanError, match=r"a\.b\.0: dtype torch\.int4 cannot be saved"):
        planner.create_local_plan()


def test_containers_that_a_safe_load_refuses_as_torch_dumps_them_are_dumped_so_that_it_loads_them() -> None:
    """Deques and defaultdicts among others, without a registration and without trust."""
    values = {
        "deque": collections.deque([1, 2], maxlen=5),
        "defaultdict": (collections.defaultdict(list, {"a": [1]}),),
        "numpy": np.float32(1.5),
        "date": datetime(2026, 1, 2),
        "range": range(3),
    }
    planner, loader = DefaultSavePlanner(), DefaultLoadPlanner()
    (plan,), metadata = planned(planner, values)
    found: dict[str, Any] = dict.fromkeys(values)
    loader.set_up_planner(found, metadata, is_coordinator=True)
    data = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
    for item in loader.create_local_plan().items:
        loader.load_bytes(item, data[item.dest_index.fqn])
    assert found == values
    assert found["deque"].maxlen == 5
    assert found["defaultdict"][0].default_factory is list


# Loading


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the ordinary state."""
    gpudcp.save(ordinary_state(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("flatten_state_dict", [True, False])
def test_a_load_is_planned_as_torch_plans_it(tmp_path: Path, flatten_state_dict: bool) -> None:
    """Item by item."""
    gpudcp.save(ordinary_state(), tmp_path, planner=DefaultSavePlanner(flatten_state_dict))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    plans = []
    for kind in (DefaultLoadPlanner, torch_planners.DefaultLoadPlanner):
        planner = kind(flatten_state_dict)
        planner.set_up_planner(ordinary_state(), metadata, is_coordinator=True)
        plans.append(planner.create_local_plan())
    assert plans[0] == plans[1]
    assert len(plans[0].items) > 5


def test_nested_values_are_put_back_where_they_were(saved: Path) -> None:
    """In place, into the dicts and lists that were given."""
    state: dict[str, Any] = {
        "model": {"weight": torch.zeros(3, 4), "bias": torch.zeros(3, dtype=torch.bfloat16)},
        "list": [torch.zeros(2), {"a": None}],
        "lr": None,
    }
    model, inner = state["model"], state["list"][1]
    gpudcp.load(state, saved)
    assert state["model"] is model
    assert state["list"][1] is inner
    assert inner == {"a": 1}
    assert state["lr"] == 0.1
    assert torch.equal(model["weight"], ordinary_state()["model"]["weight"])


def test_without_flattening_a_nested_dict_is_one_object(tmp_path: Path) -> None:
    """Saved whole, loaded whole; torch's planner loads it into a copy of its own, and the caller gets nothing."""
    state: dict[str, Any] = {"model": {"a": torch.ones(2), "b": 3}, "weight": torch.ones(2)}
    gpudcp.save(state, tmp_path, planner=DefaultSavePlanner(flatten_state_dict=False))
    found: dict[str, Any] = {"model": None, "weight": torch.zeros(2)}
    gpudcp.load(found, tmp_path, planner=DefaultLoadPlanner(flatten_state_dict=False))
    assert torch.equal(found["model"]["a"], state["model"]["a"])
    assert found["model"]["b"] == 3
    assert torch.equal(found["weight"], state["weight"])
    by_torch: dict[str, Any] = {"model": None, "weight": torch.zeros(2)}
    planner = torch_planners.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(by_torch, checkpoint_id=tmp_path, planner=planner)
    assert by_torch["model"] is None
    planner = torch_planners.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(by_torch, checkpoint_id=tmp_path, planner=planner)
    assert by_torch["model"]["b"] == 3


def test_a_partial_load_leaves_what_the_checkpoint_does_not_have(saved: Path) -> None:
    """If it is asked for; a wrong shape is an error all the same."""
    absent = torch.full((2,), 7.0)
    state: dict[str, Any] = {"scalar": torch.tensor(0.0), "absent": absent, "more": {"absent": "kept"}}
    with pytest.raises(MissingKeyError, match=r"the checkpoint has no 'absent', 'more\.absent'"):
        gpudcp.load(state, saved)
    gpudcp.load(state, saved, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert state["scalar"] == 1.5
    assert state["absent"] is absent
    assert torch.equal(absent, torch.full((2,), 7.0))
    assert state["more"] == {"absent": "kept"}
    with pytest.raises(PlanError, match="scalar"):
        gpudcp.load(
            {"scalar": torch.zeros(3), "absent": absent}, saved, planner=DefaultLoadPlanner(allow_partial_load=True)
        )


def test_a_value_of_another_kind_is_an_error(saved: Path) -> None:
    """A number where the checkpoint has a tensor; the reverse takes the object, as in torch."""
    with pytest.raises(PlanError, match="scalar"):
        gpudcp.load({"scalar": 0.0}, saved)
    with pytest.raises(CheckpointException, match="scalar"):
        dcp.load({"scalar": 0.0}, checkpoint_id=saved)
    for load in (gpudcp.load, dcp.load):
        found: dict[str, Any] = {"lr": torch.zeros(())}
        load(found, checkpoint_id=saved)
        assert found == {"lr": 0.1}


def test_a_destination_is_itself_or_its_box() -> None:
    """transform_tensor gives the tensor itself where the whole of it is filled, and torch's box of it else."""
    state = {"weight": torch.arange(12.0).view(3, 4)}
    (plan,), metadata = planned(DefaultSavePlanner(), state)
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    (item,) = planner.create_local_plan().items
    assert planner.resolve_tensor(item) is state["weight"]
    part = item.__class__(
        item.type,
        item.dest_index,
        torch.Size([1, 2]),
        item.storage_index,
        item.storage_offsets,
        torch.Size([2, 1]),
    )
    expected = torch_planners.DefaultLoadPlanner.transform_tensor(planner, part, state["weight"])
    found = planner.resolve_tensor(part)
    assert (found.data_ptr(), found.shape, found.stride()) == (
        expected.data_ptr(),
        expected.shape,
        expected.stride(),
    )
    assert found.data_ptr() == state["weight"][1:, 2:3].data_ptr()
    assert len(plan.items) == 1


class Custom:
    """A type that no list knows."""


@pytest.mark.filterwarnings("ignore:1 object in this checkpoint:UserWarning")
@pytest.mark.parametrize("flatten_state_dict", [True, False])
def test_an_object_is_loaded_with_trust_only(tmp_path: Path, flatten_state_dict: bool) -> None:
    """The planner decides: by its argument, or by the options of a load without a planner."""
    gpudcp.save({"odd": Custom()}, tmp_path, planner=DefaultSavePlanner(flatten_state_dict))
    found: dict[str, Any] = {"odd": None}
    with pytest.raises(UnsafeCheckpointError, match=r"'odd' was not loaded: .*Custom") as told:
        gpudcp.load(found, tmp_path, planner=DefaultLoadPlanner(flatten_state_dict))
    assert told.value.refused.endswith("Custom")
    assert found == {"odd": None}
    gpudcp.load(found, tmp_path, planner=DefaultLoadPlanner(flatten_state_dict, trust_pickle=True))
    assert type(found["odd"]) is Custom
    options = gpudcp.Options(trust_pickle=True)
    for place in (
        {"checkpoint_id": tmp_path, "options": options},
        {"storage_reader": gpudcp.GpuStorageReader(tmp_path, options=options)},
    ):
        found = {"odd": None}
        gpudcp.load(found, **place)  # type: ignore[arg-type]
        assert type(found["odd"]) is Custom


def test_bytes_that_are_no_object_are_corrupt(saved: Path) -> None:
    """The key is named."""
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"lr": 0.0}, dcp.FileSystemReader(saved).read_metadata(), is_coordinator=True)
    (item,) = planner.create_local_plan().items
    with pytest.raises(CorruptCheckpointError, match="object 'lr' cannot be loaded") as told:
        planner.load_bytes(item, io.BytesIO(b"nonsense"))
    assert told.value.fqn == "lr"


@pytest.mark.parametrize("storage", ["ours", "torchs"])
@pytest.mark.parametrize("saver", [DefaultSavePlanner, torch_planners.DefaultSavePlanner])
@pytest.mark.parametrize("loader", [DefaultLoadPlanner, torch_planners.DefaultLoadPlanner])
def test_any_planner_works_with_any_storage_under_any_driver(
    tmp_path: Path, storage: str, saver: type[SavePlanner], loader: type[Any]
) -> None:
    """Two planners, two storages, two drivers: all that is saved is loaded."""
    expected = ordinary_state()
    for number, (save, load) in enumerate(((gpudcp.save, dcp.load), (dcp.save, gpudcp.load))):
        path = tmp_path / str(number)
        writer = gpudcp.GpuStorageWriter(path) if storage == "ours" else dcp.FileSystemWriter(path)
        reader = gpudcp.GpuStorageReader(path) if storage == "ours" else dcp.FileSystemReader(path)
        save(expected, storage_writer=writer, planner=saver())
        found: dict[str, Any] = {
            "model": {"weight": torch.zeros(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)},
            "list": [torch.zeros(2), {"a": 0}],
            "parameter": torch.nn.Parameter(torch.zeros(2)),
            "strided": torch.zeros(4, 3, dtype=torch.int64),
            "scalar": torch.tensor(0.0),
            "empty": torch.empty(0, 3),
            "lr": 0,
            "none": 1,
        }
        load(found, storage_reader=reader, planner=loader())
        assert torch.equal(found["model"]["weight"], expected["model"]["weight"])
        assert torch.equal(found["model"]["bias"], expected["model"]["bias"])
        assert torch.equal(found["list"][0], expected["list"][0])
        assert torch.equal(found["parameter"], expected["parameter"])
        assert torch.equal(found["strided"], expected["strided"])
        assert found["scalar"] == 1.5
        assert (found["list"][1], found["lr"], found["none"]) == ({"a": 1}, 0.1, None)


def test_planners_pickle_before_their_first_use(tmp_path: Path) -> None:
    """As process-based async saves need it."""
    saver = pickle.loads(pickle.dumps(DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)))
    loader = pickle.loads(pickle.dumps(DefaultLoadPlanner(flatten_state_dict=False, trust_pickle=True)))
    assert saver.dedup_save_to_lowest_rank
    assert (loader.flatten_state_dict, loader.trust_pickle) == (False, True)
    gpudcp.save({"weight": torch.ones(2)}, tmp_path, planner=saver)
    found = {"weight": torch.zeros(2)}
    gpudcp.load(found, tmp_path, planner=loader)
    assert torch.equal(found["weight"], torch.ones(2))
