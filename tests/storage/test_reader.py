"""GpuStorageReader: which metadata it takes, what it reads, what it reports, and checkpoints that change under it."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from storage_cases import (
    blank_state,
    data_files,
    flip_a_bit,
    is_same,
    metadata_of,
    names,
    record_of,
    rewrite_metadata,
    state_of,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

import gpudcp
from gpudcp import GpuStorageReader, Options
from gpudcp.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GpuDcpError,
    MissingKeyError,
    PlanError,
    TransferError,
)
from gpudcp.files.posix import PosixReader
from gpudcp.items import KeptItems


def load(directory: Path, **options: Any) -> dict[str, Any]:
    found = blank_state()
    gpudcp.load(found, directory, options=Options(**options))
    return found


class Rows(gpudcp.DefaultLoadPlanner):
    """Loads a range of rows of ``weight``, of the whole width or of a range of columns, as a plan by hand does."""

    def __init__(self, rows: slice, columns: slice | None = None, *, fqn: str = "weight") -> None:
        super().__init__()
        self._rows = rows
        self._columns = columns
        self._fqn = fqn

    def create_local_plan(self) -> LoadPlan:
        (index,) = [index for index in self.metadata.storage_data if index.fqn == self._fqn]  # type: ignore[union-attr]
        item = super().create_local_plan().items[0]
        columns = self._columns or slice(0, self.state_dict[self._fqn].shape[1])
        changed = ReadItem(
            type=item.type,
            dest_index=item.dest_index,
            dest_offsets=torch.Size([0, 0]),
            storage_index=index,
            storage_offsets=torch.Size([self._rows.start, columns.start]),
            lengths=torch.Size([self._rows.stop - self._rows.start, columns.stop - columns.start]),
        )
        return LoadPlan([changed])

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: read_item.lengths[0], : read_item.lengths[1]]


class Reads:
    """Records what is read of files: path and byte range of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int]] = []
        read = PosixReader.read

        def recording(reader: PosixReader, into: memoryview, byte_offset: int) -> None:
            self.calls.append((os.path.basename(reader.path), byte_offset, len(into)))
            read(reader, into, byte_offset)

        monkeypatch.setattr(PosixReader, "read", recording)

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.calls)


# Which metadata


def by_torchs_driver(text: str) -> str:
    """Matches an error of ours in the words of torch's driver, which in torch 2.11 lets nothing of it through."""
    return f"{re.escape(text)}|AssertionError: metadata is None$"


