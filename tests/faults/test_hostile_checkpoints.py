"""Checkpoints made to do harm: loading one runs nothing, reads nothing elsewhere, and takes little memory.

Symbolic links are followed when a checkpoint is read. A directory that is a link to a checkpoint, or whose files are
links into a store of blobs, is what users have (download caches are built so); and whoever can put links into the
directory can put the same bytes there. Nothing is ever written through a link inside the directory: a save makes new
files, and what it removes or replaces is the link.
"""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import names, number_in, save
from torch.distributed.checkpoint.metadata import Metadata

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
