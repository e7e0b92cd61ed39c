"""gpudcp.async_save: the checkpoint holds what was at the call, and no failure stays unheard. One process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import gpudcp
from gpudcp import GpuStorageWriter, api
from gpudcp.errors import BackendUnavailableError, PlanError, TransferError
from gpudcp.executors.select import select
from gpudcp.storage import writer as writer_module


@pytest.fixture(autouse=True)
def _nothing_in_flight() -> Iterator[None]:
    """Every test begins and ends without a save in the background."""
    yield
    api._background.settle()


class Held(GpuStorageWriter):
    """A writer that waits before it writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_write = threading.Event()
        self.thread = ""

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.thread = threading.current_thread().name
        assert self.may_write.wait(60)
        return super().write_data(plan, planner)


def state() -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.arange(70_000.0).view(100, 700))
    return {
        "model": {"weight": weight, "tied": weight, "view": weight.detach()[3:7], "half": torch.ones(5).half()},
        "steps": [torch.tensor(3), {"lr": 0.5}],
        "note": ["x"],
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
    }


class Unwilling:
    """What no snapshot can be taken of."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("not to be copied")


def loaded(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": {
            "weight": torch.zeros(100, 700),
            "tied": torch.zeros(100, 700),
            "view": torch.zeros(4, 700),
            "half": torch.zeros(5).half(),
        },
        "steps": [torch.tensor(0), {"lr": 0.0}],
        "note": None,
    }
    gpudcp.load(found, directory)
    return found


def test_the_checkpoint_holds_the_values_at_the_call(tmp_path: Path) -> None:
    """Tensors, aliases, views and objects may change as soon as the call has returned."""
    writer, saved = Held(tmp_path), state()
    response = gpudcp.async_save(saved, storage_writer=writer)
    assert response.staging_completion.done()
    assert not response.upload_completion.done()
    with torch.no_grad():
        saved["model"]["weight"].zero_()
    saved["steps"][0] += 1
    saved["steps"][1]["lr"] = 7.0
    saved["note"].append("y")
    writer.may_write.set()
    response.upload_completion.result()
    found, expected = loaded(tmp_path), state()
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    assert (int(found["steps"][0]), found["steps"][1], found["note"]) == (3, {"lr": 0.5}, ["x"])
    assert writer.thread.startswith("gpudcp-async")


def test_a_process_writes_what_a_thread_would(tmp_path: Path) -> None:
    """Strided views, objects, casts, sparse and empty tensors, byte for byte, whatever changes meanwhile."""
    found: dict[str, list[bytes]] = {}
    for mode in ("thread", "process"):
        saved = {**state(), "transposed": torch.arange(12.0).view(3, 4).t(), "conj": torch.tensor([1 + 2j]).conj()}
        planner = gpudcp.DefaultSavePlanner(dtype={"model.weight": torch.bfloat16})
        options: Any = gpudcp.Options(async_mode=mode)
        response = gpudcp.async_save(saved, tmp_path / mode, planner=planner, options=options)
        with torch.no_grad():
            saved["model"]["weight"].zero_()
        response.upload_completion.result()
        found[mode] = [path.read_bytes() for path in sorted((tmp_path / mode).glob("*.distcp"))]
    assert found["process"] == found["thread"]


def test_a_writing_process_that_is_killed_fails_its_save_alone(tmp_path: Path) -> None:
    """The old checkpoint is intact, and the next save has a process again."""
    options = gpudcp.Options(async_mode="process")
    gpudcp.async_save({"a": torch.ones(9)}, tmp_path, options=options).upload_completion.result()
    child = api._writer_process._child
    assert child is not None
    child.kill()
    child.wait()

    class SeeminglyAlive:
        """What is not noticed before the save is sent."""

        wait = child.wait

        def poll(self) -> None:
            return None

    api._writer_process._child = SeeminglyAlive()  # type: ignore[assignment]
    upload = gpudcp.async_save({"a": torch.zeros(9)}, tmp_path, options=options).upload_completion
    with pytest.raises(TransferError, match=r"the writing process ended with status -9"):
        upload.result()
    found = {"a": torch.zeros(9)}
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["a"], torch.ones(9))
    gpudcp.async_save({"a": torch.full((9,), 2.0)}, tmp_path, options=options).upload_completion.result()
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["a"], torch.full((9,), 2.0))


def test_an_error_of_the_writing_process_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As itself, with path and numbers; the process goes on."""
    options = gpudcp.Options(async_mode="process", direct_io="off")
    with monkeypatch.context() as patch:
        patch.setattr(GpuStorageWriter, "_unused_names", lambda *_: ["missing/__0_0_0123456789abcdef.distcp"])
        with pytest.raises(TransferError, match=r"missing/__0_0_0123456789abcdef.distcp: cannot be created"):
            gpudcp.async_save({"a": torch.ones(9)}, tmp_path, options=options).upload_completion.result()
    gpudcp.async_save({"a": torch.ones(9)}, tmp_path, options=options).upload_completion.result()


