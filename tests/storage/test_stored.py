"""Where items lie: records looked up and checked, boxes, and the small reads that find payloads."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_cases import blank_state, data_files, is_same, load, metadata_of, record_of, rewrite_metadata, state_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

import gpudcp
from gpudcp import Options
from gpudcp._dcp import ItemExtras, StorageInfo, storage_info
from gpudcp.errors import (
    CorruptCheckpointError,
    GpuDcpError,
    MissingKeyError,
    PlanError,
    TransferError,
    UnsafeCheckpointError,
)
from gpudcp.files.posix import PosixReader
from gpudcp.storage.stored import StoredItem, StoredItems, Window, check_box, check_range

NO_EXTRAS = ItemExtras(None, None, None)


def metadata_with(records: dict[MetadataIndex, Any], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Metadata:
    """One tensor ``w`` of these chunks (offsets, sizes), and these records."""
    described = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.float32),
        size=torch.Size([8, 4]),
        chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )
    return Metadata({"w": described}, storage_data=records)


def read_item(index: MetadataIndex, offsets: tuple[int, ...] = (0, 0), lengths: tuple[int, ...] = (4, 4)) -> ReadItem:
    return ReadItem(
        LoadItemType.TENSOR, index, torch.Size([0] * len(lengths)), index, torch.Size(offsets), torch.Size(lengths)
    )


INDEX = MetadataIndex("w", torch.Size([4, 0]))


# Records


def test_a_record_is_found_with_what_gpudcp_added_to_it() -> None:
    """Place, transforms and extras; an index hint makes no difference."""
    info = storage_info("__0_0.distcp", 10, 20, ItemExtras(12, torch.float32, 7))
    info.transform_descriptors = ["stream.zstd/1"]
    stored = StoredItems(metadata_with({INDEX: info}, []), "dir")
    expected = StoredItem("w", "__0_0.distcp", 10, 20, ("stream.zstd/1",), ItemExtras(12, torch.float32, 7))
    assert stored.find(INDEX) == expected
    assert stored.find(MetadataIndex("w", torch.Size([4, 0]), index=3)) == expected


def test_a_record_of_old_torch_without_transforms_is_found() -> None:
    """Before torch 2.7 the attribute did not exist."""
    info = StorageInfo("a", 0, 1)
    del info.__dict__["transform_descriptors"]
    stored = StoredItems(metadata_with({INDEX: info}, []), "dir")
    assert stored.find(INDEX) == StoredItem("w", "a", 0, 1, (), NO_EXTRAS)


@pytest.mark.parametrize(
    "index", [MetadataIndex("x", torch.Size([4, 0])), MetadataIndex("w", torch.Size([0, 0])), MetadataIndex("w")]
)
def test_an_item_without_a_record_is_named(index: MetadataIndex) -> None:
    """By key and offset."""
    stored = StoredItems(metadata_with({INDEX: StorageInfo("a", 0, 1)}, []), "dir")
    with pytest.raises(MissingKeyError, match=re.escape(f"dir: no item {index.fqn!r} at offset {index.offset}")):
        stored.find(index)


@pytest.mark.parametrize(
    "info",
    [
        StorageInfo("a", -1, 1),
        StorageInfo("a", 0, -1),
        StorageInfo("a", 0.0, 1),  # type: ignore[arg-type]
        StorageInfo("a", True, 1),
        StorageInfo(b"a", 0, 1),  # type: ignore[arg-type]
        StorageInfo(None, 0, 1),  # type: ignore[arg-type]
        StorageInfo("a", 0, 1, transform_descriptors=5),  # type: ignore[arg-type]
        "no record",
        ("a", 0, 1),
    ],
    ids=repr,
)
def test_a_record_that_is_none_is_corrupt(info: Any) -> None:
    """Wrong types and negative numbers, the item named."""
    stored = StoredItems(metadata_with({INDEX: info}, []), "dir")
    with pytest.raises(CorruptCheckpointError, match="dir: w: ") as told:
        stored.find(INDEX)
    assert told.value.fqn == "w"


@pytest.mark.parametrize(
    "extras", [5, (1,), (1, 2, 3), (-1, torch.float32, 3), (None, torch.float32, 3), ("", None, "")]
)
def test_extras_that_are_none_of_ours_are_corrupt(extras: Any) -> None:
    """Whatever stands where gpudcp puts what it knows."""
    info = StorageInfo("a", 0, 1)
    info.__dict__["gpudcp"] = extras
    with pytest.raises(CorruptCheckpointError, match="w: "):
        StoredItems(metadata_with({INDEX: info}, []), "dir").find(INDEX)


OUTSIDE = ["../victim", "a/../../victim", "/etc/passwd", "", "..", "a/..", "nul\0", "./../x"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_out_of_the_directory_is_refused(path: str) -> None:
    """By record, and for all paths of a load at once."""
    stored = StoredItems(metadata_with({INDEX: StorageInfo(path, 0, 1)}, []), "dir")
    for ask in (lambda: stored.find(INDEX), lambda: stored.paths([read_item(INDEX)])):
        with pytest.raises(UnsafeCheckpointError, match="lies outside the checkpoint") as told:
            ask()
        assert told.value.refused == path


def test_a_path_into_a_subdirectory_is_allowed() -> None:
    """And one whose name merely has dots."""
    for path in ("deep/er/__0_0.distcp", "..data", "a..b/c", "..."):
        stored = StoredItems(metadata_with({INDEX: StorageInfo(path, 0, 1)}, []), "dir")
        assert stored.find(INDEX).path == path
        assert stored.paths([read_item(INDEX)]) == {path}


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_the_directory_is_opened(checkpoint: Path, path: str) -> None:
    """A load of such a checkpoint, of one key and of all, changes no tensor; the data would be there."""
    (data,) = data_files(checkpoint)
    (checkpoint.parent / "victim").write_bytes(data.read_bytes())
    absolute = str(checkpoint.parent / "victim") if path.startswith("/") else path

    def lead_outside(metadata: Metadata) -> None:
        record_of(metadata, "weight").relative_path = absolute

    rewrite_metadata(checkpoint, lead_outside)
    for wanted in (blank_state(), {"weight": torch.zeros(12, 10)}):
        with pytest.raises(UnsafeCheckpointError, match=r"weight|outside"):
            gpudcp.load(wanted, checkpoint)
        assert not wanted["weight"].any()


def test_a_link_in_the_directory_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    """Who can make links there could as well write the data."""
    (data,) = data_files(checkpoint)
    os.rename(data, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", data)
    assert is_same(load(checkpoint), state_of(1.0))


def test_the_paths_of_a_part_are_those_of_its_items() -> None:
    """And of everything, all."""
    records = {MetadataIndex("w", torch.Size([i, 0])): StorageInfo(f"file{i % 3}", 0, 1) for i in range(6)}
    stored = StoredItems(metadata_with(records, []), "dir")
    items = [read_item(index) for index in records]
    assert stored.paths(items) == {"file0", "file1", "file2"}
    assert stored.paths(items[:2]) == {"file0", "file1"}
    assert stored.paths([]) == set()


# Chunks and boxes


def test_the_sizes_of_a_chunk_are_found_with_and_without_a_hint() -> None:
    """A wrong hint, as another save's index has it, makes no difference."""
    chunks = [((0, 0), (4, 4)), ((4, 0), (3, 4)), ((7, 0), (1, 4))]
    stored = StoredItems(metadata_with({}, chunks), "dir")
    for hint in (None, 0, 1, 2, 3, -1):
        assert stored.chunk_sizes(MetadataIndex("w", torch.Size([4, 0]), index=hint)) == (3, 4)


