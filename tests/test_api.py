"""`gpudcp.save` and `gpudcp.load`: arguments, Stateful values, and what is left when a call fails."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

import gpudcp
from gpudcp.errors import CheckpointBusyError, GpuDcpError, PlanError, RankFailedError


class Recording:
    """A Stateful object that notes what is called, in a list shared with others."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls
        self.value: Any = torch.zeros(2)
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        self.calls.append(f"{self.name}.state_dict")
        return {"value": self.value, "note": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(f"{self.name}.load_state_dict")
        self.loaded = state


# Arguments


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_place_is_needed(nothing: str | None) -> None:
    """An id, or a storage that has one."""
    with pytest.raises(PlanError, match="a checkpoint_id is needed where no storage_writer is given"):
        gpudcp.save({}, nothing)
    with pytest.raises(PlanError, match="a checkpoint_id is needed where no storage_reader is given"):
        gpudcp.load({}, nothing)


def test_options_go_to_the_storage_that_is_given(tmp_path: Path) -> None:
    """Not beside it, where they would be ignored."""
    options = gpudcp.Options()
    with pytest.raises(PlanError, match="options go to the storage_writer"):
        gpudcp.save({}, storage_writer=gpudcp.GpuStorageWriter(tmp_path), options=options)
    with pytest.raises(PlanError, match="options go to the storage_reader"):
        gpudcp.load({}, storage_reader=gpudcp.GpuStorageReader(tmp_path), options=options)


def test_paths_may_be_strings_or_path_objects(tmp_path: Path) -> None:
    """By position and by keyword."""
    gpudcp.save({"a": torch.ones(2)}, str(tmp_path / "one"))
    gpudcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "two")
    for place in (tmp_path / "one", str(tmp_path / "two")):
        found = {"a": torch.zeros(2)}
        gpudcp.load(found, place)
        assert torch.equal(found["a"], torch.ones(2))


def test_a_storage_is_reset_to_the_id_that_is_given(tmp_path: Path) -> None:
    """As torch does, with any storage."""
    for writer in (gpudcp.GpuStorageWriter(tmp_path / "wrong"), dcp.FileSystemWriter(tmp_path / "wrong")):
        place = tmp_path / type(writer).__name__
        gpudcp.save({"a": torch.ones(2)}, place, storage_writer=writer)
        for reader in (gpudcp.GpuStorageReader(tmp_path / "wrong"), dcp.FileSystemReader(tmp_path / "wrong")):
            found = {"a": torch.zeros(2)}
            gpudcp.load(found, place, storage_reader=reader)
            assert torch.equal(found["a"], torch.ones(2))
    assert not (tmp_path / "wrong").exists()


def test_the_options_reach_the_writer_the_reader_and_the_planner(tmp_path: Path) -> None:
    """Each of them seen by what it does."""
    gpudcp.save({"a": torch.ones(2)}, tmp_path, options=gpudcp.Options(checksum=False))
    (record,) = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert record.gpudcp[2] is None
    with pytest.raises(PlanError, match=r"Options\(verify='often'\)"):
        gpudcp.load({"a": torch.ones(2)}, tmp_path, options=gpudcp.Options(verify="often"))  # type: ignore[arg-type]


def test_a_save_returns_what_the_checkpoint_says(tmp_path: Path) -> None:
    """torch's Metadata, equal to the one on disk but for what a reader adds to it."""
    metadata = gpudcp.save({"a": {"b": torch.ones(2, 3)}, "n": 1}, tmp_path)
    assert isinstance(metadata, Metadata)
    on_disk = dcp.FileSystemReader(tmp_path).read_metadata()
    assert metadata.state_dict_metadata == on_disk.state_dict_metadata
    assert metadata.planner_data == on_disk.planner_data == {"a.b": ("a", "b"), "n": ("n",)}
    assert metadata.storage_data == on_disk.storage_data
    assert metadata.version == on_disk.version
    described = metadata.state_dict_metadata["a.b"]
    assert isinstance(described, TensorStorageMetadata)
    assert described.size == (2, 3)


# Stateful values


