"""GpuStorageWriter: what it writes and reports, reused and beside another one."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from storage_cases import LOCK, blank_state, data_files, is_same, load, metadata_of, names, record_of, state_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

import gpudcp
from gpudcp import GpuStorageWriter, Options
from gpudcp.errors import (
    BackendUnavailableError,
    CheckpointBusyError,
    PlanError,
)
from gpudcp.files import commit, posix
from gpudcp.storage import writer as writer_module


def test_a_save_leaves_one_data_file_and_the_metadata(tmp_path: Path) -> None:
    """The data file is named by rank, number and save id, which is the one in the metadata; no lock stays."""
    gpudcp.save(state_of(1.0), tmp_path / "new" / "nested")
    metadata = metadata_of(tmp_path / "new" / "nested")
    assert metadata.storage_meta is not None
    assert names(tmp_path / "new" / "nested") == {".metadata", f"__0_0_{metadata.storage_meta.save_id}.distcp"}
    assert re.fullmatch("[0-9a-f]{16}", str(metadata.storage_meta.save_id))
    assert metadata.storage_meta.checkpoint_id == str(tmp_path / "new" / "nested")
    assert type(metadata.storage_meta.checkpoint_id) is str
    assert metadata.version == "1.0.0"


def test_an_empty_state_dict_is_a_checkpoint_without_a_data_file(tmp_path: Path) -> None:
    """Stock and gpudcp load nothing from it."""
    gpudcp.save({}, tmp_path)
    assert names(tmp_path) == {".metadata"}
    for load_it in (gpudcp.load, dcp.load):
        nothing: dict[str, Any] = {}
        load_it(nothing, checkpoint_id=tmp_path)
        assert nothing == {}


def test_every_item_is_a_sound_zip_with_its_payload_aligned(checkpoint: Path) -> None:
    """Each tensor's archive passes zip's own test; a payload of 64 KiB starts on a page of the file, others on 64."""
    metadata = metadata_of(checkpoint)
    (path,) = data_files(checkpoint)
    data = path.read_bytes()
    for fqn, alignment in (("weight", 64), ("large", 4096), ("step", 64)):
        record = record_of(metadata, fqn)
        item = data[record.offset : record.offset + record.length]
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None
        payload_offset, dtype, crc = record.gpudcp
        tensor = state_of(1.0)[fqn]
        assert payload_offset % alignment == 0
        assert dtype == tensor.dtype
        raw = tensor.numpy().tobytes()
        assert data[payload_offset : payload_offset + len(raw)] == raw
        assert torch.equal(torch.load(io.BytesIO(item), weights_only=True), tensor)
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert crc == archive.getinfo("archive/data/0").CRC


def test_without_checksums_the_archives_say_so_and_are_unverified_not_corrupt(tmp_path: Path) -> None:
    """CRC 0 in the zip directory, none in the metadata, and a load that finds nothing wrong."""
    gpudcp.save(state_of(2.0), tmp_path, options=Options(checksum=False))
    record = record_of(metadata_of(tmp_path), "weight")
    assert record.gpudcp[2] is None
    data = data_files(tmp_path)[0].read_bytes()[record.offset : record.offset + record.length]
    assert zipfile.ZipFile(io.BytesIO(data)).getinfo("archive/data/0").CRC == 0
    reader = gpudcp.GpuStorageReader(tmp_path)
    found = blank_state()
    gpudcp.load(found, storage_reader=reader)
    assert is_same(found, state_of(2.0))
    assert reader.report is not None
    assert "0 of 3 payloads verified" in reader.report.checksum
    by_stock = blank_state()
    dcp.load(by_stock, checkpoint_id=tmp_path)
    assert is_same(by_stock, state_of(2.0))


@pytest.mark.parametrize("direct_io", ["on", "off", "auto"])
@pytest.mark.parametrize("slab_nbytes", [4096, 1 << 20])
def test_the_same_plan_gives_the_same_bytes_whatever_the_way(tmp_path: Path, direct_io: Any, slab_nbytes: int) -> None:
    """Direct and buffered writes, slabs smaller than a tensor: one file, byte for byte."""
    options = Options(direct_io=direct_io, slab_nbytes=slab_nbytes, lanes=2)
    try:
        gpudcp.save(state_of(3.0), tmp_path / "one", options=options)
    except BackendUnavailableError as why:
        pytest.skip(str(why))
    gpudcp.save(state_of(3.0), tmp_path / "other")
    (one,), (other,) = data_files(tmp_path / "one"), data_files(tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()


def test_a_backend_asked_for_by_name_is_not_replaced(tmp_path: Path) -> None:
    """The error ends with the remedy, and no file is left."""
    with pytest.raises(BackendUnavailableError, match=r"use Options\(files='auto'\) or 'posix'$"):
        gpudcp.save(state_of(1.0), tmp_path, options=Options(executor="cpu", files="gds"))
    assert names(tmp_path) == set()


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    """Items, bytes of payload and of files, seconds by phase, and a reason for each choice."""
    writer = GpuStorageWriter(tmp_path)
    assert writer.report is None
    gpudcp.save(state_of(1.0), storage_writer=writer)
    report = writer.report
    assert report is not None
    (path,) = data_files(tmp_path)
    note = record_of(metadata_of(tmp_path), "note")
    assert (report.direction, report.path, report.nitems) == ("save", str(tmp_path), 4)
    assert report.payload_nbytes == 120 * 4 + 30_000 * 4 + 8 + note.length
    assert report.file_nbytes == path.stat().st_size
    assert report.executor == "cpu"
    assert report.files in ("posix direct", "posix buffered")
    assert report.checksum in ("isal", "zlib")
    assert len(report.reasons) == 2
    assert set(report.phases_s) >= {"plan", "objects", "pack", "write", "fsync"}
    assert sum(report.phases_s.values()) <= report.total_s
    assert report.gb_per_s == report.payload_nbytes / report.total_s / 1e9
    assert f"save {tmp_path}: 4 items" in str(report)
    assert GpuStorageWriter(tmp_path, options=Options(checksum=False)).report is None


@pytest.mark.parametrize("save", [gpudcp.save, dcp.save], ids=["gpudcp", "torch"])
def test_a_writer_is_used_for_several_saves_and_directories(tmp_path: Path, save: Any) -> None:
    """Each save draws an id of its own; a checkpoint_id points the writer elsewhere."""
    writer = GpuStorageWriter(tmp_path / "one")
    seen: set[str] = set()
    for number in (1.0, 2.0, 3.0):
        save(state_of(number), storage_writer=writer)
        (path,) = data_files(tmp_path / "one")
        assert path.name not in seen
        seen.add(path.name)
        assert is_same(load(tmp_path / "one"), state_of(number))
    save(state_of(4.0), checkpoint_id=tmp_path / "two", storage_writer=writer)
    assert writer.checkpoint_id == writer.path == str(tmp_path / "two")
    assert is_same(load(tmp_path / "one"), state_of(3.0))
    assert is_same(load(tmp_path / "two"), state_of(4.0))
    writer.reset()
    assert writer.path == str(tmp_path / "two")


@pytest.fixture
def plan_cache() -> Iterator[None]:
    """torch's cache of plans is a class attribute: this test starts and leaves it empty."""
    caches = ("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans", "_cached_global_plan")
    caches = (*caches, "_cached_metadata")
    for name in caches:
        getattr(SavePlanner, name).clear()
    yield
    for name in caches:
        getattr(SavePlanner, name).clear()