def test_only_our_writer_saves_by_a_process(tmp_path: Path) -> None:
    """Asked for by torch's name for it."""
    kind = AsyncCheckpointerType.PROCESS
    with pytest.raises(BackendUnavailableError, match="only a GpuStorageWriter saves by a process"):
        gpudcp.async_save({}, storage_writer=dcp.FileSystemWriter(tmp_path), async_checkpointer_type=kind)
    gpudcp.async_save({"a": torch.ones(3)}, tmp_path, async_checkpointer_type=kind).upload_completion.result()
    found = {"a": torch.zeros(3)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["a"], torch.ones(3))


def test_a_writer_saves_beside_training_only_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What async_save makes of a writer ends with its save, and does not begin where no snapshot could be taken."""
    seen: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["is_beside_training"])
        return select(*args, **kwargs)

    monkeypatch.setattr(writer_module, "select", noted)
    writer = GpuStorageWriter(tmp_path, options=gpudcp.Options(async_mode="process"))
    with pytest.raises(ValueError, match="not to be copied"):
        gpudcp.async_save({"object": Unwilling()}, storage_writer=writer)
    gpudcp.save({"x": torch.ones(2)}, storage_writer=writer)
    assert writer.report is not None
    assert writer.report.executor == "cpu"
    gpudcp.async_save({"x": torch.ones(2)}, storage_writer=writer).result()
    assert writer.report.executor != "cpu"
    gpudcp.save({"x": torch.ones(2)}, storage_writer=writer)
    assert writer.report.executor == "cpu"
    assert seen == [False, True, False]


def test_stock_torch_reads_it(tmp_path: Path) -> None:
    """It is the checkpoint that `save` writes."""
    gpudcp.async_save({"a": torch.arange(10.0)}, tmp_path).upload_completion.result()
    found = {"a": torch.zeros(10)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["a"], torch.arange(10.0))


def test_the_metadata_is_what_save_returns(tmp_path: Path) -> None:
    """Field by field, whichever way it was saved."""
    saved = state()
    now = gpudcp.save(saved, tmp_path / "now")
    later: Any = gpudcp.async_save(saved, tmp_path / "later").upload_completion.result()
    assert later.state_dict_metadata == now.state_dict_metadata
    assert later.planner_data == now.planner_data


def test_the_planners_casts_are_applied_to_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes are kept, and the file holds what a save at once would have put there."""
    staged: list[dict[str, Any]] = []
    stage = api._stager.stage

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        staged.append((taken := stage(*arguments, **keywords)).state_dict)
        return taken

    monkeypatch.setattr(api._stager, "stage", recorded)
    saved = {"a": torch.randn(1000), "n": torch.arange(5)}
    planner = gpudcp.DefaultSavePlanner(dtype=torch.bfloat16)
    gpudcp.async_save(saved, tmp_path / "later", planner=planner).upload_completion.result()
    assert {name: tensor.dtype for name, tensor in staged[0].items()} == {"a": torch.bfloat16, "n": torch.int64}
    gpudcp.save(saved, tmp_path / "now", planner=gpudcp.DefaultSavePlanner(dtype=torch.bfloat16))
    found = [{"a": torch.zeros(1000, dtype=torch.bfloat16)} for _ in range(2)]
    for each, name in zip(found, ("later", "now"), strict=True):
        gpudcp.load(each, tmp_path / name)
    assert torch.equal(found[0]["a"], found[1]["a"])
    assert torch.equal(found[0]["a"], saved["a"].bfloat16())


