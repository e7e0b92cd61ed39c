"""A planner that remembers: what has not changed is not worked out again, and every change is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planning_cases import rank_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gpudcp.items import WriteItems
from gpudcp.planners.local import LocalItems, LocalItemsMaker


def state(mesh: Any = None) -> dict[str, Any]:
    mesh = mesh or init_device_mesh("cpu", (2,))
    return {
        "sharded": DTensor.from_local(torch.arange(6.0).view(2, 3), mesh, [Shard(0)], run_check=False),
        "parameter": torch.nn.Parameter(torch.ones(4)),
        "plain": torch.zeros(2, 2, dtype=torch.int8),
        "step": 1,
        "name": "first",
    }


def makers() -> tuple[LocalItemsMaker, list[LocalItems]]:
    """One that remembers, and what it has worked out."""
    maker, made = LocalItemsMaker(None, remembers=True), []
    really: Callable[..., LocalItems] = maker._made

    def noted(*arguments: Any) -> LocalItems:
        made.append(really(*arguments))
        return made[-1]

    maker._made = noted  # type: ignore[method-assign]
    return maker, made


def same(found: LocalItems, expected: LocalItems) -> bool:
    one, other = found.columns, expected.columns
    return (
        one.names.fqns == other.names.fqns
        and one.names.paths == other.names.paths
        and list(WriteItems(one)) == list(WriteItems(other))
        and found.offsets == expected.offsets
        and found.values.keys() == expected.values.keys()
        and all(found.values[fqn] is value for fqn, value in expected.values.items())
        and found.tensors.keys() == expected.tensors.keys()
        and all(found.tensors[fqn] is tensor for fqn, tensor in expected.tensors.items())
    )


def test_what_has_not_changed_is_not_worked_out_again() -> None:
    """New values of the same form are not a change, and are the ones that are saved."""
    with rank_of(0, 2):
        maker, made = makers()
        mesh = init_device_mesh("cpu", (2,))
        for step in range(4):
            values = state(mesh) | {"step": step, "name": str(step)}
            assert same(
                maker.make(values, {"step": ("step",)}), LocalItemsMaker(None).make(values, {"step": ("step",)})
            )
        assert len(made) == 1


def _set_data(values: dict[str, Any], key: str, data: torch.Tensor) -> None:
    values[key].data = data


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a dtype": lambda values: _set_data(values, "parameter", torch.ones(4, dtype=torch.float16)),
    "a shape": lambda values: _set_data(values, "plain", torch.ones(3, 2, dtype=torch.int8)),
    "a gradient": lambda values: values["parameter"].requires_grad_(False),
    "a layout": lambda values: values.update(plain=torch.eye(2, dtype=torch.int8).to_sparse()),
    "a nested tensor": lambda values: values.update(plain=torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
    "a type": lambda values: values.update(step=torch.tensor(1)),
    "another type": lambda values: values.update(plain={"object"}),
    "a name": lambda values: values.update(other=values.pop("plain")),
    "the order": lambda values: values.update(plain=values.pop("plain")),
    "a value more": lambda values: values.update(other=5),
    "a value less": lambda values: values.pop("plain"),
    "placements": lambda values: values.update(
        sharded=DTensor.from_local(torch.ones(2, 3), values["sharded"].device_mesh, [Replicate()], run_check=False)
    ),
    "a shard's gradient": lambda values: values["sharded"].requires_grad_(True),
    "a shard's dtype": lambda values: values.update(
        sharded=DTensor.from_local(torch.ones(2, 3).half(), values["sharded"].device_mesh, [Shard(0)], run_check=False)
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    """In place or by another value, and back again; the same items as a planner that remembers nothing."""
    with rank_of(0, 2):
        maker, made = makers()
        mesh = init_device_mesh("cpu", (2,))
        maker.make(state(mesh), None)
        for counted in (2, 3):
            values = state(mesh)
            if counted == 2:
                CHANGES[change](values)
            assert same(maker.make(values, None), LocalItemsMaker(None).make(values, None))
            assert len(made) <= counted
        assert len(made) >= 2


def test_the_state_dict_is_not_kept() -> None:
    """Whoever saves a copy each time has one copy at a time."""
    with rank_of(0, 2):
        maker, made = makers()
        mesh, kept = init_device_mesh("cpu", (2,)), []
        for _ in range(3):
            values = state(mesh)
            kept.append(weakref.ref(values["plain"]))
            maker.make(values, None)
            made[1:] = []
        made.clear()
        del values
        gc.collect()
        assert [each() for each in kept] == [None] * 3


def test_an_equal_mesh_of_another_rank_is_a_change() -> None:
    """A job that begins anew in one process may have another place in the mesh."""
    maker, made = makers()
    for rank in range(2):
        with rank_of(rank, 2):
            sharded = DTensor.from_local(torch.ones(2, 3), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
            assert maker.make({"w": sharded}, None).offsets == {"w": (2 * rank, 0)}
    assert len(made) == 2


def test_memory_of_no_layout_is_not_asked_whether_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """An mkldnn tensor has none, and goes whole."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    maker, _ = makers()
    assert len(maker.make({"m": torch.ones(2).to_mkldnn()}, None).columns) == 1


def test_other_paths_are_a_change() -> None:
    """They go into the checkpoint."""
    with rank_of(0, 2):
        maker, made = makers()
        values = state()
        for paths in ({"step": ("step",)}, {"step": ("a", "step")}):
            assert maker.make(values, paths).columns.names.paths == paths
        assert len(made) == 2