def test_a_missing_checkpoint_is_a_file_not_found(tmp_path: Path) -> None:
    """An empty directory, none at all, and a file in its place, under our driver and under torch's."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent", "file"):
        with pytest.raises(CheckpointNotFoundError, match=rf"{name}: no checkpoint: \.metadata is missing") as told:
            gpudcp.load(blank_state(), tmp_path / name)
        assert isinstance(told.value, FileNotFoundError)
        with pytest.raises(CheckpointException, match=by_torchs_driver("no checkpoint: .metadata is missing")):
            dcp.load(blank_state(), storage_reader=GpuStorageReader(tmp_path / name))


@pytest.mark.parametrize("damage", ["no pickle", "another object", "a flipped bit", "a shorter one"])
def test_a_corrupt_metadata_is_no_reason_to_take_a_ranks_own(tmp_path: Path, damage: str) -> None:
    """The first error is raised, and nothing is loaded, though a sound __0.metadata lies beside it."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    gpudcp.save(state_of(2.0), tmp_path)
    path = tmp_path / ".metadata"
    data = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        data[len(data) // 2] ^= 4
    elif damage == "a shorter one":
        del data[-1]
    else:
        data = bytearray(pickle.dumps({}) if damage == "another object" else b"nonsense")
    path.write_bytes(data)

    found = blank_state()
    with pytest.raises(CorruptCheckpointError, match=r"\.metadata: ") as told:
        gpudcp.load(found, tmp_path)
    assert is_same(found, blank_state())
    first_line = str(told.value).splitlines()[0]
    with pytest.raises(CheckpointException, match=by_torchs_driver(first_line[:60])):
        dcp.load(found, storage_reader=GpuStorageReader(tmp_path), planner=gpudcp.DefaultLoadPlanner())
    assert is_same(found, blank_state())


def test_an_unreadable_metadata_is_no_reason_to_take_a_ranks_own(tmp_path: Path) -> None:
    """A directory in its place: an error of the system, with its number."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    (tmp_path / ".metadata").mkdir()
    with pytest.raises(TransferError, match=r"\.metadata: cannot be read: Is a directory") as told:
        gpudcp.load(blank_state(), tmp_path)
    assert told.value.errno is not None
    with pytest.raises(CheckpointException, match=by_torchs_driver("Is a directory")):
        dcp.load(blank_state(), storage_reader=GpuStorageReader(tmp_path))


def test_a_ranks_own_metadata_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    """As torch falls back; by both drivers."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    assert names(tmp_path) >= {"__0.metadata"}
    assert is_same(load(tmp_path), state_of(1.0))
    for reader in (GpuStorageReader(tmp_path), dcp.FileSystemReader(tmp_path)):
        found = blank_state()
        dcp.load(found, storage_reader=reader)
        assert is_same(found, state_of(1.0))


def test_a_corrupt_own_metadata_is_an_error(tmp_path: Path) -> None:
    """There is nothing left to fall back to."""
    gpudcp.save(state_of(1.0), tmp_path, use_collectives=False)
    (tmp_path / "__0.metadata").write_bytes(b"nonsense")
    with pytest.raises(CorruptCheckpointError, match=r"__0\.metadata: no readable pickle"):
        gpudcp.load(blank_state(), tmp_path)


def test_each_load_has_an_id_of_its_own(checkpoint: Path) -> None:
    """torch's readers put one into the metadata."""
    reader = GpuStorageReader(checkpoint)
    ids = {reader.read_metadata().storage_meta.load_id for _ in range(2)}  # type: ignore[union-attr]
    assert len(ids) == 2
    assert None not in ids


def test_metadata_without_storage_records_is_corrupt(checkpoint: Path) -> None:
    """Stock would fail on an assertion."""
    rewrite_metadata(checkpoint, lambda metadata: setattr(metadata, "storage_data", None))
    with pytest.raises(CorruptCheckpointError, match="has no storage_data"):
        gpudcp.load(blank_state(), checkpoint)


# Keys, shapes, dtypes


@pytest.mark.parametrize("key", ["absent", "nested"])
def test_a_missing_key_is_named(checkpoint: Path, key: str) -> None:
    """As a KeyError whose text reads well; all that are missing are named."""
    wanted = {"absent": {"absent": torch.zeros(1)}, "nested": {"nested": {"a": torch.zeros(1), "b": 1}}}[key]
    with pytest.raises(MissingKeyError) as told:
        gpudcp.load({**blank_state(), **wanted}, checkpoint)
    assert isinstance(told.value, KeyError)
    expected = {
        "absent": "the checkpoint has no 'absent'",
        "nested": "the checkpoint has no 'nested.a', 'nested.b'",
    }
    assert str(told.value) == expected[key]
    with pytest.raises(CheckpointException, match="has no"):
        dcp.load(
            {**blank_state(), **wanted},
            storage_reader=GpuStorageReader(checkpoint),
            planner=gpudcp.DefaultLoadPlanner(),
        )


def test_a_missing_record_is_named(checkpoint: Path) -> None:
    """The metadata describes the tensor, and has no place for it."""

    def forget(metadata: Metadata) -> None:
        metadata.storage_data = {i: r for i, r in metadata.storage_data.items() if i.fqn != "large"}

    rewrite_metadata(checkpoint, forget)
    with pytest.raises(MissingKeyError, match="no item 'large' at offset"):
        gpudcp.load(blank_state(), checkpoint)


@pytest.mark.parametrize("shape", [(12, 11), (10, 12), (120,), (12, 10, 1), ()])
def test_another_shape_is_refused_with_both(checkpoint: Path, shape: tuple[int, ...]) -> None:
    """Before any tensor is touched."""
    found = {**blank_state(), "weight": torch.zeros(shape)}
    with pytest.raises(PlanError, match=re.escape(f"weight: size (12, 10) in the checkpoint, {shape} in")):
        gpudcp.load(found, checkpoint)
    assert not found["large"].any()


def test_a_destination_of_another_shape_than_the_plan_is_refused(checkpoint: Path) -> None:
    """A planner that resolves a read item to something else, in boxes and in items that are read whole."""

    class Wrong(gpudcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            return super().resolve_tensor(read_item)[:1]

    with pytest.raises(PlanError, match=r"weight: the destination has shape \(1, 10\), its read item has \(12, 10\)"):
        gpudcp.load({"weight": torch.zeros(12, 10)}, checkpoint, planner=Wrong())
    complex_path = checkpoint / "complex"
    dcp.save({"weight": torch.ones(12, 10, dtype=torch.complex64).conj()}, checkpoint_id=complex_path)
    with pytest.raises(PlanError, match=r"weight: the destination has shape \(1, 10\), its read item has \(12, 10\)"):
        gpudcp.load({"weight": torch.zeros(12, 10, dtype=torch.complex64)}, complex_path, planner=Wrong())


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.uint16]


@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7)], ids=["plain", "transposed"])
def test_another_dtype_is_cast_as_stock_casts(
    tmp_path: Path, saved: torch.dtype, wanted: torch.dtype, shape: tuple[int, int]
) -> None:
    """Byte for byte, into contiguous and into strided destinations."""
    values = (torch.arange(63.0).view(7, 9) - 3).to(saved)
    gpudcp.save({"weight": values if shape == (7, 9) else values.t()}, tmp_path)
    results = []
    for load_it in (dcp.load, gpudcp.load):
        destination = torch.zeros(shape[::-1], dtype=wanted).t()
        load_it({"weight": destination}, checkpoint_id=tmp_path)
        results.append(bytes(destination.contiguous().view(torch.uint8).numpy()))
    assert results[0] == results[1]


