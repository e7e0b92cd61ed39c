"""CheckpointManager: what stays, what goes, and which step is restored. One process; ranks are in interop."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import gpudcp
from gpudcp import CheckpointManager
from gpudcp import manager as manager_module
from gpudcp.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GpuDcpError,
    MissingKeyError,
    PlanError,
    TransferError,
    UnsafeCheckpointError,
)
from gpudcp.files.commit import DirectoryLock

FAST = gpudcp.Options(fsync=False)


def state(number: float) -> dict[str, Any]:
    return {"weight": torch.full((50, 70), float(number)), "step": int(number)}


def restored(manager: CheckpointManager, step: int | None = None) -> tuple[int, float]:
    """The step that was restored, and the number that its tensors are full of."""
    found = state(-1)
    number = manager.restore(found, step)
    (value,) = found["weight"].unique().tolist()
    assert found["step"] == value
    return number, value


def directories(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


def damage(root: Path, step: int) -> None:
    """Flip a bit of a tensor's payload."""
    (path,) = (root / f"step-{step:08d}").glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), float(step)).numpy().tobytes())] ^= 1
    path.write_bytes(bytes(data))


def test_the_newest_step_is_restored(tmp_path: Path) -> None:
    """By number, whatever the order of saving; or one that is asked for. Stock torch reads each."""
    manager = CheckpointManager(tmp_path / "run", options=FAST)
    assert (manager.latest(), manager.steps()) == (None, [])
    for step in (3, 20, 100):
        manager.save(step, state(step))
    assert (manager.latest(), manager.steps()) == (100, [3, 20, 100])
    assert restored(manager) == (100, 100.0)
    assert restored(manager, 20) == (20, 20.0)
    found = state(0)
    dcp.load(found, checkpoint_id=manager.path(3))
    assert found["step"] == 3


@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    keep_last=st.none() | st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 7),
)
@settings(max_examples=25, deadline=None)
def test_what_stays_is_the_newest_every_nth_and_the_one_just_saved(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep_last: int | None, keep_every: int | None
) -> None:
    """For any order of saving, a run that goes back to an earlier step included."""
    root = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(root, keep_last=keep_last, keep_every=keep_every, options=FAST)
    expected: set[int] = set()
    for step in steps:
        manager.save(step, {"a": torch.ones(1)})
        expected.add(step)
        if keep_last is not None:
            newest = sorted(expected)[-keep_last:]
            expected = {n for n in expected if n in newest or n == step or (keep_every and n % keep_every == 0)}
        assert directories(root) == sorted(expected)


def test_a_save_that_fails_removes_nothing(tmp_path: Path) -> None:
    """The newest good checkpoint stays, whatever happens to a newer one."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    manager.save(1, state(1))

    class Fails(gpudcp.DefaultSavePlanner):
        def finish_plan(self, _: Any) -> Any:
            raise PlanError("not today")

    with pytest.raises(PlanError):
        manager.save(2, state(2), planner=Fails())
    assert manager.steps() == [1]
    assert restored(manager) == (1, 1.0)
    manager.save(3, state(3))
    assert directories(tmp_path) == [3], "what the failed save left is gone too"


def test_steps_that_are_incomplete_or_corrupt_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each with a line in the log that says why."""
    manager = CheckpointManager(tmp_path, options=FAST)
    for step in range(1, 6):
        manager.save(step, state(step))
    damage(tmp_path, 5)
    (tmp_path / "step-00000004" / ".metadata").unlink()
    metadata = tmp_path / "step-00000003" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-30])
    with caplog.at_level(logging.WARNING, "gpudcp"):
        assert restored(manager) == (2, 2.0)
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0][-1] for text in told] == ["5", "3"]
    assert all("passed over" in text for text in told)
    with pytest.raises(CorruptCheckpointError):
        manager.restore(state(0), 5)


def test_no_good_step_is_an_error_that_names_them_all(tmp_path: Path) -> None:
    """And another one than that there is none at all, which is how a run starts."""
    manager = CheckpointManager(tmp_path / "run", options=FAST)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint$"):
        manager.restore(state(0))
    for step in (1, 2):
        manager.save(step, state(step))
        damage(tmp_path / "run", step)
    with pytest.raises(CorruptCheckpointError, match=r"no good checkpoint: step 2: .*CRC-32.*step 1: .*CRC-32"):
        manager.restore(state(0))


class Settings:
    """Of a type that a load refuses unless it is told to trust the file."""


@pytest.mark.filterwarnings("ignore:1 object in this checkpoint:UserWarning")
def test_what_every_step_would_be_refused_for_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older step is no cure for an object that is not trusted, nor for a file that may not be read."""
    manager = CheckpointManager(tmp_path / "run", options=FAST)
    for step in (1, 2):
        manager.save(step, state(step) | {"settings": Settings()})
    with pytest.raises(UnsafeCheckpointError, match=r"Settings.*DefaultLoadPlanner\(trust_pickle=True\)"):
        manager.restore(state(0) | {"settings": None})

    def refused(*_: Any, **__: Any) -> Any:
        raise TransferError("no", path="x", errno=errno.EACCES)

    with monkeypatch.context() as patch:
        patch.setattr(manager_module, "load", refused)
        with pytest.raises(TransferError):
            manager.restore(state(0))
    assert restored(manager) == (2, 2.0)


def test_a_step_that_goes_while_it_is_read_is_followed_by_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a run that goes on keeps only its last step."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    manager.save(1, state(1))

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        manager.save(2, state(2))
        gpudcp.load(*args, **kwargs)

    monkeypatch.setattr(manager_module, "load", overtaken)
    assert restored(manager) == (2, 2.0)


def test_a_run_that_went_back_is_told_of_the_steps_it_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They stay the newest until somebody removes them."""
    manager = CheckpointManager(tmp_path, keep_last=2, options=FAST)
    for step in (100, 200, 300):
        manager.save(step, state(step))
    assert restored(manager, 200) == (200, 200.0)
    with caplog.at_level(logging.WARNING, "gpudcp"):
        manager.save(210, state(210))
    assert "saved below step 300, which stays the newest" in caplog.text
    manager.remove(300)
    assert restored(manager) == (210, 210.0)
    with pytest.raises(CheckpointNotFoundError, match="no step 300"):
        manager.remove(300)


