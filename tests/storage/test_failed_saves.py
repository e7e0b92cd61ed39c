"""Saves that fail or die: the old checkpoint stays, nothing is left beside it, the directory is free."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from storage_cases import check_settled, is_same, load, names, state_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

import gpudcp
from gpudcp import GpuStorageWriter, Options
from gpudcp.errors import (
    RankFailedError,
    TransferError,
)
from gpudcp.files import posix


class FailingPlanner(gpudcp.DefaultSavePlanner):
    """Raises when it is asked for the data of one key."""

    def __init__(self, fqn: str) -> None:
        super().__init__()
        self._fqn = fqn

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index.fqn == self._fqn:
            raise ValueError("on purpose")
        return super().resolve_data(write_item)


@pytest.mark.parametrize("fqn", ["weight", "large", "note"])
def test_a_planner_that_raises_leaves_the_old_checkpoint(checkpoint: Path, fqn: str) -> None:
    """Under our driver: the error says what failed."""
    with pytest.raises(RankFailedError, match=r"write failed: ValueError: on purpose") as told:
        gpudcp.save(state_of(2.0), checkpoint, planner=FailingPlanner(fqn))
    assert isinstance(told.value.__cause__, ValueError)
    check_settled(checkpoint)


def test_a_planner_that_raises_leaves_the_old_checkpoint_under_torchs_driver(checkpoint: Path) -> None:
    """Its own exception is in torch's."""
    with pytest.raises(CheckpointException, match="on purpose"):
        dcp.save(state_of(2.0), storage_writer=GpuStorageWriter(checkpoint), planner=FailingPlanner("large"))
    check_settled(checkpoint)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("threads", [1, 3])
def test_a_full_disk_leaves_the_old_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The error of the thread that wrote arrives, with path, offset and errno; the unfinished file is removed."""
    options = Options(slab_nbytes=4096, threads=threads, lanes=3)
    with monkeypatch.context() as patch:
        write = posix.PosixWriter.write

        def write_some(self: posix.PosixWriter, data: memoryview, byte_offset: int) -> None:
            if byte_offset >= 40960:
                patch.setattr(os, "pwrite", full_disk)
            write(self, data, byte_offset)

        patch.setattr(posix.PosixWriter, "write", write_some)
        with pytest.raises(TransferError, match=r"__0_0_.*\.distcp: write failed: No space left on device") as told:
            gpudcp.save(state_of(2.0), checkpoint, options=options)
    assert told.value.errno == errno.ENOSPC
    assert told.value.path is not None
    assert os.path.dirname(told.value.path) == str(checkpoint)
    assert told.value.byte_offset is not None
    assert told.value.expected_nbytes == 4096
    check_settled(checkpoint)


@pytest.mark.parametrize("call", ["fsync", "replace", "ftruncate"])
def test_a_failure_at_the_end_leaves_the_old_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """While the data file is finished, or while the metadata is put in place."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(TransferError, match="No space left on device"):
            gpudcp.save(state_of(2.0), checkpoint)
    assert is_same(load(checkpoint), state_of(1.0))
    gpudcp.save(state_of(5.0), checkpoint)
    assert is_same(load(checkpoint), state_of(5.0))
    assert len(names(checkpoint)) == 2


def test_a_failed_first_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The directory exists, empty."""
    with pytest.raises(RankFailedError):
        gpudcp.save(state_of(2.0), tmp_path / "new", planner=FailingPlanner("weight"))
    assert names(tmp_path / "new") == set()


def test_an_interrupt_stays_an_interrupt_and_frees_the_directory(checkpoint: Path) -> None:
    """KeyboardInterrupt is no error of the checkpoint's."""

    class Interrupted(gpudcp.DefaultSavePlanner):
        def resolve_data(self, _: WriteItem) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpudcp.save(state_of(2.0), checkpoint, planner=Interrupted())
    check_settled(checkpoint)


def test_a_directory_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    """With the path in it."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TransferError, match="file"):
        gpudcp.save(state_of(1.0), tmp_path / "file")


def test_an_overwrite_killed_at_any_point_leaves_old_or_new(tmp_path: Path) -> None:
    """A process is killed before each of its system calls in turn: what is left is whole, and can be saved over."""
    script = Path(__file__).with_name("killed_saves.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["old"] >= 10
    assert found["new"] >= 3
    assert found["finished"] >= 1


@pytest.mark.parametrize("call", ["save", "async_save"])
def test_a_terminated_process_loses_the_save_in_flight_and_keeps_the_old_checkpoint(
    checkpoint: Path, call: str
) -> None:
    """SIGTERM, with what Python and torch make of it by default; the next save cleans up."""
    script = f"""
import os, signal, sys, time, gpudcp, storage_cases
from gpudcp.files.posix import PosixWriter

def terminated(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

PosixWriter.finish = terminated
gpudcp.{call}(storage_cases.state_of(2.0), sys.argv[1])
"""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "kernels", Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM
    assert is_same(load(checkpoint), state_of(1.0))
    gpudcp.save(state_of(3.0), checkpoint)
    assert is_same(load(checkpoint), state_of(3.0))
    assert len(names(checkpoint)) == 2