@pytest.mark.parametrize("index", [MetadataIndex("w", torch.Size([1, 0])), MetadataIndex("w")])
def test_a_chunk_that_is_not_described_is_corrupt(index: MetadataIndex) -> None:
    """A record for it does not help: its shape is unknown."""
    stored = StoredItems(metadata_with({}, [((0, 0), (4, 4))]), "dir")
    with pytest.raises(CorruptCheckpointError, match=f"dir: {index.fqn}: ") as told:
        stored.chunk_sizes(index)
    assert told.value.fqn == index.fqn


def test_a_tensor_that_only_the_files_know_has_no_sizes_here() -> None:
    """A load planner may have renamed it in its metadata."""
    stored = StoredItems(metadata_with({}, [((0, 0), (4, 4))]), "dir")
    assert stored.chunk_sizes(MetadataIndex("x", torch.Size([0, 0]))) is None


sizes_and_boxes = st.integers(0, 3).flatmap(
    lambda ndim: st.tuples(*[st.tuples(*[st.integers(low, 4) for _ in range(ndim)]) for low in (0, -1, -1)])
)


@given(sizes_and_boxes)
@settings(deadline=None, max_examples=300)
def test_a_box_is_accepted_exactly_if_every_element_lies_in_the_chunk(case: tuple[tuple[int, ...], ...]) -> None:
    """Against Python's own idea of ranges."""
    sizes, offsets, lengths = case
    is_inside = all(
        min(offset, length) >= 0 and offset + length <= size
        for size, offset, length in zip(sizes, offsets, lengths, strict=True)
    )
    item = read_item(INDEX, offsets, lengths)
    if is_inside:
        check_box(item, sizes)
    else:
        with pytest.raises(PlanError, match="w: offsets"):
            check_box(item, sizes)