@pytest.mark.parametrize("method", ["transform_object", "resolve_data"])
def test_an_override_sees_the_dtype_that_the_state_dict_has(tmp_path: Path, method: str) -> None:
    """As in a save."""
    seen: list[torch.dtype] = []

    def transform(self: Any, item: Any, value: Any) -> Any:
        seen.append(value.dtype)
        return gpudcp.DefaultSavePlanner.transform_object(self, item, value)

    def resolve(self: Any, item: Any) -> Any:
        return transform(self, item, self.lookup_object(item.index))

    override = {"transform_object": transform, "resolve_data": resolve}[method]
    planner = type("Overriding", (gpudcp.DefaultSavePlanner,), {method: override})(dtype=torch.bfloat16)
    upload: Any = gpudcp.async_save({"a": torch.ones(3)}, tmp_path, planner=planner).upload_completion
    upload.result()
    assert seen == [torch.float32]


def test_a_rule_that_would_cast_twice_is_left_to_the_writer(tmp_path: Path) -> None:
    """A callable that sends float32 to float16 and float16 to bfloat16 is asked once for each tensor."""
    turns = {torch.float32: torch.float16, torch.float16: torch.bfloat16}
    planner = gpudcp.DefaultSavePlanner(dtype=lambda _, dtype: turns.get(dtype))
    metadata: Any = gpudcp.async_save({"a": torch.ones(4)}, tmp_path, planner=planner).upload_completion.result()
    assert metadata.state_dict_metadata["a"].properties.dtype is torch.float16


def test_one_save_is_in_flight_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    """With the same writer too; the second snapshot is taken into the memory of the first, when that is written."""
    writer = Held(tmp_path)
    first = gpudcp.async_save({"a": torch.full((100,), 1.0)}, storage_writer=writer)
    threading.Timer(0.2, writer.may_write.set).start()
    second = gpudcp.async_save({"a": torch.full((100,), 2.0)}, storage_writer=writer)
    assert first.upload_completion.done()
    second.upload_completion.result()
    found = {"a": torch.zeros(100)}
    gpudcp.load(found, tmp_path)
    assert bool((found["a"] == 2.0).all())


def test_a_save_waits_for_the_one_in_the_background(tmp_path: Path) -> None:
    """What was begun later is what stays."""
    writer = Held(tmp_path)
    gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer)
    threading.Timer(0.2, writer.may_write.set).start()
    gpudcp.save({"a": torch.full((1,), 2.0)}, tmp_path)
    found = {"a": torch.zeros(1)}
    gpudcp.load(found, tmp_path)
    assert found["a"].item() == 2.0


@pytest.mark.parametrize("next_call", [gpudcp.save, gpudcp.async_save])
def test_a_failure_nobody_has_heard_of_is_raised_by_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, next_call: Any
) -> None:
    """And by a log line at once; the save after that works."""
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.ERROR, "gpudcp"):
        gpudcp.async_save({"a": torch.ones(1)}, tmp_path / "file" / "below")
        with pytest.raises(TransferError, match="below"):
            next_call({"a": torch.ones(1)}, tmp_path / "checkpoint")
    assert "below: a background save failed: TransferError" in caplog.text
    gpudcp.save({"a": torch.ones(1)}, tmp_path / "checkpoint")


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_failure_that_was_heard_is_not_raised_again(tmp_path: Path, ask: str) -> None:
    """Its caller has dealt with it."""
    (tmp_path / "file").write_bytes(b"")
    upload = gpudcp.async_save({"a": torch.ones(1)}, tmp_path / "file" / "below").upload_completion
    if ask == "result":
        with pytest.raises(TransferError):
            upload.result()
    else:
        assert isinstance(upload.exception(), TransferError)
    gpudcp.save({"a": torch.ones(1)}, tmp_path / "checkpoint")