def test_a_long_name_is_a_name(tmp_path: Path) -> None:
    """What is saved is loaded, by stock too."""
    name = "layers." * 20_000
    gpudcp.save({name: torch.ones(2)}, tmp_path)
    for load in (gpudcp.load, dcp.load):
        found = {name: torch.zeros(2)}
        load(found, checkpoint_id=tmp_path)
        assert torch.equal(found[name], torch.ones(2))


def test_stateful_values_are_asked_as_torch_asks_them(tmp_path: Path) -> None:
    """The same calls in the same order, whatever the order of the keys: as written on save, sorted on load."""
    recordings: list[list[str]] = []
    for name, save, load in (("torch", dcp.save, dcp.load), ("gpudcp", gpudcp.save, gpudcp.load)):
        calls: list[str] = []
        values = {key: Recording(key, calls) for key in ("c", "a", "b")}
        for number, value in enumerate(values.values()):
            value.value = torch.full((2,), float(number))
        save({"plain": 5, **values}, checkpoint_id=tmp_path / name)
        others = {key: Recording(key, calls) for key in ("b", "c", "a")}
        found: dict[str, Any] = {**others, "plain": 0}
        load(found, checkpoint_id=tmp_path / name)
        assert all(found[key] is others[key] for key in others)
        assert found["plain"] == 5
        for number, key in enumerate(("c", "a", "b")):
            assert torch.equal(others[key].loaded["value"], torch.full((2,), float(number)))
            assert others[key].loaded["note"] == key
        recordings.append(calls)
    assert recordings[1] == recordings[0]
    assert recordings[1] == [
        *(f"{key}.state_dict" for key in ("c", "a", "b")),
        *(f"{key}.state_dict" for key in ("a", "b", "c")),
        *(f"{key}.load_state_dict" for key in ("a", "b", "c")),
    ]