@pytest.mark.parametrize(("offsets", "lengths"), [((0,), (4, 4)), ((0, 0), (4,)), ((0, 0, 0), (4, 4, 1)), ((), ())])
def test_a_box_of_other_dimensions_is_refused(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """A planner's mistake."""
    with pytest.raises(PlanError, match="w: offsets"):
        check_box(read_item(INDEX, offsets, lengths), (4, 4))


# Ranges in files


@pytest.fixture
def file(tmp_path: Path) -> PosixReader:
    """A file of 100,000 bytes."""
    (tmp_path / "file").write_bytes(bytes(number % 251 for number in range(100_000)))
    return PosixReader(str(tmp_path / "file"))


def test_a_range_must_lie_inside_its_file(file: PosixReader) -> None:
    """Up to the last byte; the error has the numbers."""
    check_range(StoredItem("w", "file", 99_000, 1000, (), NO_EXTRAS), file)
    check_range(StoredItem("w", "file", 100_000, 0, (), NO_EXTRAS), file)
    for start, nbytes, there in ((99_000, 1001, 1000), (200_000, 5, 0), (1 << 62, 1 << 62, 0)):
        with pytest.raises(
            TransferError, match=f"w: needs bytes {start} to {start + nbytes}, the file has 100000"
        ) as told:
            check_range(StoredItem("w", "file", start, nbytes, (), NO_EXTRAS), file)
        assert (told.value.byte_offset, told.value.expected_nbytes, told.value.moved_nbytes) == (start, nbytes, there)


@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 40_000)), max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_window_gives_the_bytes_of_the_file(requests: list[tuple[int, int]]) -> None:
    """Whatever the order of the requests; it counts what it read."""
    data = bytes(number % 251 for number in range(100_000))

    class Memory:
        path = "memory"
        nbytes = len(data)

        def __init__(self) -> None:
            self.moved = 0

        def read(self, into: memoryview, byte_offset: int) -> None:
            into[:] = data[byte_offset : byte_offset + len(into)]
            self.moved += len(into)

    memory = Memory()
    window = Window(memory)  # type: ignore[arg-type]
    for start, length in requests:
        nbytes = min(length, len(data) - start)
        assert bytes(window.read(start, nbytes)) == data[start : start + nbytes]
    assert window.nbytes == memory.moved


def test_a_window_reads_neighbours_at_once(file: PosixReader) -> None:
    """A thousand small reads in a row are four of the file."""
    window = Window(file)
    for start in range(0, 100_000, 100):
        window.read(start, 100)
    assert 100_000 <= window.nbytes <= 100_000 + 4 * 100
    sizes = []
    read = file.read
    file.read = lambda into, at: (sizes.append(len(into)), read(into, at))[1]  # type: ignore[method-assign,assignment]
    window = Window(file)
    for start in range(0, 100_000, 100):
        window.read(start, 100)
    assert len(sizes) <= 5


# Records that contradict the file or the metadata


CONTRADICTIONS: dict[str, tuple[Any, type[GpuDcpError]]] = {
    "payload before its item": (lambda r: _extras(r, -64), CorruptCheckpointError),
    "payload behind its item": (lambda r: _extras(r, +2000), CorruptCheckpointError),
    "item behind the file": (lambda r: setattr(r, "offset", r.offset + (1 << 40)), TransferError),
    "item longer than the file": (lambda r: setattr(r, "length", 1 << 40), TransferError),
    "item before its payload": (lambda r: setattr(r, "length", 16), CorruptCheckpointError),
}


def _extras(record: Any, distance: int) -> None:
    record.gpudcp = (record.gpudcp[0] + distance, *record.gpudcp[1:])


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_range_that_cannot_be_right_is_refused(checkpoint: Path, kind: str) -> None:
    """Nothing is read from where another item lies, or nothing does."""
    change, error = CONTRADICTIONS[kind]
    rewrite_metadata(checkpoint, lambda metadata: change(record_of(metadata, "weight")))
    with pytest.raises(error, match="weight"):
        load(checkpoint)


