"""How a save becomes the checkpoint: order, what it replaces, what it removes and what it leaves alone."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from storage_cases import LOCK, data_files, is_same, load, metadata_of, names, record_of, rewrite_metadata, state_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

import gpudcp
from gpudcp import GpuStorageWriter, Options
from gpudcp.errors import (
    CheckpointExistsError,
    RankFailedError,
)


class Syscalls:
    """Records what a save asks of the system, by the names of files in its directory."""

    NAMES = ("open", "pwrite", "ftruncate", "fsync", "replace", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.calls: list[tuple[str, str]] = []
        self._directory = directory
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))

    def _recording(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **keywords: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if path.startswith(str(self._directory)):
                self.calls.append((name, os.path.relpath(path, self._directory)))
            return real(target, *arguments, **keywords)

        return call

    def places(self, *call: str) -> list[int]:
        return [place for place, found in enumerate(self.calls) if found == call]


def test_the_commit_brings_everything_to_stable_storage_before_it_names_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, fsync, directory fsync; metadata aside, fsync, rename, directory fsync; only then the old file goes."""
    (old,) = data_files(checkpoint)
    with monkeypatch.context() as patch:
        system = Syscalls(patch, checkpoint)
        gpudcp.save(state_of(2.0), checkpoint)
    (new,) = data_files(checkpoint)

    written = system.places("pwrite", new.name)
    data_fsync = system.places("fsync", new.name)
    directory_fsyncs = system.places("fsync", ".")
    metadata_fsync = system.places("fsync", ".metadata.tmp")
    rename = system.places("replace", ".metadata.tmp")
    removal = system.places("unlink", old.name)
    assert [len(each) for each in (data_fsync, metadata_fsync, rename, removal)] == [1, 1, 1, 1]
    assert written
    before_rename = [place for place in directory_fsyncs if data_fsync[0] < place < rename[0]]
    after_rename = [place for place in directory_fsyncs if rename[0] < place < removal[0]]
    assert before_rename
    assert after_rename
    assert max(written) < data_fsync[0] < before_rename[0] < metadata_fsync[0] < rename[0] < after_rename[0]
    assert after_rename[0] < removal[0]
    assert system.places("unlink", LOCK)[0] > removal[0]


