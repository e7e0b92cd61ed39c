"""Where the destinations of a load are, as far as a target can tell before they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import gpudcp
from gpudcp.executors.select import Selection
from gpudcp.storage import reader
from gpudcp.storage.targets import PlannerTarget


class Asked(gpudcp.DefaultLoadPlanner):
    """Has destinations of its own."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item)


def devices_seen(state: dict[str, Any], directory: Path, planner: Any, patch: pytest.MonkeyPatch) -> Any:
    """What the choice of an executor hears of a load's devices."""
    seen, inner = [], reader.select

    def select(*args: Any, devices: Any, **kwargs: Any) -> Selection:
        seen.append(devices())
        return inner(*args, devices=devices, **kwargs)

    with patch.context() as own:
        own.setattr(reader, "select", select)
        gpudcp.load(state, directory, planner=planner)
    (found,) = seen
    return found


@pytest.mark.parametrize("is_of_stock", [True, False])
def test_devices_are_known_whoever_saved_and_however_little(
    tmp_path: Path, is_of_stock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a checkpoint without an index, whose items are no columns; also those of parameters."""
    saved = {"weight": torch.arange(6.0), "parameter": torch.arange(3.0), "object": "text"}
    (dcp.save if is_of_stock else gpudcp.save)(saved, checkpoint_id=tmp_path)
    state: dict[str, Any] = {"weight": torch.zeros(6), "parameter": torch.nn.Parameter(torch.zeros(3)), "object": ""}
    assert devices_seen(state, tmp_path, None, monkeypatch) == {torch.device("cpu")}
    assert torch.equal(state["weight"], saved["weight"])
    assert torch.equal(state["parameter"].detach(), saved["parameter"])
    assert state["object"] == "text"
    assert devices_seen({"object": ""}, tmp_path, None, monkeypatch) == set()


def test_a_planner_of_another_kind_is_not_asked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may make its destinations one by one, and have no room for all of them."""
    gpudcp.save({"weight": torch.arange(6.0)}, tmp_path)
    for planner in (Asked(), dcp.DefaultLoadPlanner()):
        assert devices_seen({"weight": torch.zeros(6)}, tmp_path, planner, monkeypatch) is None


def test_a_target_knows_where_the_destinations_are_that_it_need_not_ask_for() -> None:
    """For the others there is no answer before they are resolved."""
    target = PlannerTarget([], gpudcp.DefaultLoadPlanner())
    target._found = [torch.zeros(3), None]
    assert target.device_of(0) == torch.device("cpu")
    assert target.device_of(1) is None
    target._found = None
    assert target.device_of(0) is None
