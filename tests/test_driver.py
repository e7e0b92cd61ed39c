"""Our driver makes DCP's calls in DCP's order, with DCP's arguments: recorded beside torch's own driver."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.futures import Future

import gpudcp
from gpudcp.errors import CheckpointNotFoundError, CorruptCheckpointError, RankFailedError

Calls = list[tuple[str, dict[str, Any]]]


def described(value: Any) -> Any:
    """What two runs must have in common of an argument."""
    if isinstance(value, SavePlan | LoadPlan):
        return (type(value), [item.type for item in value.items])
    if isinstance(value, Metadata):
        return (Metadata, list(value.state_dict_metadata))
    if isinstance(value, StorageMeta):
        return StorageMeta
    if isinstance(value, SavePlanner | LoadPlanner | StorageReader | StorageWriter):
        return type(value).__name__
    if isinstance(value, dict):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    return value if isinstance(value, int | str | None) else type(value).__name__


def recorded(base: type, calls: Calls) -> type:
    """A subclass that records its public calls, with their arguments by name."""

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            bound = inspect.signature(method).bind(self, *arguments, **keywords)
            bound.apply_defaults()
            given = {key: described(value) for key, value in bound.arguments.items() if key != "self"}
            calls.append((f"{base.__name__}.{name}", given))
            return method(self, *arguments, **keywords)

        return call

    names = [name for name, member in inspect.getmembers(base, inspect.isfunction) if not name.startswith("_")]
    return type(base.__name__, (base,), {name: wrap(name, getattr(base, name)) for name in names})


class PlainWriter(StorageWriter):
    """A storage as they were before ranks could save alone: no method takes further arguments."""

    files: ClassVar[dict[str, Any]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        self.path = checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        for item in plan.items:
            self.files[item.index.fqn] = planner.resolve_data(item)
        future: Future[Any] = Future()
        future.set_result([])
        return future

    def finish(self, metadata: Metadata, results: Any) -> None:
        self.files["metadata"] = (metadata, results)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return bool(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        return None


class PlainReader(StorageReader):
    """Reads what PlainWriter keeps."""

    def reset(self, checkpoint_id: Any = None) -> None:
        self.path = checkpoint_id

    def read_metadata(self) -> Metadata:
        metadata: Metadata = PlainWriter.files["metadata"][0]
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self.known = (metadata, is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            data = PlainWriter.files[item.storage_index.fqn]
            if isinstance(data, torch.Tensor):
                planner.commit_tensor(item, planner.resolve_tensor(item).copy_(data))
            else:
                data.seek(0)
                planner.load_bytes(item, data)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return bool(checkpoint_id)


class OldSavePlanner(dcp.DefaultSavePlanner):
    """As planners were before torch 2.3: no storage_meta."""

    def set_up_planner(self, state_dict: dict[str, Any], is_coordinator: bool) -> None:  # type: ignore[override]
        super().set_up_planner(state_dict, is_coordinator=is_coordinator)


def state() -> dict[str, Any]:
    return {"weight": torch.arange(6.0), "nested": {"a": torch.ones(2), "b": "text"}, "n": 1}


WRITERS: dict[str, tuple[type, Callable[[type, Path], Any]]] = {
    "ours": (gpudcp.GpuStorageWriter, lambda kind, path: kind(path)),
    "torchs": (dcp.FileSystemWriter, lambda kind, path: kind(path)),
    "plain": (PlainWriter, lambda kind, path: kind()),  # noqa: ARG005
}
READERS: dict[str, tuple[type, Callable[[type, Path], Any]]] = {
    "ours": (gpudcp.GpuStorageReader, lambda kind, path: kind(path)),
    "torchs": (dcp.FileSystemReader, lambda kind, path: kind(path)),
    "plain": (PlainReader, lambda kind, path: kind()),  # noqa: ARG005
}


@pytest.mark.filterwarnings("ignore:The function definition for SavePlanner.set_up_planner:UserWarning")
@pytest.mark.parametrize("use_collectives", [True, False])
@pytest.mark.parametrize("planner_kind", [gpudcp.DefaultSavePlanner, dcp.DefaultSavePlanner, OldSavePlanner])
@pytest.mark.parametrize("storage", WRITERS)
def test_a_save_makes_the_calls_of_torchs_driver(
    tmp_path: Path, storage: str, planner_kind: type, use_collectives: bool
) -> None:
    """The same methods in the same order, with the same arguments, and the same kind of result."""
    recordings: list[Calls] = []
    for name, save in (("torch", dcp.save), ("gpudcp", gpudcp.save)):
        calls: Calls = []
        kind, make = WRITERS[storage]
        writer = make(recorded(kind, calls), tmp_path / name)
        planner = recorded(planner_kind, calls)()
        calls.clear()
        metadata = save(state(), storage_writer=writer, planner=planner, use_collectives=use_collectives)
        assert isinstance(metadata, Metadata)
        recordings.append([call for call in calls if call[0].split(".")[1] not in ("checkpoint_id", "release")])
    assert recordings[1] == recordings[0]
    names = [name.split(".")[1] for name, _ in recordings[1]]
    order = ["storage_meta", "set_up_planner", "set_up_storage_writer", "create_local_plan", "prepare_local_plan"]
    order += ["create_global_plan", "prepare_global_plan", "finish_plan", "write_data", "finish"]
    assert [name for name in names if name in order][: len(order)] == order


@pytest.mark.parametrize("use_collectives", [True, False])
@pytest.mark.parametrize("planner_kind", [gpudcp.DefaultLoadPlanner, dcp.DefaultLoadPlanner])
@pytest.mark.parametrize("storage", READERS)
def test_a_load_makes_the_calls_of_torchs_driver(
    tmp_path: Path, storage: str, planner_kind: type, use_collectives: bool
) -> None:
    """The fall-back to a rank's own metadata included."""
    kind, make = WRITERS[storage]
    gpudcp.save(state(), storage_writer=make(kind, tmp_path), use_collectives=use_collectives)
    recordings: list[Calls] = []
    for load in (dcp.load, gpudcp.load):
        calls: Calls = []
        reader_kind, make_reader = READERS[storage]
        reader = make_reader(recorded(reader_kind, calls), tmp_path)
        planner = recorded(planner_kind, calls)()
        calls.clear()
        found = {**state(), "weight": torch.zeros(6), "n": 0}
        load(found, storage_reader=reader, planner=planner)
        assert torch.equal(found["weight"], torch.arange(6.0))
        assert found["n"] == 1
        recordings.append(calls)
    assert recordings[1] == recordings[0]
    names = [name.split(".")[1] for name, _ in recordings[1]]
    order = ["read_metadata", "set_up_planner", "set_up_storage_reader", "create_local_plan", "prepare_local_plan"]
    order += ["create_global_plan", "prepare_global_plan", "finish_plan", "read_data"]
    if not use_collectives and storage != "plain":
        order.insert(0, "read_metadata")
    assert [name for name in names if name in order] == order