def test_a_snapshot_that_cannot_be_taken_is_raised_at_once(tmp_path: Path) -> None:
    """By the call itself, and once."""

    with pytest.raises(ValueError, match="not to be copied"):
        gpudcp.async_save({"object": Unwilling()}, tmp_path)
    gpudcp.save({"a": torch.ones(1)}, tmp_path)


def test_a_torch_stager_may_take_the_snapshot(tmp_path: Path) -> None:
    """As in dcp.async_save, whether it returns the state dict or a future of it."""
    from concurrent.futures import ThreadPoolExecutor

    class Stager:
        should_synchronize_after_execute = True
        pool: ThreadPoolExecutor | None = None
        synchronised = 0

        def stage(self, state_dict: Any) -> Any:
            copied = {key: value.clone() for key, value in state_dict.items()}
            return copied if self.pool is None else self.pool.submit(lambda: copied)

        def synchronize_staging(self) -> None:
            self.synchronised += 1

    stager: Any = Stager()
    gpudcp.async_save({"a": torch.ones(3)}, tmp_path / "1", async_stager=stager).upload_completion.result()
    assert stager.synchronised == 1
    with ThreadPoolExecutor(1) as stager.pool:
        gpudcp.async_save({"a": torch.ones(3)}, tmp_path / "2", async_stager=stager).upload_completion.result()
    for name in ("1", "2"):
        found = {"a": torch.zeros(3)}
        gpudcp.load(found, tmp_path / name)
        assert torch.equal(found["a"], torch.ones(3))


def test_options_do_not_go_beside_a_writer(tmp_path: Path) -> None:
    """The error names the call."""
    with pytest.raises(PlanError, match=r"not to async_save$"):
        gpudcp.async_save({}, storage_writer=GpuStorageWriter(tmp_path), options=gpudcp.Options())


def test_torchs_writer_may_write_in_the_background(tmp_path: Path) -> None:
    """Any StorageWriter, as everywhere."""
    writer = dcp.FileSystemWriter(tmp_path)
    gpudcp.async_save({"a": torch.ones(3)}, storage_writer=writer).upload_completion.result()
    found = {"a": torch.zeros(3)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["a"], torch.ones(3))


def test_dcp_async_save_works_with_our_writer(tmp_path: Path) -> None:
    """torch's own driver and stager over GpuStorageWriter."""
    future: Any = dcp.async_save({"a": torch.ones(3)}, storage_writer=GpuStorageWriter(tmp_path))
    future.result()
    found = {"a": torch.zeros(3)}
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["a"], torch.ones(3))


def test_interpreter_exit_finishes_the_save(tmp_path: Path) -> None:
    """A script that ends right after the call leaves a whole checkpoint."""
    script = (
        "import sys, torch, gpudcp\ngpudcp.async_save({'a': torch.ones(1 << 20), 'b': torch.arange(5)}, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True, timeout=120)
    found = {"a": torch.zeros(1 << 20), "b": torch.zeros(5, dtype=torch.int64)}
    gpudcp.load(found, tmp_path)
    assert bool((found["a"] == 1).all())
    assert found["b"].tolist() == [0, 1, 2, 3, 4]


class Tagged(torch.Tensor):
    """A subclass with an attribute, and no copying of its own."""


class OwnParameter(torch.nn.Parameter):
    """A subclass that is saved whole."""


def _tagged() -> dict[str, Any]:
    tensor = torch.ones(3).as_subclass(Tagged)
    tensor.tag = "x"  # type: ignore[attr-defined]
    return {"a": tensor}


def _tied() -> dict[str, Any]:
    weight = torch.arange(9.0)
    return {"model": {"w": weight}, "ema": {"w": weight}}


def _held_by_an_object() -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.arange(9.0))
    return {"model": {"w": weight}, "object": SimpleNamespace(w=weight), "other": torch.ones(1000)}