def test_fsync_false_skips_every_fsync(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes nothing else."""
    with monkeypatch.context() as patch:
        system = Syscalls(patch, checkpoint)
        gpudcp.save(state_of(2.0), checkpoint, options=Options(fsync=False))
    assert [call for call in system.calls if call[0] == "fsync"] == []
    assert len(data_files(checkpoint)) == 1
    assert is_same(load(checkpoint), state_of(2.0))


def test_overwrite_false_refuses_and_changes_nothing(checkpoint: Path) -> None:
    """Under gpudcp's driver and torch's; the directory is not left locked."""
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointExistsError, match=r"holds a checkpoint \(\.metadata\), and overwrite=False") as told:
        gpudcp.save(state_of(2.0), storage_writer=GpuStorageWriter(checkpoint, overwrite=False))
    assert isinstance(told.value, FileExistsError)
    with pytest.raises(CheckpointException, match="overwrite=False"):
        dcp.save(state_of(2.0), storage_writer=GpuStorageWriter(checkpoint, overwrite=False))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    gpudcp.save(state_of(2.0), checkpoint)


def test_overwrite_false_refuses_a_checkpoint_of_ranks_that_saved_without_collectives(tmp_path: Path) -> None:
    """It has no .metadata, and is a checkpoint all the same."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    assert ".metadata" not in names(tmp_path)
    for use_collectives in (True, False):
        with pytest.raises(CheckpointExistsError, match=r"__0\.metadata"):
            gpudcp.save(
                state_of(2.0),
                storage_writer=GpuStorageWriter(tmp_path, overwrite=False),
                use_collectives=use_collectives,
            )
    assert is_same(load(tmp_path), state_of(1.0))


def test_overwrite_false_saves_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    """Other files in the directory are no checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    gpudcp.save(state_of(2.0), storage_writer=GpuStorageWriter(tmp_path, overwrite=False))
    assert is_same(load(tmp_path), state_of(2.0))


def test_a_save_without_collectives_does_not_hide_behind_an_older_metadata(checkpoint: Path) -> None:
    """Every load would take .metadata, and so the old values: refused. Stock writes, and loads what it can get."""
    with pytest.raises(CheckpointExistsError, match=r"which every load would take instead of one saved without"):
        gpudcp.save(state_of(2.0), checkpoint, use_collectives=False)
    assert is_same(load(checkpoint), state_of(1.0))
    assert LOCK not in names(checkpoint)


FOREIGN = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "__notes.txt": b"mine",
    "__0_0.distcp.bak": b"a backup",
    "__0_0_0123456789abcdef.distcp.bak": b"another",
    "__0_0_0123456789ABCDEF.distcp": b"capitals are not ours",
    "__a_0.distcp": b"no rank",
    "model.distcp": b"no pattern",
    "metadata": b"no dot",
    ".metadata.bak": b"older",
    "__9_9.distcp": b"stock's pattern, and no metadata ever named it",
}


def test_foreign_files_are_never_touched(checkpoint: Path) -> None:
    """Whatever their names remind of: files, directories, and files in them."""
    for name, data in FOREIGN.items():
        (checkpoint / name).write_bytes(data)
    (checkpoint / "logs").mkdir()
    (checkpoint / "logs" / "__0_0_0123456789abcdef.distcp").write_bytes(b"deeper")

    gpudcp.save(state_of(2.0), checkpoint)

    assert {name: (checkpoint / name).read_bytes() for name in FOREIGN} == FOREIGN
    assert (checkpoint / "logs" / "__0_0_0123456789abcdef.distcp").read_bytes() == b"deeper"
    assert is_same(load(checkpoint), state_of(2.0))


def test_an_overwrite_removes_the_old_files_of_gpudcp(checkpoint: Path) -> None:
    """One data file before, one after, another one."""
    (old,) = data_files(checkpoint)
    gpudcp.save(state_of(2.0), checkpoint)
    (new,) = data_files(checkpoint)
    assert new != old
    assert is_same(load(checkpoint), state_of(2.0))


@pytest.mark.parametrize("is_single", [True, False])
def test_an_overwrite_removes_the_old_files_of_stock(tmp_path: Path, is_single: bool) -> None:
    """All that the replaced .metadata named, and no other of that pattern."""
    dcp.save(state_of(1.0), storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=is_single))
    assert len(data_files(tmp_path)) == (1 if is_single else 4)
    (tmp_path / "__5_5.distcp").write_bytes(b"not named")
    gpudcp.save(state_of(2.0), tmp_path)
    assert {path.name for path in data_files(tmp_path)} - {"__5_5.distcp"} == {
        record.relative_path for record in metadata_of(tmp_path).storage_data.values()
    }
    assert (tmp_path / "__5_5.distcp").exists()
    assert is_same(load(tmp_path), state_of(2.0))


def test_files_of_a_stock_save_that_died_are_left(tmp_path: Path) -> None:
    """They have no save id, and no metadata says whose they are."""
    (tmp_path / "__0_0.distcp").write_bytes(b"half")
    gpudcp.save(state_of(1.0), tmp_path)
    assert (tmp_path / "__0_0.distcp").read_bytes() == b"half"
    assert is_same(load(tmp_path), state_of(1.0))


def test_stock_overwrites_what_gpudcp_saved_and_gpudcp_cleans_up_after_it(checkpoint: Path) -> None:
    """Our files, named by no metadata any more, are left by stock and go with our next save."""
    with pytest.warns(UserWarning, match="Detected an existing checkpoint"):
        dcp.save(state_of(2.0), checkpoint_id=checkpoint)
    assert len(data_files(checkpoint)) == 2
    assert is_same(load(checkpoint), state_of(2.0))
    gpudcp.save(state_of(3.0), checkpoint)
    assert len(data_files(checkpoint)) == 1
    assert is_same(load(checkpoint), state_of(3.0))


def test_files_that_a_ranks_own_metadata_names_are_kept(tmp_path: Path) -> None:
    """Of a checkpoint saved without collectives, by gpudcp and by stock; those that nothing names go."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    (kept,) = data_files(tmp_path)
    for own in ("__0.metadata", "__3.metadata"):
        (tmp_path / own).write_bytes((tmp_path / "__0.metadata").read_bytes())
    (tmp_path / "__1_0_0123456789abcdef.distcp").write_bytes(b"of a dead save")
    gpudcp.save(state_of(2.0), tmp_path)
    assert kept.exists()
    assert not (tmp_path / "__1_0_0123456789abcdef.distcp").exists()
    (tmp_path / ".metadata").unlink()
    assert is_same(load(tmp_path), state_of(1.0))


def test_a_rank_without_collectives_cleans_only_after_itself(tmp_path: Path) -> None:
    """Its own old file goes; files of other ranks are left to them."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    (old,) = data_files(tmp_path)
    for name in ("__1_0_0123456789abcdef.distcp", "__1.metadata.tmp"):
        (tmp_path / name).write_bytes(b"may be in the making")
    gpudcp.save(state_of(2.0), tmp_path, use_collectives=False)
    assert not old.exists()
    assert names(tmp_path) >= {"__1_0_0123456789abcdef.distcp", "__1.metadata.tmp", "__0.metadata"}
    assert is_same(load(tmp_path), state_of(2.0))


def test_what_dead_saves_left_goes_with_the_next_successful_one(checkpoint: Path) -> None:
    """Data files with a save id, temporary metadata, and a lock file whose owner is dead."""
    left = {"__0_0_0123456789abcdef.distcp", "__7_0_fedcba9876543210.distcp", ".metadata.tmp", "__2.metadata.tmp", LOCK}
    for name in left:
        (checkpoint / name).write_bytes(b"left over")

    class Failing(gpudcp.DefaultSavePlanner):
        def resolve_data(self, _: WriteItem) -> Any:
            raise ValueError("on purpose")

    with pytest.raises(RankFailedError):
        gpudcp.save(state_of(2.0), checkpoint, planner=Failing())
    assert names(checkpoint) >= left - {LOCK}
    gpudcp.save(state_of(2.0), checkpoint)
    assert names(checkpoint) & left == set()
    assert len(names(checkpoint)) == 2


def test_nothing_is_removed_where_a_metadata_file_cannot_be_read(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it needs is unknown, so all old files stay, and a warning says so; the save itself succeeds."""
    (old,) = data_files(checkpoint)
    (checkpoint / "__1.metadata").write_bytes(b"no pickle")
    with caplog.at_level(logging.WARNING, "gpudcp"):
        gpudcp.save(state_of(2.0), checkpoint)
    assert old.exists()
    assert "__1.metadata: cannot be read, so old files are left in place" in caplog.text
    assert is_same(load(checkpoint), state_of(2.0))


def test_an_unreadable_old_metadata_does_not_stop_a_save(checkpoint: Path) -> None:
    """It is replaced; gpudcp's old files, which nothing names any more, go."""
    (checkpoint / ".metadata").write_bytes(b"no pickle")
    gpudcp.save(state_of(2.0), checkpoint)
    assert len(data_files(checkpoint)) == 1
    assert is_same(load(checkpoint), state_of(2.0))


@pytest.mark.parametrize("path", [None, ["a", "list"], "../../victim/__0_0.distcp", "/tmp/__0_0.distcp", 5])
def test_an_old_metadata_that_names_odd_files_is_replaced(tmp_path: Path, path: Any) -> None:
    """Only names of data files in the directory are cleaned up after."""
    directory, victim = tmp_path / "deep" / "checkpoint", tmp_path / "victim" / "__0_0.distcp"
    victim.parent.mkdir()
    victim.write_bytes(b"not ours")
    dcp.save(state_of(1.0), checkpoint_id=directory)
    rewrite_metadata(directory, lambda metadata: setattr(record_of(metadata, "note"), "relative_path", path))
    gpudcp.save(state_of(2.0), directory)
    assert is_same(load(directory), state_of(2.0))
    assert victim.exists()


def test_a_malicious_old_metadata_runs_nothing(tmp_path: Path) -> None:
    """The clean-up reads the metadata that it replaces with the safe unpickler, whatever the options trust."""
    bomb, witness = tmp_path / "checkpoint", tmp_path / "ran"
    bomb.mkdir()

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    (bomb / ".metadata").write_bytes(pickle.dumps(Bomb()))
    (bomb / "__0_0.distcp").write_bytes(b"stock's")
    gpudcp.save(state_of(1.0), bomb, options=Options(trust_pickle=True))
    assert not witness.exists()
    assert is_same(load(bomb), state_of(1.0))
