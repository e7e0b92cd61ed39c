"""Whole checkpoints of a state dict on several devices: files by device, read by stock, by gpudcp, and into others."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from executor_fakes import OneOfSeveral, random_tensor
from executor_rings import executor_of

import gpudcp
from gpudcp.chunkplan import save as save_module
from gpudcp.executors import lanes as lanes_of_process
from gpudcp.executors.select import Selection
from gpudcp.storage import reader, writer
from gpudcp.storage.sources import PlannerSource
from gpudcp.storage.targets import PlannerTarget

State = dict[str, Any]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[OneOfSeveral]:
    """Two, which every transfer chooses, by buffered files and four threads."""
    devices = [OneOfSeveral(0), OneOfSeveral(1)]

    def select(*_: Any, **__: Any) -> Selection:
        executor = executor_of(*devices, lanes=4, threads=4, slab_nbytes=32768)
        names = [device.torch_device for device in devices]
        return Selection(executor, "buffered", 4, "cpu", ("for a test", ""), executor._notes, names)

    def owner(tensor: torch.Tensor | None) -> OneOfSeveral | None:
        return next((device for device in devices if tensor is not None and device.owns(tensor)), None)

    def groups(self: Any, chosen: Any) -> list[int] | None:
        # As tensors say by themselves where there are GPUs.
        found = self._found
        self._found = [SimpleNamespace(device=own and own.torch_device) for own in map(owner, found)]
        numbers = of_tensors(self, chosen)
        self._found = found
        return numbers

    def device_of(self: Any, position: int) -> torch.device | None:
        own = owner(self._found[position])
        return own and own.torch_device

    of_tensors = PlannerSource.groups
    monkeypatch.setattr(PlannerSource, "groups", groups)
    monkeypatch.setattr(PlannerTarget, "device_of", device_of)
    monkeypatch.setattr(writer, "select", select)
    monkeypatch.setattr(reader, "select", select)
    monkeypatch.setattr(lanes_of_process, "_free", {})
    return devices


def state_on(devices: list[OneOfSeveral]) -> State:
    """Layers on both devices, AdamW's steps on the host, an empty tensor, a number and an object."""
    state: State = {"note": "an object", "epoch": 3, "nothing": devices[1].place(torch.empty(0, 4))}
    for number, device in enumerate(devices):
        for layer in range(3):
            name, seed = f"layers.{number}.{layer}", 10 * number + layer
            state[f"{name}.weight"] = device.place(random_tensor(60, 50, dtype=torch.int32, seed=seed))
            state[f"{name}.step"] = torch.tensor(float(seed))
    return state


def blank(state: State, devices: list[OneOfSeveral]) -> State:
    """Destinations for it, on these devices."""
    found: State = {"note": "", "epoch": 0}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            zeros = torch.zeros_like(value)
            found[name] = devices[int(name.split(".")[1])].place(zeros) if "weight" in name else zeros
    return found


def is_same(found: State, expected: State) -> bool:
    return all(
        torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        for name, value in expected.items()
    )


def paths_by_device(directory: Path) -> list[set[str]]:
    """The files that hold the weights of either device."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    weights = [(index.fqn, record) for index, record in metadata.storage_data.items() if "weight" in index.fqn]
    return [{record.relative_path for fqn, record in weights if f"layers.{n}" in fqn} for n in range(2)]


@pytest.mark.parametrize("has_full_files", [False, True], ids=["a file each", "two files each"])
def test_a_checkpoint_of_two_devices_is_read_by_stock_and_by_gpudcp(
    tmp_path: Path, devices: list[OneOfSeveral], has_full_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device's tensors in files of its own; onto the same devices, onto exchanged ones, by the cpu executor."""
    if has_full_files:
        monkeypatch.setattr(save_module, "FULL_FILE_NBYTES", 10_000)
    state = state_on(devices)
    gpudcp.save(dict(state), tmp_path)
    first, second = paths_by_device(tmp_path)
    assert len(first) == len(second) == (2 if has_full_files else 1)
    assert not first & second
    assert {path.name for path in tmp_path.glob("*.distcp")} == first | second
    assert gpudcp.verify(tmp_path).ok

    by_stock = blank(state, devices)
    dcp.load(by_stock, checkpoint_id=tmp_path)
    assert is_same(by_stock, state)
    for order in (devices, devices[::-1]):
        found = blank(state, order)
        by_gpudcp = gpudcp.GpuStorageReader(tmp_path)
        gpudcp.load(found, storage_reader=by_gpudcp)
        assert is_same(found, state)
        assert by_gpudcp.report is not None
        assert by_gpudcp.report.executor == "interpret"
    monkeypatch.undo()
    found = blank(state, devices)
    gpudcp.load(found, tmp_path)
    assert is_same(found, state)


def test_stocks_checkpoint_is_loaded_onto_two_devices(tmp_path: Path, devices: list[OneOfSeveral]) -> None:
    """One file, in which their tensors lie between each other."""
    state = state_on(devices)
    dcp.save(state, checkpoint_id=tmp_path)
    found = blank(state, devices)
    gpudcp.load(found, tmp_path)
    assert is_same(found, state)
    assert {str(device) for device, _ in lanes_of_process._free} == {"cpu:0", "cpu:1"}


def test_the_next_save_takes_the_lanes_of_the_last(tmp_path: Path, devices: list[OneOfSeveral]) -> None:
    """And what it replaces, files of both devices, is removed."""
    state = state_on(devices)
    gpudcp.save(dict(state), tmp_path)
    kept = {id(lane) for lanes in lanes_of_process._free.values() for lane in lanes}
    before = {path.name for path in tmp_path.glob("*.distcp")}
    gpudcp.save(dict(state), tmp_path)
    assert {id(lane) for lanes in lanes_of_process._free.values() for lane in lanes} == kept
    after = {path.name for path in tmp_path.glob("*.distcp")}
    assert len(before) == len(after) == 2
    assert not before & after