@pytest.mark.filterwarnings("ignore:.* can be loaded only with:UserWarning")
@pytest.mark.parametrize(
    ("make", "planner"),
    [
        pytest.param(_tied, lambda: gpudcp.DefaultSavePlanner(dtype={"model.*": torch.bfloat16}), id="tied"),
        pytest.param(
            _tied, lambda: gpudcp.DefaultSavePlanner(flatten_state_dict=False, dtype=torch.half), id="not flattened"
        ),
        pytest.param(
            _tied,
            lambda: gpudcp.planners.RenameSavePlanner("x.", dtype={"model.*": torch.half}),
            id="renamed",
        ),
        pytest.param(_held_by_an_object, lambda: gpudcp.DefaultSavePlanner(dtype=torch.half), id="object"),
        pytest.param(_held_by_an_object, gpudcp.DefaultSavePlanner, id="object, no cast"),
        pytest.param(
            _held_by_an_object,
            lambda: gpudcp.DefaultSavePlanner(dtype=lambda _, dtype: torch.int8 if dtype.is_floating_point else None),
            id="gradient to integer",
        ),
        pytest.param(_tagged, gpudcp.DefaultSavePlanner, id="subclass"),
        pytest.param(lambda: {"a": OwnParameter(torch.ones(3))}, gpudcp.DefaultSavePlanner, id="parameter subclass"),
        pytest.param(
            lambda: {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
            gpudcp.DefaultSavePlanner,
            id="nested tensor",
            marks=pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
        ),
    ],
)
def test_it_is_byte_for_byte_what_save_writes(
    tmp_path: Path, make: Callable[[], dict[str, Any]], planner: Callable[[], Any]
) -> None:
    """Casts go by the planner's keys, and objects keep the types and the memory of what they hold."""
    options = gpudcp.Options(trust_pickle=True)
    now = gpudcp.save(make(), tmp_path / "now", planner=planner(), options=options)
    upload: Any = gpudcp.async_save(make(), tmp_path / "later", planner=planner(), options=options).upload_completion
    assert upload.result().state_dict_metadata == now.state_dict_metadata
    found = [[path.read_bytes() for path in sorted((tmp_path / name).glob("*.distcp"))] for name in ("now", "later")]
    assert found[0] == found[1]


def test_a_save_in_flight_cannot_be_cancelled(tmp_path: Path) -> None:
    """Else the next snapshot would be taken into memory that is still being written."""
    writer = Held(tmp_path)
    upload: Any = gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer).upload_completion
    assert not upload.cancel()
    writer.may_write.set()
    upload.result()


def test_the_response_is_as_good_as_torchs_future(tmp_path: Path) -> None:
    """As ``dcp.async_save`` returns by default: loops wait for its result."""
    done: list[Any] = []
    response = gpudcp.async_save({"a": torch.ones(3)}, tmp_path)
    response.add_done_callback(done.append)
    assert response.result(timeout=60).state_dict_metadata.keys() == {"a"}
    assert response.done()
    assert response.exception() is None
    api._background.wait()
    assert done == [response.upload_completion]