def test_a_save_in_the_background_is_waited_for(tmp_path: Path) -> None:
    """By who asks what there is, and by who asks for it."""
    manager = CheckpointManager(tmp_path, options=FAST)
    for step in (1, 2, 3):
        manager.async_save(step, state(step))
        assert manager.latest() == step
        assert restored(manager) == (step, step)
    manager.async_save(4, state(4))
    found = state(0)
    gpudcp.load(found, manager.path(4))
    assert found["step"] == 4

    class Fails(gpudcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise PlanError("not today")

    manager.async_save(5, state(5), planner=Fails())
    assert manager.latest() == 4
    with pytest.raises(PlanError, match="not today"):
        manager.wait()


def test_a_clean_up_that_fails_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is committed by then, on all ranks."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    manager.save(1, state(1))

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manager_module, "remove_checkpoint", refused)
    manager.save(2, state(2))
    assert "not removed: " in caplog.text
    assert manager.steps() == [1, 2]


def test_a_state_dict_that_does_not_fit_is_no_reason_to_go_back(tmp_path: Path) -> None:
    """An older step would lack the key too, or be silently the wrong one."""
    manager = CheckpointManager(tmp_path, options=FAST)
    for step in (1, 2):
        manager.save(step, state(step))
    with pytest.raises(MissingKeyError):
        manager.restore({"other": torch.zeros(1)})


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Files beside the steps, and files of a user in a step, which keeps its directory then."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    manager.save(1, state(1))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001" / "config.json").write_text("{}")
    manager.save(2, state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000001", "step-00000002", "step-1"]
    assert [path.name for path in (tmp_path / "step-00000001").iterdir()] == ["config.json"]
    assert manager.steps() == [2]


def test_what_a_link_leads_to_stays(tmp_path: Path) -> None:
    """Such as the checkpoint that a run started from; nor is a name a step that no save gives one."""
    base = CheckpointManager(tmp_path / "base", options=FAST)
    base.save(1, state(1))
    manager = CheckpointManager(tmp_path / "run", keep_last=1, options=FAST)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001").symlink_to(base.path(1))
    gpudcp.save(state(1), tmp_path / "run" / "step-000000001")
    assert restored(manager) == (1, 1.0)
    manager.save(2, state(2))
    assert restored(base) == (1, 1.0)
    assert gpudcp.verify(tmp_path / "run" / "step-000000001").ok
    manager.remove(1)
    assert manager.steps() == [2]
    assert restored(base) == (1, 1.0)


def test_a_step_that_is_being_written_is_not_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process may be saving an earlier step again."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    manager.save(1, state(1))
    lock: list[DirectoryLock] = []
    thread = threading.Thread(target=lambda: lock.append(DirectoryLock.acquire(manager.path(1))))
    thread.start()
    thread.join()
    with caplog.at_level(logging.WARNING, "gpudcp"):
        manager.save(2, state(2))
    assert "step-00000001: not removed: " in caplog.text
    assert manager.steps() == [1, 2]
    lock[0].release()
    manager.save(3, state(3))
    assert manager.steps() == [3]


def test_async_saves_are_kept_and_removed_alike(tmp_path: Path) -> None:
    """When they are committed, and not when they fail."""
    manager = CheckpointManager(tmp_path, keep_last=1, options=FAST)
    for step in (1, 2):
        response = manager.async_save(step, state(step))
        response.upload_completion.result()
    manager.async_save(3, state(3)).upload_completion.result()
    gpudcp.save({"a": torch.ones(1)}, tmp_path / "other")  # waits for what is left in the background
    assert manager.steps() == [3]
    (tmp_path / "step-00000004").write_text("in the way")
    upload = manager.async_save(4, state(4)).upload_completion
    with pytest.raises(TransferError):
        upload.result()
    assert restored(manager) == (3, 3.0)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
def test_numbers_to_keep_are_checked(tmp_path: Path, name: str, keep: Any) -> None:
    """Nothing is what nobody wants to keep."""
    with pytest.raises(PlanError, match=rf"^CheckpointManager\({name}={keep!r}\)"):
        CheckpointManager(tmp_path, **{name: keep})


@pytest.mark.parametrize("step", [-1, 1.0, "3", True])
def test_a_step_is_a_count(tmp_path: Path, step: Any) -> None:
    """Its directory is named by it."""
    with pytest.raises(GpuDcpError, match=r"must be an integer of at least 0$"):
        CheckpointManager(tmp_path).save(step, {})
