"""Checkpoints made to do harm: loading one runs nothing, reads nothing elsewhere, and takes little memory.

Symbolic links are followed when a checkpoint is read. A directory that is a link to a checkpoint, or whose files are
links into a store of blobs, is what users have (download caches are built so); and whoever can put links into the
directory can put the same bytes there. Nothing is ever written through a link inside the directory: a save makes new
files, and what it removes or replaces is the link.
"""

from __future__ import annotations

import os
import pickle
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import names, number_in, save
from torch.distributed.checkpoint.metadata import Metadata

import gpudcp
from gpudcp.errors import CorruptCheckpointError, GpuDcpError, TransferError, UnsafeCheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of 1."""
    save(1, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class Harm:
    """Makes a directory when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._witness),)


def rewrite(directory: Path, change: Callable[[Metadata], None]) -> None:
    """Change the metadata, and write it as stock torch does."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def record_of(metadata: Metadata, fqn: str) -> Any:
    """The storage record of an entry."""
    (record,) = [record for index, record in metadata.storage_data.items() if index.fqn == fqn]
    return record


def test_a_malicious_metadata_runs_nothing(directory: Path, tmp_path: Path) -> None:
    """Whole, or somewhere inside a real one."""
    witness = tmp_path / "ran"
    rewrite(directory, lambda metadata: metadata.planner_data.update(note=Harm(witness)))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        number_in(directory)
    (directory / ".metadata").write_bytes(pickle.dumps(Harm(witness)))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        number_in(directory)
    assert not witness.exists()


def test_a_malicious_object_runs_nothing(directory: Path, tmp_path: Path) -> None:
    """As an object of the checkpoint, with the metadata that belongs to it."""
    witness = tmp_path / "ran"
    data = pickle.dumps(Harm(witness), 2)
    (directory / "evil").write_bytes(data)

    def point_there(metadata: Metadata) -> None:
        record = record_of(metadata, "note")
        record.relative_path, record.offset, record.length = "evil", 0, len(data)
        record.__dict__.pop("gpudcp", None)

    rewrite(directory, point_there)
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        number_in(directory)
    assert not witness.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret", "..", "", "a\0b", "./../secret"])
def test_paths_out_of_the_directory_are_refused(directory: Path, path: str) -> None:
    """By name: nothing is opened."""
    (directory.parent / "secret").write_bytes(b"secret" * 10_000)
    rewrite(directory, lambda metadata: setattr(record_of(metadata, "weight"), "relative_path", path))
    with pytest.raises(UnsafeCheckpointError, match="outside the checkpoint"):
        number_in(directory)


def test_a_directory_that_is_a_link_is_read_and_saved_into(directory: Path, tmp_path: Path) -> None:
    """As `latest -> step_100` is."""
    (tmp_path / "latest").symlink_to(directory)
    assert number_in(tmp_path / "latest") == 1
    save(2, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert number_in(directory) == 2


def test_files_that_are_links_are_read_and_never_written_through(directory: Path, tmp_path: Path) -> None:
    """Every file a link into a store of blobs, as download caches have it; an overwrite leaves the store alone."""
    (store := tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(store / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert number_in(directory) == 1
    save(2, directory)
    assert number_in(directory) == 2
    assert not any(path.is_symlink() for path in directory.iterdir())
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_nothing_is_written_through_a_link_that_waits_for_a_temporary_file(directory: Path, tmp_path: Path) -> None:
    """The name of the temporary metadata can be known beforehand."""
    (victim := tmp_path / "victim").write_bytes(b"precious")
    (directory / ".metadata.tmp").symlink_to(victim)
    save(2, directory)
    assert number_in(directory) == 2
    assert victim.read_bytes() == b"precious"
    assert not any(name.endswith(".tmp") for name in names(directory))


@pytest.mark.parametrize("target", ["nowhere", ".metadata"])
def test_a_link_that_leads_nowhere_is_a_clear_error(directory: Path, target: str) -> None:
    """To no file, or to itself."""
    (directory / ".metadata").unlink()
    (directory / ".metadata").symlink_to(target)
    with pytest.raises((FileNotFoundError, TransferError), match=r"\.metadata"):
        number_in(directory)


ABSURD: dict[str, tuple[str, str, Any]] = {
    "an item of 2^62 bytes": ("weight", "length", 1 << 62),
    "an item at byte 2^62": ("weight", "offset", 1 << 62),
    "an item beyond 64 bits": ("weight", "offset", 1 << 70),
    "an item at a negative byte": ("weight", "offset", -4096),
    "an item of negative length": ("weight", "length", -1),
    "an object of 2^62 bytes": ("note", "length", 1 << 62),
    "an item without length": ("large", "length", 0),
    "a length that is text": ("large", "length", "all"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_ranges_are_refused_before_memory_is_taken(directory: Path, name: str) -> None:
    """Each with its numbers, without reading them."""
    fqn, attribute, value = ABSURD[name]
    rewrite(directory, lambda metadata: setattr(record_of(metadata, fqn), attribute, value))
    tracemalloc.start()
    try:
        with pytest.raises((CorruptCheckpointError, TransferError)) as told:
            number_in(directory)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert fqn in str(told.value)
    assert peak < 16 << 20


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, -5])
def test_absurd_shapes_are_refused(directory: Path, size: int) -> None:
    """What the metadata says of a tensor must fit what it is loaded into, and its file."""

    def grow(metadata: Metadata) -> None:
        tensor: Any = metadata.state_dict_metadata["weight"]
        tensor.size = torch.Size([size])
        tensor.chunks[0].sizes = torch.Size([size])

    rewrite(directory, grow)
    with pytest.raises(GpuDcpError, match="weight"):
        number_in(directory)


def test_items_that_overlap_are_told_by_their_checksums(directory: Path) -> None:
    """A range may be named twice, as nothing is written by a load; whose bytes they are, the checksums say."""

    def overlap(metadata: Metadata) -> None:
        weight, large = record_of(metadata, "weight"), record_of(metadata, "large")
        weight.offset, weight.length, weight.relative_path = (
            large.offset + 4096,
            large.length - 4096,
            large.relative_path,
        )
        weight.gpudcp = (large.gpudcp[0] + 4096, *weight.gpudcp[1:])

    rewrite(directory, overlap)
    with pytest.raises(CorruptCheckpointError, match="weight"):
        number_in(directory)


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(directory: Path, tmp_path: Path) -> None:
    """The save says what is in its way."""
    (directory / ".gpudcp.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TransferError, match=r"\.gpudcp\.lock"):
        save(2, directory)
    assert number_in(directory) == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def no_wait() -> Iterator[None]:
    """Whoever waits for the other end of a pipe is told so, instead of waiting for ever."""

    def tell(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, tell)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
}


@pytest.fixture(params=SPECIAL)
def put_special(request: pytest.FixtureRequest, no_wait: None) -> Callable[[Path], None]:  # noqa: ARG001
    """Puts something in the place of a file that can be opened, and is none."""

    def put(path: Path) -> None:
        path.unlink()
        SPECIAL[request.param](path)

    return put


def test_what_is_no_regular_file_in_the_place_of_metadata_is_a_clear_error(
    directory: Path, put_special: Callable[[Path], None]
) -> None:
    """Opening a pipe would wait, and reading a device would take all memory there is. A save puts a file there."""
    put_special(directory / ".metadata")
    with pytest.raises(TransferError, match=r"\.metadata: cannot be read: [Ii]s (no regular file|a directory)"):
        number_in(directory)
    with pytest.raises(TransferError, match=r"\.metadata: cannot be read: [Ii]s (no regular file|a directory)"):
        gpudcp.verify(directory)
    if (directory / ".metadata").is_dir():  # which no rename replaces, and no unlink removes
        (directory / ".metadata").rmdir()
    save(2, directory)
    assert number_in(directory) == 2


def test_what_is_no_regular_file_in_the_place_of_an_index_is_passed_over(
    directory: Path, put_special: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a damaged index is, and verify lists it."""
    monkeypatch.setattr("gpudcp.formats.index.LEAST_ROWS", 1)
    save(2, directory)
    put_special(directory / ".metadata.index")
    assert number_in(directory) == 2
    (problem,) = gpudcp.verify(directory).problems
    assert (problem.kind, problem.file) == ("index", ".metadata.index")
    assert "is no regular file" in problem.found or "Is a directory" in problem.found


def test_what_is_no_regular_file_in_the_place_of_data_is_a_clear_error(
    directory: Path, put_special: Callable[[Path], None]
) -> None:
    """And one problem for verify."""
    (path,) = directory.glob("*.distcp")
    put_special(path)
    with pytest.raises(TransferError, match=r"\.distcp: cannot be opened: [Ii]s (no regular file|a directory)"):
        number_in(directory)
    (problem,) = gpudcp.verify(directory).problems
    assert (problem.kind, problem.file) == ("file", path.name)
    assert "is no regular file" in problem.found or "Is a directory" in problem.found


def test_another_ranks_metadata_that_is_no_regular_file_removes_nothing(
    directory: Path, put_special: Callable[[Path], None]
) -> None:
    """What it needs is unknown: a save into the directory leaves the old files in place."""
    before = names(directory)
    (directory / "__7.metadata").touch()
    put_special(directory / "__7.metadata")
    save(2, directory)
    assert number_in(directory) == 2
    assert {name for name in before if name.endswith(".distcp")} <= names(directory)