def test_a_failed_save_releases_a_writer_that_can_be(tmp_path: Path) -> None:
    """Ours has `release`, torch's has not; the first error is the one that is raised."""

    class Failing(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            raise ValueError("on purpose")

    for storage, (kind, make) in WRITERS.items():
        calls: Calls = []
        writer = make(recorded(kind, calls), tmp_path / storage)
        with pytest.raises(RankFailedError, match="plan failed: ValueError: on purpose"):
            gpudcp.save(state(), storage_writer=writer, planner=Failing())
        last, _ = calls[-1]
        assert last == ("GpuStorageWriter.release" if storage == "ours" else f"{kind.__name__}.set_up_storage_writer")


class BrokenReader(PlainReader):
    """Fails to read its metadata, in one way or another."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)
        self.asked: list[dict[str, Any]] = []

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:  # type: ignore[override]
        self.asked.append(kwargs)
        if self.errors:
            raise self.errors.pop(0)
        return super().read_metadata()


def test_only_a_missing_metadata_is_a_reason_to_ask_for_a_ranks_own(tmp_path: Path) -> None:
    """torch's driver asks again whatever went wrong, and so may load something else."""
    gpudcp.save(state(), storage_writer=PlainWriter())
    corrupt = BrokenReader(CorruptCheckpointError("bad"))
    with pytest.raises(CorruptCheckpointError, match="bad"):
        gpudcp.load(state(), storage_reader=corrupt)
    assert corrupt.asked == [{}]
    by_torch = BrokenReader(CorruptCheckpointError("bad"))
    dcp.load(state(), storage_reader=by_torch)
    assert by_torch.asked == [{}, {"rank": 0}]

    missing = BrokenReader(FileNotFoundError("none"))
    gpudcp.load(state(), storage_reader=missing)
    assert missing.asked == [{}, {"rank": 0}]

    both = BrokenReader(CheckpointNotFoundError("first"), CheckpointNotFoundError("second"))
    with pytest.raises(CheckpointNotFoundError, match="first"):
        gpudcp.load(state(), storage_reader=both)
    second = BrokenReader(CheckpointNotFoundError("first"), CorruptCheckpointError("second"))
    with pytest.raises(CorruptCheckpointError, match="second"):
        gpudcp.load(state(), storage_reader=second)
    assert tmp_path.exists()


def test_a_reader_that_knows_no_ranks_is_not_asked_for_one() -> None:
    """DCP's rule: only methods with a parameter named kwargs get keywords."""

    class Missing(PlainReader):
        def read_metadata(self) -> Metadata:
            raise FileNotFoundError("none")

    with pytest.raises(RankFailedError, match="FileNotFoundError: none"):
        gpudcp.load(state(), storage_reader=Missing())
    with pytest.raises(CheckpointException, match=r"none|metadata is None$"):  # torch 2.11 tells no more
        dcp.load(state(), storage_reader=Missing())


def test_a_future_that_fails_is_waited_for(tmp_path: Path) -> None:
    """A storage that returns at once, and whose work fails later."""

    class Late(PlainWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(OSError(f"late: {len(plan.items)} items of {type(planner).__name__}"))
            return future

    with pytest.raises(RankFailedError, match=r"write failed: .*late: 4 items of DefaultSavePlanner"):
        gpudcp.save(state(), storage_writer=Late())
    assert list(tmp_path.iterdir()) == []