@pytest.mark.usefixtures("plan_cache")
@pytest.mark.parametrize("save", [gpudcp.save, dcp.save], ids=["gpudcp", "torch"])
@pytest.mark.parametrize("is_reused", [True, False])
def test_torchs_plan_cache_never_overwrites_a_live_file(
    tmp_path: Path, save: Any, is_reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache hands out an old plan, with an old save's ticket: the file made is not the one that .metadata names."""
    made: list[str] = []
    create = posix.PosixWriter.__init__

    def recording(self: posix.PosixWriter, path: str, **keywords: Any) -> None:
        assert not os.path.exists(path)
        made.append(os.path.basename(path))
        create(self, path, **keywords)

    monkeypatch.setattr(posix.PosixWriter, "__init__", recording)
    writer = GpuStorageWriter(tmp_path)
    for number in (1.0, 2.0, 3.0, 4.0):
        writer = writer if is_reused else GpuStorageWriter(tmp_path)
        save(state_of(number), storage_writer=writer, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        assert is_same(load(tmp_path), state_of(number))
        assert names(tmp_path) == {".metadata", made[-1]}
    assert all(name != next_name for name, next_name in itertools.pairwise(made))


def test_writers_pickle_before_their_first_use(tmp_path: Path) -> None:
    """As process-based async saves need it; a writer in use leaves its lock behind."""
    writer = GpuStorageWriter(tmp_path / "one", options=Options(lanes=3), overwrite=False)
    copy: GpuStorageWriter = pickle.loads(pickle.dumps(writer))
    assert (copy.path, copy.options, copy.overwrite) == (writer.path, Options(lanes=3), False)
    gpudcp.save(state_of(1.0), storage_writer=copy)
    assert is_same(load(tmp_path / "one"), state_of(1.0))

    holder = GpuStorageWriter(tmp_path / "two")
    holder.set_up_storage_writer(True)
    pickle.loads(pickle.dumps(holder)).release()
    assert LOCK in names(tmp_path / "two")
    holder.release()
    assert LOCK not in names(tmp_path / "two")


def test_only_paths_on_mounted_file_systems_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks this of checkpoint ids; a URL is refused, and is no directory of that name."""
    monkeypatch.chdir(tmp_path)
    assert GpuStorageWriter.validate_checkpoint_id(tmp_path)
    assert GpuStorageWriter.validate_checkpoint_id("relative/path")
    assert not GpuStorageWriter.validate_checkpoint_id("s3://bucket/key")
    for ask in (
        lambda: gpudcp.save(state_of(1.0), "s3://bucket/key"),
        lambda: GpuStorageWriter("s3://bucket/key"),
        lambda: GpuStorageWriter(tmp_path).reset("s3://bucket/key"),
    ):
        with pytest.raises(PlanError, match=r"^s3://bucket/key: .*FsspecWriter"):
            ask()
    assert names(tmp_path) == set()


def in_a_thread(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


@pytest.mark.parametrize("save", [gpudcp.save, dcp.save], ids=["gpudcp", "torch"])
def test_a_second_save_into_a_directory_is_refused_and_takes_nothing(checkpoint: Path, save: Any) -> None:
    """It neither takes the lock nor frees it, and leaves no file."""
    holder = GpuStorageWriter(checkpoint)
    in_a_thread(lambda: holder.set_up_storage_writer(True))
    before = names(checkpoint)
    with pytest.raises((CheckpointBusyError, CheckpointException), match="another save into this directory is running"):
        save(state_of(2.0), storage_writer=GpuStorageWriter(checkpoint))
    assert names(checkpoint) == before >= {LOCK}
    holder.release()
    save(state_of(2.0), storage_writer=GpuStorageWriter(checkpoint))
    assert is_same(load(checkpoint), state_of(2.0))


def test_a_writer_whose_save_failed_in_another_thread_saves_again(checkpoint: Path) -> None:
    """torch's driver tells the writer nothing of a failed plan; set up again, it lets its own old lock go."""

    class Failing(gpudcp.DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            raise ValueError("on purpose")

    writer = GpuStorageWriter(checkpoint)

    def fail() -> None:
        with pytest.raises(CheckpointException):
            dcp.save(state_of(2.0), storage_writer=writer, planner=Failing())

    in_a_thread(fail)
    dcp.save(state_of(3.0), storage_writer=writer)
    assert is_same(load(checkpoint), state_of(3.0))
    assert LOCK not in names(checkpoint)


def test_saves_from_several_threads_into_several_directories_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Four at once, from threads of their own."""
    barrier = threading.Barrier(4)

    def save(number: int) -> None:
        barrier.wait(timeout=30)
        gpudcp.save(state_of(float(number)), tmp_path / str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    for number in range(4):
        assert is_same(load(tmp_path / str(number)), state_of(float(number)))
        assert LOCK not in names(tmp_path / str(number))


def test_the_lock_of_a_writer_that_became_garbage_is_free(checkpoint: Path) -> None:
    """A save that failed under torch's driver holds the directory no longer than its writer lives."""
    in_a_thread(lambda: GpuStorageWriter(checkpoint).set_up_storage_writer(True))
    gpudcp.save(state_of(2.0), checkpoint)
    assert is_same(load(checkpoint), state_of(2.0))
    assert commit.LOCK_NAME == LOCK


def test_results_of_another_writer_are_refused(tmp_path: Path) -> None:
    """`finish` commits only what `write_data` of this class returned."""
    writer = GpuStorageWriter(tmp_path)
    writer.set_up_storage_writer(True)
    planner = gpudcp.DefaultSavePlanner()
    planner.set_up_planner({"a": torch.ones(2)}, is_coordinator=True)
    _, metadata = planner.create_global_plan([planner.create_local_plan()])
    with pytest.raises(PlanError, match="are a list, not what this writer returned"):
        writer.finish(metadata, [[]])
    assert names(tmp_path) == set()


def test_a_plan_without_this_writers_ticket_is_refused(tmp_path: Path) -> None:
    """A planner that drops storage_data would have every rank write to one name."""
    planner = gpudcp.DefaultSavePlanner()
    planner.finish_plan = lambda plan: dataclasses.replace(plan, storage_data=None)  # type: ignore[method-assign]
    with pytest.raises(PlanError, match="storage_data is None, not this writer's ticket"):
        gpudcp.save(state_of(1.0), tmp_path, planner=planner)
    assert names(tmp_path) == set()


def test_a_missing_receipt_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that returns without having written everything does not get its save committed."""

    class Forgetful:
        def __init__(self, executor: Any) -> None:
            self._executor = executor
            self.name, self.slab_nbytes, self.checksum = "forgetful", executor.slab_nbytes, executor.checksum

        def save(self, *arguments: Any) -> Any:
            receipts = self._executor.save(*arguments)
            return [receipt._replace(crcs=receipt.crcs[:-1]) for receipt in receipts]

    def select(*arguments: Any, **keywords: Any) -> Any:
        selection = true_select(*arguments, **keywords)
        return selection._replace(executor=Forgetful(selection.executor))

    true_select = writer_module.select
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "select", select)
        with pytest.raises(PlanError, match=r"4 items were planned as 4 writes of \d+ bytes; 3 writes of"):
            gpudcp.save(state_of(2.0), checkpoint)
    assert is_same(load(checkpoint), state_of(1.0))