def test_modules_and_optimizers_are_stateful(tmp_path: Path) -> None:
    """Their parameters are loaded in place."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    gpudcp.save({"model": model, "optimizer": optimizer}, tmp_path)
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    other(torch.zeros(1, 3)).sum().backward()
    other_optimizer.step()
    weight = other.weight
    gpudcp.load({"model": other, "optimizer": other_optimizer}, tmp_path)
    assert other.weight is weight
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.param_groups[0]["lr"] == 0.5
    for mine, theirs in zip(other_optimizer.state.values(), optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


class StatefulTensor(torch.Tensor):
    """A tensor with the two methods."""

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_a_tensor_is_never_stateful(tmp_path: Path) -> None:
    """Not even one of a class that has the two methods."""
    with torch.serialization.safe_globals([StatefulTensor]):
        gpudcp.save({"odd": torch.ones(2).as_subclass(StatefulTensor)}, tmp_path)
        found: dict[str, Any] = {"odd": torch.zeros(2).as_subclass(StatefulTensor)}
        gpudcp.load(found, tmp_path)
    assert type(found["odd"]) is StatefulTensor
    assert torch.equal(found["odd"].as_subclass(torch.Tensor), torch.ones(2))


def test_values_that_become_stateful_are_asked_though_their_type_was_met_before(tmp_path: Path) -> None:
    """What a type is, is decided by its methods, once; classes of one name are told apart."""

    def make(is_stateful: bool) -> Any:
        if is_stateful:
            return type("Thing", (Recording,), {})("thing", [])
        return 5

    for is_stateful in (False, True, False):
        gpudcp.save({"thing": make(is_stateful)}, tmp_path / str(is_stateful))
        keys = set(dcp.FileSystemReader(tmp_path / str(is_stateful)).read_metadata().state_dict_metadata)
        assert keys == ({"thing.value", "thing.note"} if is_stateful else {"thing"})


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_an_error_of_a_stateful_value_arrives(tmp_path: Path, method: str) -> None:
    """In a save, in the plan of a load, and after a load."""

    class Failing(Recording):
        pass

    setattr(Failing, method, lambda *_: (_ for _ in ()).throw(ValueError("on purpose")))
    if method == "state_dict":
        with pytest.raises(RankFailedError, match="plan failed: ValueError: on purpose"):
            gpudcp.save({"a": Failing("a", [])}, tmp_path)
        assert list(tmp_path.iterdir()) == []
        gpudcp.save({"a": Recording("a", [])}, tmp_path)
        with pytest.raises(RankFailedError, match="plan failed: ValueError: on purpose"):
            gpudcp.load({"a": Failing("a", [])}, tmp_path)
        return
    gpudcp.save({"a": Recording("a", [])}, tmp_path)
    with pytest.raises(ValueError, match="on purpose"):
        gpudcp.load({"a": Failing("a", [])}, tmp_path)


# Failures


def test_a_failed_load_replaces_no_object(tmp_path: Path) -> None:
    """Tensors may be filled in part; top-level objects and Stateful values are as they were."""
    gpudcp.save({"a": 1, "b": torch.ones(2), "c": Recording("c", [])}, tmp_path)
    stateful = Recording("c", [])

    class Failing(gpudcp.DefaultLoadPlanner):
        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            raise ValueError(f"{read_item.dest_index.fqn}, {tensor.shape}, on purpose")

    state: dict[str, Any] = {"a": 0, "b": torch.zeros(2), "c": stateful}
    with pytest.raises(RankFailedError, match="read failed: ValueError"):
        gpudcp.load(state, tmp_path, planner=Failing())
    assert state["a"] == 0
    assert state["c"] is stateful
    assert stateful.loaded is None


def test_a_load_is_tried_again_once_when_the_checkpoint_was_busy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The storage is reset, Stateful values are asked anew; a second time the error is raised."""
    gpudcp.save({"a": torch.ones(2), "s": Recording("s", [])}, tmp_path)

    class Busy(gpudcp.DefaultLoadPlanner):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def create_local_plan(self) -> LoadPlan:
            self.times -= 1
            if self.times >= 0:
                raise CheckpointBusyError("a newer checkpoint")
            return super().create_local_plan()

    calls: list[str] = []

    class Reader(gpudcp.GpuStorageReader):
        def reset(self, checkpoint_id: Any = None) -> None:
            calls.append(f"reset to {checkpoint_id}")
            super().reset(checkpoint_id)

    state: dict[str, Any] = {"a": torch.zeros(2), "s": Recording("s", calls)}
    with caplog.at_level(logging.INFO, "gpudcp"):
        gpudcp.load(state, storage_reader=Reader(tmp_path), planner=Busy(1))
    assert torch.equal(state["a"], torch.ones(2))
    assert calls == ["s.state_dict", "reset to None", "s.state_dict", "s.load_state_dict"]
    assert "a newer checkpoint; loading the newer checkpoint" in caplog.text
    with pytest.raises(CheckpointBusyError, match="a newer checkpoint"):
        gpudcp.load(state, tmp_path, planner=Busy(2))


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(tmp_path: Path, is_enabled: bool) -> None:
    """After a save, a load, and one that failed."""
    was_enabled = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        gpudcp.save({"a": torch.ones(2)}, tmp_path)
        assert gc.isenabled() == is_enabled
        gpudcp.load({"a": torch.ones(2)}, tmp_path)
        assert gc.isenabled() == is_enabled
        with pytest.raises(GpuDcpError):
            gpudcp.load({"b": torch.ones(2)}, tmp_path)
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_every_error_of_a_call_is_of_one_tree(tmp_path: Path) -> None:
    """A user's own exception is the cause of ours, with its text in one line."""

    class Own(BaseException):
        """No Exception, as torch's CheckpointException is none."""

    class Failing(gpudcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise Own("first line\nsecond line")

    with pytest.raises(RankFailedError, match=r"^plan failed: Own: first line$") as told:
        gpudcp.save({"a": 1}, tmp_path, planner=Failing())
    assert isinstance(told.value.__cause__, Own)
    assert told.value.ranks == {0: "Own: first line"}


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    """With what was probably meant."""
    with pytest.raises(PlanError, match=r"is a Linear, not a dict; pass its state_dict\(\)$"):
        gpudcp.save(torch.nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    gpudcp.save({"a": torch.ones(1)}, tmp_path)
    with pytest.raises(PlanError, match=r"is a list, not a dict$"):
        gpudcp.load([], tmp_path)  # type: ignore[arg-type]


def test_launched_ranks_without_a_process_group_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would save into the others' directory, as if it were alone."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="4 ranks were launched, but there is no process group") as warned:
        gpudcp.save({"a": torch.ones(1)}, tmp_path)
    assert warned[0].filename == __file__
    gpudcp.load({"a": torch.zeros(1)}, tmp_path, no_dist=True)