def test_destinations_are_filled_where_they_are(checkpoint: Path) -> None:
    """A parameter, a view into a larger tensor and a strided one keep their identity; nothing beside them changes."""
    larger = torch.full((14, 12), -1.0)
    state: dict[str, Any] = {
        "weight": larger[1:13, 1:11],
        "large": torch.nn.Parameter(torch.zeros(100, 300, dtype=torch.int32), requires_grad=False),
    }
    destinations = dict(state)
    gpudcp.load(state, checkpoint)
    assert all(state[key] is destinations[key] for key in state)
    assert torch.equal(larger[1:13, 1:11], state_of(1.0)["weight"])
    assert int((larger == -1.0).sum()) == 14 * 12 - 120
    assert torch.equal(state["large"], state_of(1.0)["large"])

    leaf = torch.zeros(12, 10, requires_grad=True)
    gpudcp.load({"weight": leaf}, checkpoint)
    assert torch.equal(leaf.detach(), state_of(1.0)["weight"])
    assert leaf.is_leaf
    assert leaf.requires_grad


def test_a_key_is_loaded_from_a_checkpoint_that_has_more(checkpoint: Path) -> None:
    """And only its bytes are read."""
    reader = GpuStorageReader(checkpoint)
    found = {"weight": torch.zeros(12, 10)}
    gpudcp.load(found, storage_reader=reader)
    assert torch.equal(found["weight"], state_of(1.0)["weight"])
    assert reader.report is not None
    assert reader.report.file_nbytes == 480


# Damage


@pytest.mark.parametrize(("fqn", "distance"), [("weight", 0), ("weight", 479), ("large", 70_001), ("step", 7)])
@pytest.mark.parametrize("slab_nbytes", [4096, 4 << 20])
def test_a_flipped_bit_in_a_tensor_is_named(checkpoint: Path, fqn: str, distance: int, slab_nbytes: int) -> None:
    """Tensor, file and both checksums; stock loads the wrong number without a word."""
    flip_a_bit(checkpoint, fqn, distance)
    by_stock = blank_state()
    dcp.load(by_stock, checkpoint_id=checkpoint)
    assert not is_same(by_stock, state_of(1.0))

    with pytest.raises(CorruptCheckpointError) as told:
        load(checkpoint, slab_nbytes=slab_nbytes)
    (path,) = data_files(checkpoint)
    record = record_of(metadata_of(checkpoint), fqn)
    assert told.value.fqn == fqn
    assert os.path.basename(str(told.value.path)) == path.name
    assert told.value.expected_crc32 == record.gpudcp[2] != told.value.found_crc32
    assert f"{told.value.expected_crc32:#010x}" in str(told.value)
    assert f"{told.value.found_crc32:#010x}" in str(told.value)
    assert path.name in str(told.value)
    assert fqn in str(told.value)