def test_a_call_that_is_interrupted_loses_sight_of_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next snapshot would be taken into memory that is still being written, and checksummed as it is."""
    gpudcp.async_save({"a": torch.zeros(1000)}, tmp_path / "0").result()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("gpudcp-async"):
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    writer = Held(tmp_path / "1")
    with pytest.raises(KeyboardInterrupt):
        gpudcp.async_save({"a": torch.full((1000,), 1.0)}, storage_writer=writer)
    threading.Timer(0.2, writer.may_write.set).start()
    gpudcp.async_save({"a": torch.full((1000,), 2.0)}, tmp_path / "2").result()
    for number in (1, 2):
        found = {"a": torch.zeros(1000)}
        gpudcp.load(found, tmp_path / str(number))
        assert bool((found["a"] == number).all())


def test_a_thread_that_cannot_be_started_fails_its_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody waits for it."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            gpudcp.async_save({"a": torch.ones(3)}, tmp_path)
    gpudcp.async_save({"a": torch.ones(3)}, tmp_path).result()
    assert gpudcp.verify(tmp_path).ok


def test_threads_take_turns(tmp_path: Path) -> None:
    """No snapshot is taken into the memory of one that another thread has taken and not yet handed over."""
    numbers = range(12)
    states = [{"a": torch.full((200_000,), float(number))} for number in numbers]
    saves = [
        threading.Thread(target=gpudcp.async_save, args=(states[number], tmp_path / str(number))) for number in numbers
    ]
    for save in saves:
        save.start()
    for save in saves:
        save.join()
    api._background.settle()
    for number in numbers:
        found = {"a": torch.zeros(200_000)}
        gpudcp.load(found, tmp_path / str(number))
        assert torch.equal(found["a"], states[number]["a"])


def test_a_wait_that_timed_out_has_not_heard(tmp_path: Path) -> None:
    """The failure is still raised by the next save."""

    class Fails(Held):
        def write_data(self, plan: Any, planner: Any) -> Any:
            super().write_data(plan, planner)
            raise PlanError("not today")

    writer = Fails(tmp_path)
    upload: Any = gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer).upload_completion
    with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else Exception):
        upload.result(timeout=0)
    writer.may_write.set()
    with pytest.raises(PlanError, match="not today"):
        gpudcp.save({"a": torch.ones(1)}, tmp_path)


def test_a_writer_in_flight_is_not_pointed_elsewhere(tmp_path: Path) -> None:
    """A save with the same writer waits first, and is not made by the process that the one before asked for."""
    writer = Held(tmp_path / "1")
    kind = AsyncCheckpointerType.PROCESS
    gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer, async_checkpointer_type=kind)
    threading.Timer(0.2, writer.may_write.set).start()
    gpudcp.save({"a": torch.ones(1)}, tmp_path / "2", storage_writer=writer)
    assert writer.report is not None
    assert writer.report.executor == "cpu"
    for name in ("1", "2"):
        assert gpudcp.verify(tmp_path / name).ok


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_saves_and_ends(tmp_path: Path) -> None:
    """While a save of its parent's is in flight: as workers of a DataLoader, which end when Python says so."""
    writer = Held(tmp_path / "parent")
    gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer)
    saves = lambda: gpudcp.async_save({"a": torch.ones(1)}, tmp_path / "child").upload_completion.result()  # noqa: E731
    children = [multiprocessing.get_context("fork").Process(target=target) for target in (int, saves)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        child.kill()
        assert child.exitcode == 0
    writer.may_write.set()


def test_the_writing_process_ends_though_a_forked_child_lives(tmp_path: Path) -> None:
    """A worker that is ended at exit only must not be what exit waits for; nor does printing disturb the answers."""
    (tmp_path / "sitecustomize.py").write_text("print('hello')\n")
    script = (
        "import multiprocessing, sys, time, torch, gpudcp\n"
        "options = gpudcp.Options(async_mode='process')\n"
        "gpudcp.async_save({'a': torch.ones(3)}, sys.argv[1], options=options).upload_completion.result()\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(99,), daemon=True).start()\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "checkpoint")]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert gpudcp.verify(tmp_path / "checkpoint").ok


def test_a_relative_directory_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the process is when the background comes to it, and wherever the writing process was started."""
    (tmp_path / "elsewhere").mkdir()
    options = gpudcp.Options(async_mode="process")
    gpudcp.async_save({"a": torch.ones(1)}, tmp_path / "first", options=options).upload_completion.result()
    monkeypatch.chdir(tmp_path)
    response = gpudcp.async_save({"a": torch.ones(1)}, "second", options=options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    response.upload_completion.result()
    assert gpudcp.verify(tmp_path / "second").ok
    writer = gpudcp.GpuStorageWriter("third")
    response = gpudcp.async_save({"a": torch.ones(1)}, storage_writer=writer)
    monkeypatch.chdir(tmp_path)
    response.result()
    assert gpudcp.verify(tmp_path / "elsewhere" / "third").ok


def test_a_python_without_anonymous_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the remedy."""
    monkeypatch.setattr(api, "_stager", api.Stager())
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(BackendUnavailableError, match=r"use Options\(async_mode='thread'\)$"):
        gpudcp.async_save({"a": torch.ones(1)}, tmp_path, options=gpudcp.Options(async_mode="process"))