def test_a_payload_that_points_at_another_items_bytes_is_caught(checkpoint: Path) -> None:
    """Two records that swapped their places: ranges and sizes are right, the checksums are not."""
    gpudcp.save({"a": torch.arange(100.0), "b": torch.arange(100.0) + 1}, checkpoint)

    def swap(metadata: Metadata) -> None:
        a, b = record_of(metadata, "a"), record_of(metadata, "b")
        crc_a, crc_b = a.gpudcp[2], b.gpudcp[2]
        a.__dict__, b.__dict__ = b.__dict__, a.__dict__
        a.gpudcp, b.gpudcp = (*a.gpudcp[:2], crc_a), (*b.gpudcp[:2], crc_b)

    rewrite_metadata(checkpoint, swap)
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        gpudcp.load({"a": torch.zeros(100), "b": torch.zeros(100)}, checkpoint)


def test_a_shape_in_the_metadata_that_the_file_does_not_have_is_corrupt(tmp_path: Path) -> None:
    """Of a stock checkpoint, whose files say themselves what they hold."""
    dcp.save({"weight": torch.ones(6, 4)}, checkpoint_id=tmp_path)

    def reshape(metadata: Metadata) -> None:
        described: Any = metadata.state_dict_metadata["weight"]
        described.size = torch.Size([4, 6])
        described.chunks[0].sizes = torch.Size([4, 6])

    rewrite_metadata(tmp_path, reshape)
    with pytest.raises(
        CorruptCheckpointError, match=re.escape("weight: the file holds shape (6, 4), the metadata says (4, 6)")
    ):
        gpudcp.load({"weight": torch.zeros(4, 6)}, tmp_path)


def test_a_tensor_that_is_an_object_in_the_file_is_corrupt(checkpoint: Path) -> None:
    """The metadata says tensor, the file holds a string."""

    def point_at_the_note(metadata: Metadata) -> None:
        weight, note = record_of(metadata, "weight"), record_of(metadata, "note")
        weight.__dict__.update({**note.__dict__, "gpudcp": None})

    rewrite_metadata(checkpoint, point_at_the_note)
    with pytest.raises(CorruptCheckpointError, match=r"weight: holds a str, not a tensor"):
        load(checkpoint)


# Objects and pickles that would run code


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._witness),)


def test_a_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """By name, with the remedy; with trust_pickle it runs, as it was asked to."""
    gpudcp.save(state_of(1.0), tmp_path / "checkpoint")
    path, witness = tmp_path / "checkpoint" / ".metadata", tmp_path / "ran"
    metadata = metadata_of(tmp_path / "checkpoint")
    metadata.planner_data = {"x": Bomb(witness)}
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir.*Options\(trust_pickle=True\)") as told:
        load(tmp_path / "checkpoint")
    assert told.value.refused == "posix.mkdir"
    assert not witness.exists()
    load(tmp_path / "checkpoint", trust_pickle=True)
    assert witness.exists()


def test_an_object_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Nothing of it runs, and its key keeps its value; stock runs it."""
    witness = tmp_path / "ran"
    dcp.save({"good": 1, "odd": Bomb(witness)}, checkpoint_id=tmp_path / "checkpoint")
    found: dict[str, Any] = {"good": 0, "odd": "untouched"}
    with pytest.raises(UnsafeCheckpointError, match=r"'odd' was not loaded: .*mkdir") as told:
        gpudcp.load(found, tmp_path / "checkpoint")
    assert told.value.refused == "posix.mkdir"
    assert not witness.exists()
    assert found["odd"] == "untouched"
    with pytest.raises(CheckpointException, match="mkdir"):
        dcp.load(found, checkpoint_id=tmp_path / "checkpoint", planner=gpudcp.DefaultLoadPlanner())
    assert not witness.exists()
    gpudcp.load(found, tmp_path / "checkpoint", options=Options(trust_pickle=True))
    assert witness.exists()


def test_a_tensor_item_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """In place of a tensor's archive: neither the search for the payload nor torch.load runs it."""
    directory, witness = tmp_path / "checkpoint", tmp_path / "ran"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=directory)
    (path,) = data_files(directory)
    torch.save(Bomb(witness), path)

    def enlarge(metadata: Metadata) -> None:
        record_of(metadata, "weight").length = path.stat().st_size

    rewrite_metadata(directory, enlarge)
    with pytest.raises(UnsafeCheckpointError, match=r"weight.*mkdir"):
        gpudcp.load({"weight": torch.zeros(3)}, directory)
    assert not witness.exists()