@pytest.mark.parametrize("planner", [gpudcp.DefaultLoadPlanner, dcp.DefaultLoadPlanner])
def test_a_flipped_bit_in_an_object_is_named(checkpoint: Path, planner: Callable[[], Any]) -> None:
    """Before anything is made of its bytes, whichever planner would."""
    record = record_of(metadata_of(checkpoint), "note")
    flip_a_bit(checkpoint, "note", record.length // 2, from_payload=False)
    with pytest.raises(CorruptCheckpointError, match=r"note: the .* bytes at .* have CRC-32") as told:
        gpudcp.load(blank_state(), checkpoint, planner=planner())
    assert (told.value.fqn, told.value.expected_crc32) == ("note", record.gpudcp[2])


@pytest.mark.parametrize("verify", ["off", "payload", "full"])
def test_a_flipped_bit_outside_a_slice_is_found_by_full_verification_only(checkpoint: Path, verify: Any) -> None:
    """Of a slice's payload only the slice is read, unless the rest is asked for."""
    flip_a_bit(checkpoint, "large", 100 * 1200 - 1)
    found = {"large": torch.zeros(100, 300, dtype=torch.int32)}
    planner = Rows(slice(10, 20), fqn="large")
    if verify == "full":
        with pytest.raises(CorruptCheckpointError, match="large"):
            gpudcp.load(found, checkpoint, planner=planner, options=Options(verify=verify))
        return
    gpudcp.load(found, checkpoint, planner=planner, options=Options(verify=verify))
    assert torch.equal(found["large"][:10], state_of(1.0)["large"][10:20])


@pytest.mark.parametrize("fqn", ["weight", "large", "note"])
def test_verify_off_checks_nothing(checkpoint: Path, fqn: str) -> None:
    """The wrong bytes are loaded, as asked, and the report says that nothing was verified."""
    if fqn == "note":
        text = data_files(checkpoint)[0].read_bytes()
        at = text.index(b"number 1.0")
        record = record_of(metadata_of(checkpoint), "note")
        flip_a_bit(checkpoint, "note", at - record.offset, from_payload=False)
    else:
        flip_a_bit(checkpoint, fqn, 8)
    found = blank_state()
    reader = GpuStorageReader(checkpoint, options=Options(verify="off"))
    gpudcp.load(found, storage_reader=reader)
    assert not is_same(found, state_of(1.0))
    assert reader.report is not None
    assert reader.report.checksum == "off: Options(verify='off')"


def test_a_truncated_file_is_an_error_with_its_numbers(checkpoint: Path) -> None:
    """Whichever item lies at its end."""
    (path,) = data_files(checkpoint)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(TransferError, match=rf"needs bytes \d+ to {size}, the file has {size - 1}") as told:
        load(checkpoint)
    assert told.value.path == str(path)
    assert told.value.expected_nbytes is not None
    assert told.value.moved_nbytes == told.value.expected_nbytes - 1


def test_a_file_that_shrinks_while_it_is_read_is_an_error(checkpoint: Path) -> None:
    """The range was there when it was checked."""
    (path,) = data_files(checkpoint)

    class Shrinking(gpudcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            os.truncate(path, 10)
            return super().resolve_tensor(read_item)

    with pytest.raises(
        TransferError, match=r"the file ends at byte \d+; \d+ bytes at \d+ were expected, \d+ are there"
    ):
        gpudcp.load(blank_state(), checkpoint, planner=Shrinking(), options=Options(lanes=1, slab_nbytes=4096))


def test_a_missing_data_file_is_named(checkpoint: Path) -> None:
    """It is no newer checkpoint that took it."""
    (path,) = data_files(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=re.escape(path.name)):
        load(checkpoint)


# What is read


@pytest.fixture
def tall(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one 8 MiB tensor, 2048 rows of 4 KiB, and the tensor."""
    tensor = torch.arange(2048 * 1024, dtype=torch.int32).view(2048, 1024)
    gpudcp.save({"weight": tensor}, tmp_path / "tall")
    return tmp_path / "tall", tensor


@pytest.mark.parametrize("start", [0, 1, 640, 1920])
def test_a_slice_of_rows_reads_its_own_bytes(
    tall: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """A sixteenth of a tensor costs at most 1.02 of a sixteenth of its bytes; the report says what was read."""
    directory, tensor = tall
    reads = Reads(monkeypatch)
    reader = GpuStorageReader(directory)
    found = {"weight": torch.zeros_like(tensor)}
    gpudcp.load(found, storage_reader=reader, planner=Rows(slice(start, start + 128)))
    assert torch.equal(found["weight"][:128], tensor[start : start + 128])
    assert reader.report is not None
    assert reader.report.file_nbytes == reads.nbytes <= tensor.nbytes // 16 * 1.02
    assert reader.report.payload_nbytes == tensor.nbytes // 16


def test_a_slice_of_rows_of_a_stock_checkpoint_reads_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive's directory and its pickle have to be found, and are counted."""
    tensor = torch.arange(2048 * 1024, dtype=torch.int32).view(2048, 1024)
    dcp.save({"weight": tensor}, checkpoint_id=tmp_path)
    reads = Reads(monkeypatch)
    reader = GpuStorageReader(tmp_path)
    found = {"weight": torch.zeros_like(tensor)}
    gpudcp.load(found, storage_reader=reader, planner=Rows(slice(640, 768)))
    assert torch.equal(found["weight"][:128], tensor[640:768])
    assert reader.report is not None
    assert tensor.nbytes // 16 < reader.report.file_nbytes == reads.nbytes <= tensor.nbytes // 16 * 1.02 + 65536


def test_a_slice_of_columns_is_read_right(tall: tuple[Path, torch.Tensor]) -> None:
    """Narrow and wide ones, across slabs."""
    directory, tensor = tall
    for columns in (slice(0, 1), slice(1000, 1024), slice(17, 900)):
        found = {"weight": torch.zeros_like(tensor)}
        gpudcp.load(
            found, directory, planner=Rows(slice(3, 2000), columns), options=Options(slab_nbytes=1 << 20, lanes=2)
        )
        width = columns.stop - columns.start
        assert torch.equal(found["weight"][:1997, :width], tensor[3:2000, columns])


def test_full_verification_reads_the_whole_payload_of_a_slice(tall: tuple[Path, torch.Tensor]) -> None:
    """Once, and says so."""
    directory, tensor = tall
    reader = GpuStorageReader(directory, options=Options(verify="full"))
    found = {"weight": torch.zeros_like(tensor)}
    gpudcp.load(found, storage_reader=reader, planner=Rows(slice(640, 768)))
    assert torch.equal(found["weight"][:128], tensor[640:768])
    assert reader.report is not None
    assert tensor.nbytes <= reader.report.file_nbytes <= tensor.nbytes + tensor.nbytes // 16
    assert "1 of 1 payloads verified" in reader.report.checksum


def test_a_planner_that_renames_the_entries_of_its_metadata_reads_what_has_the_old_name(checkpoint: Path) -> None:
    """What is stored keeps its name: torch's reader finds it by its record alone, and so does ours."""

    class Renaming(dcp.DefaultLoadPlanner):
        def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
            entries = metadata.state_dict_metadata
            entries["renamed"] = entries.pop("weight")
            super().set_up_planner(state_dict, metadata, is_coordinator)

        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            items = [
                dataclasses.replace(item, storage_index=dataclasses.replace(item.storage_index, fqn="weight"))
                for item in plan.items
            ]
            return dataclasses.replace(plan, items=items)

    saved = state_of(1.0)["weight"]
    for load_by, reader in ((gpudcp.load, gpudcp.GpuStorageReader), (dcp.load, dcp.FileSystemReader)):
        loaded = {"renamed": torch.zeros_like(saved)}
        load_by(loaded, storage_reader=reader(checkpoint), planner=Renaming())
        assert torch.equal(loaded["renamed"], saved)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 2), (0, 13), (12, 1), (5, -1)], ids=["before", "longer", "behind", "negative"]
)
def test_a_box_outside_the_saved_chunk_is_refused(checkpoint: Path, offset: int, length: int) -> None:
    """A planner's mistake is not read from the next tensor's bytes."""

    class Outside(gpudcp.DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            (item,) = super().create_local_plan().items
            return LoadPlan(
                [
                    ReadItem(
                        item.type,
                        item.dest_index,
                        item.dest_offsets,
                        item.storage_index,
                        torch.Size([offset, 0]),
                        torch.Size([length, 10]),
                    )
                ]
            )

    with pytest.raises(PlanError, match=rf"weight: offsets \({offset}, 0\), lengths \({length}, 10\) leave a chunk"):
        gpudcp.load({"weight": torch.zeros(12, 10)}, checkpoint, planner=Outside())


def test_the_report_says_what_was_done(checkpoint: Path) -> None:
    """Items, bytes of payload and of files, seconds by phase, what was verified, and the reasons."""
    reader = GpuStorageReader(checkpoint)
    assert reader.report is None
    gpudcp.load(blank_state(), storage_reader=reader)
    report = reader.report
    assert report is not None
    note = record_of(metadata_of(checkpoint), "note")
    assert (report.direction, report.path, report.nitems) == ("load", str(checkpoint), 4)
    assert report.payload_nbytes == 120 * 4 + 30_000 * 4 + 8 + note.length
    assert report.payload_nbytes <= report.file_nbytes <= data_files(checkpoint)[0].stat().st_size
    assert report.executor == "cpu"
    assert report.files == "posix buffered"
    assert report.checksum.endswith("3 of 3 payloads verified")
    assert len(report.reasons) == 2
    assert set(report.phases_s) >= {"plan", "read", "unpack", "objects"}
    assert sum(report.phases_s.values()) <= report.total_s
    assert f"load {checkpoint}: 4 items" in str(report)


# Checkpoints that change under the reader


class Overtaken(GpuStorageReader):
    """A reader beside which a newer checkpoint is committed, once, just before or just after it opens its files."""

    def __init__(self, path: Path, commit: Callable[[], object], *, is_before: bool = True) -> None:
        super().__init__(path)
        self._commit: Callable[[], object] | None = commit
        self._is_before = is_before

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        commit, self._commit = self._commit, None
        if commit is not None and self._is_before:
            commit()
        plan = super().prepare_local_plan(plan)
        if commit is not None and not self._is_before:
            commit()
        return plan


def test_a_newer_checkpoint_before_the_files_are_open_is_loaded_instead(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The old files are gone: the new metadata is read, once, and all values are the newer ones."""
    for load_it in (gpudcp.load, dcp.load):
        gpudcp.save(state_of(1.0), checkpoint)
        found = blank_state()
        with caplog.at_level(logging.INFO, "gpudcp"):
            reader = Overtaken(checkpoint, lambda: gpudcp.save(state_of(2.0), checkpoint))
            load_it(found, storage_reader=reader)
        assert is_same(found, state_of(2.0))
        assert "a newer checkpoint replaced the one being read" in caplog.text
        caplog.clear()


def test_a_newer_checkpoint_after_the_files_are_open_changes_nothing(checkpoint: Path) -> None:
    """What is open stays readable: all values are the older ones."""
    found = blank_state()
    reader = Overtaken(checkpoint, lambda: gpudcp.save(state_of(2.0), checkpoint), is_before=False)
    gpudcp.load(found, storage_reader=reader)
    assert is_same(found, state_of(1.0))
    assert is_same(load(checkpoint), state_of(2.0))


def sharded_otherwise(number: float) -> dict[str, Any]:
    """The same keys with another tensor shape and one key more, as another state dict has them."""
    return {**state_of(number), "large": torch.ones(3, 4), "more": torch.ones(2)}


def test_a_newer_checkpoint_of_other_shapes_is_planned_anew(checkpoint: Path) -> None:
    """gpudcp.load starts over with the newer metadata; torch's driver cannot, and its error says to load again."""
    found = {"weight": torch.zeros(12, 10), "large": torch.zeros(100, 300, dtype=torch.int32)}
    newer = {**state_of(2.0), "weight": state_of(2.0)["weight"].double()}
    reader = Overtaken(checkpoint, lambda: gpudcp.save(newer, checkpoint))
    gpudcp.load(found, storage_reader=reader)
    assert torch.equal(found["weight"], state_of(2.0)["weight"])
    assert torch.equal(found["large"], state_of(2.0)["large"])

    gpudcp.save(state_of(1.0), checkpoint)
    with pytest.raises(CheckpointException, match=r"a newer checkpoint was committed during this load.*load again"):
        dcp.load(found, storage_reader=Overtaken(checkpoint, lambda: gpudcp.save(newer, checkpoint)))


def test_a_newer_checkpoint_that_does_not_fit_is_a_clear_error(checkpoint: Path) -> None:
    """The state dict no longer fits what is there."""
    reader = Overtaken(checkpoint, lambda: gpudcp.save(sharded_otherwise(2.0), checkpoint))
    with pytest.raises(PlanError, match=r"large: size \(3, 4\) in the checkpoint, \(100, 300\) in the state dict"):
        gpudcp.load(blank_state(), storage_reader=reader)


def test_a_reader_gives_up_when_the_checkpoint_keeps_changing(checkpoint: Path) -> None:
    """After one more try."""

    class Chased(GpuStorageReader):
        number = 1.0

        def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
            self.number += 1
            kind = torch.float64 if self.number % 2 else torch.float16
            gpudcp.save({"weight": state_of(self.number)["weight"].to(kind)}, self.path)
            return super().prepare_local_plan(plan)

    reader = Chased(checkpoint)
    with pytest.raises(CheckpointBusyError, match="load again"):
        gpudcp.load({"weight": torch.zeros(12, 10)}, storage_reader=reader)
    assert reader.number == 3.0


def test_ranks_that_opened_different_checkpoints_do_not_load_a_mixture(checkpoint: Path) -> None:
    """The coordinator compares what each has opened."""
    reader = GpuStorageReader(checkpoint)
    same = [LoadPlan([], storage_data="a"), LoadPlan([], storage_data="a")]
    assert reader.prepare_global_plan(same) is same
    with pytest.raises(CheckpointBusyError, match=r"they found \['a', 'b'\]"):
        reader.prepare_global_plan([LoadPlan([], storage_data="a"), LoadPlan([], storage_data="b")])


# Readers as objects


def open_files() -> set[str]:
    """What this process has open of data files."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if path.split(" ")[0].endswith(".distcp"):
            found.add(path)
    return found


def test_no_file_stays_open(checkpoint: Path) -> None:
    """After a load, after one that failed in mid-read, and after one that failed in its plan."""
    gpudcp.load(blank_state(), storage_reader=(reader := GpuStorageReader(checkpoint)))
    assert open_files() == set()
    flip_a_bit(checkpoint, "weight")
    with pytest.raises(CorruptCheckpointError):
        gpudcp.load(blank_state(), storage_reader=reader)
    assert open_files() == set()

    class Failing(gpudcp.DefaultLoadPlanner):
        def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
            raise ValueError(f"{len(new_plan.items)} items, on purpose")

    with pytest.raises(GpuDcpError):
        gpudcp.load(blank_state(), storage_reader=reader, planner=Failing())
    reader.reset()
    assert open_files() == set()


@contextmanager
def file_limit(nfiles: int) -> Iterator[None]:
    """The process may have this many files open besides those that it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + nfiles, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("save_by", ["stock", "ranks"])
def test_a_checkpoint_of_more_files_than_may_be_open_is_loaded(tmp_path: Path, save_by: str) -> None:
    """One file an item, as stock can write: each is opened when it is needed, and closed for others."""
    state: dict[str, Any] = {f"t{i:03}": torch.full((5,), float(i)) for i in range(150)} | {"note": "x"}
    if save_by == "stock":
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=False))
    else:
        gpudcp.save(state, tmp_path)
        split_into_files(tmp_path)
    assert len(data_files(tmp_path)) == 151
    found: dict[str, Any] = {key: torch.zeros(5) for key in state if key != "note"} | {"note": ""}
    with file_limit(60):
        gpudcp.load(found, tmp_path)
    assert is_same(found, state)


def split_into_files(directory: Path) -> None:
    """Give every item a file of its own, as many ranks would."""

    def split(metadata: Metadata) -> None:
        (path,) = data_files(directory)
        data = path.read_bytes()
        for number, record in enumerate(metadata.storage_data.values()):
            name = f"__{number}_0_0123456789abcdef.distcp"
            (directory / name).write_bytes(data[record.offset : record.offset + record.length])
            if record.gpudcp[0] is not None:
                record.gpudcp = (record.gpudcp[0] - record.offset, *record.gpudcp[1:])
            record.relative_path, record.offset = name, 0
        path.unlink()

    rewrite_metadata(directory, split)


def test_a_newer_checkpoint_under_a_load_of_many_files_is_busy(tmp_path: Path) -> None:
    """A file that is opened late may be gone: gpudcp.load starts over, and loads the newer checkpoint whole."""
    state = {f"t{i:03}": torch.full((5,), float(i)) for i in range(150)}
    newer = {key: value + 1000 for key, value in state.items()}
    gpudcp.save(state, tmp_path)
    split_into_files(tmp_path)
    (tmp_path / ".metadata").touch()

    found = {key: torch.zeros(5) for key in state}
    with file_limit(60):
        gpudcp.load(found, storage_reader=Overtaken(tmp_path, lambda: gpudcp.save(newer, tmp_path), is_before=False))
    assert is_same(found, newer)


def test_readers_pickle(checkpoint: Path) -> None:
    """Before their first use, and after one, without what they have open."""
    reader = GpuStorageReader(checkpoint, options=Options(verify="full"))
    for _ in range(2):
        copy: GpuStorageReader = pickle.loads(pickle.dumps(reader))
        assert (copy.path, copy.options) == (str(checkpoint), Options(verify="full"))
        found = blank_state()
        gpudcp.load(found, storage_reader=copy)
        assert is_same(found, state_of(1.0))
        gpudcp.load(blank_state(), storage_reader=reader)


@pytest.mark.parametrize("load_it", [gpudcp.load, dcp.load], ids=["gpudcp", "torch"])
def test_a_reader_is_used_for_several_loads_and_directories(checkpoint: Path, tmp_path: Path, load_it: Any) -> None:
    """Each load reads the metadata anew; a checkpoint_id points the reader elsewhere; an error is not remembered."""
    reader = GpuStorageReader(checkpoint)
    for number in (1.0, 2.0):
        gpudcp.save(state_of(number), checkpoint)
        found = blank_state()
        load_it(found, storage_reader=reader)
        assert is_same(found, state_of(number))
    with pytest.raises((CheckpointNotFoundError, CheckpointException)):
        load_it(blank_state(), checkpoint_id=tmp_path / "other", storage_reader=reader)
    gpudcp.save(state_of(3.0), tmp_path / "other", use_collectives=False)
    found = blank_state()
    load_it(found, storage_reader=reader)
    assert is_same(found, state_of(3.0))
    assert reader.checkpoint_id == reader.path == str(tmp_path / "other")
    found = blank_state()
    load_it(found, checkpoint_id=checkpoint, storage_reader=reader)
    assert is_same(found, state_of(2.0))


@pytest.mark.parametrize("has_index", [True, False])
def test_read_items_stay_on_their_rank(tmp_path: Path, has_index: bool) -> None:
    """What goes to the coordinator and back is a few bytes; a planner that looks at plans on the way sees them all."""
    state = {f"t{i:04}": torch.full((2,), float(i)) for i in range(2000)}
    gpudcp.save(state, tmp_path)
    if not has_index:
        (tmp_path / ".metadata.index").unlink()
    seen: list[int] = []

    class Looking(gpudcp.DefaultLoadPlanner):
        def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
            seen.append(len(pickle.loads(pickle.dumps(global_plan[0])).items))
            return global_plan

    for planner in (gpudcp.DefaultLoadPlanner(), Looking()):
        reader = GpuStorageReader(tmp_path)
        metadata = reader.read_metadata()
        found = {key: torch.zeros(2) for key in state}
        planner.set_up_planner(found, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        sent = pickle.dumps(reader.prepare_local_plan(planner.create_local_plan()))
        (back,) = reader.prepare_global_plan(planner.create_global_plan([pickle.loads(sent)]))
        reader.read_data(planner.finish_plan(pickle.loads(pickle.dumps(back))), planner).wait()
        assert is_same(found, state)
        assert (len(sent) < 1000) is (type(planner) is gpudcp.DefaultLoadPlanner)
    assert seen == [2000]
    other = GpuStorageReader(tmp_path)
    other.set_up_storage_reader(other.read_metadata(), is_coordinator=True)
    with pytest.raises(PlanError, match="kept by another reader"):
        other.read_data(LoadPlan(KeptItems()), gpudcp.DefaultLoadPlanner())


def test_a_reader_that_was_not_set_up_says_so(checkpoint: Path) -> None:
    """It knows no metadata yet."""
    with pytest.raises(CheckpointNotFoundError, match="has not been set up with a checkpoint's metadata"):
        GpuStorageReader(checkpoint).prepare_local_plan(LoadPlan([]))


def test_only_paths_on_mounted_file_systems_are_valid(tmp_path: Path) -> None:
    """torch asks this of checkpoint ids; a URL is refused."""
    assert GpuStorageReader.validate_checkpoint_id(tmp_path)
    assert not GpuStorageReader.validate_checkpoint_id("gs://bucket/key")
    for ask in (
        lambda: gpudcp.load({}, "gs://bucket/key"),
        lambda: GpuStorageReader(tmp_path).reset("gs://bucket/key"),
    ):
        with pytest.raises(PlanError, match=r"^gs://bucket/key: .*FsspecReader"):
            ask()
