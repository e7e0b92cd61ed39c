"""The open files of a load: the way is chosen when they are open already, and names may be gone by then."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from storage_cases import is_same, load, state_of

import gpudcp
from gpudcp.executors.select import Selection
from gpudcp.files.base import FileReader
from gpudcp.files.figures import Way
from gpudcp.files.filesystems import supports_direct_io
from gpudcp.files.posix import PosixReader
from gpudcp.storage import openfiles, reader
from gpudcp.storage.openfiles import OpenFiles


class ByKvikio:
    """A file that device memory can be read from; counts the bytes."""

    alignment_nbytes = 4096

    def __init__(self, file: PosixReader) -> None:
        self.path, self.nbytes, self.read, self.close = file.path, file.nbytes, file.read, file.close
        self.moved_nbytes = 0

    def read_device(self, into: torch.Tensor, byte_offset: int) -> None:
        self.moved_nbytes += into.nbytes
        self.read(memoryview(into.numpy()), byte_offset)


@pytest.fixture
def by_kvikio(monkeypatch: pytest.MonkeyPatch) -> list[ByKvikio]:
    """The files that were opened for KvikIO."""
    made: list[ByKvikio] = []

    def read_by(file: PosixReader, way: Way) -> FileReader:
        assert way == "gds"
        made.append(ByKvikio(file))
        return made[-1]

    monkeypatch.setattr(openfiles, "read_by", read_by)
    monkeypatch.setattr(openfiles, "open_reader", lambda path, way: _opened(path, way, read_by))
    return made


def _opened(path: str, way: Way, read_by: Any) -> FileReader:
    file = PosixReader(path)
    return file if way == "buffered" else read_by(file, way)  # type: ignore[no-any-return]


def test_a_load_reads_by_the_way_that_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kvikio: list[ByKvikio]
) -> None:
    """Its files were opened before, when the plan was made."""
    gpudcp.save(state_of(1.0), tmp_path)
    inner = reader.select

    def select(*args: Any, **kwargs: Any) -> Selection:
        return inner(*args, **kwargs)._replace(way="gds")

    monkeypatch.setattr(reader, "select", select)
    assert is_same(load(tmp_path, executor="interpret", slab_nbytes=65536, lanes=2), state_of(1.0))
    assert len(by_kvikio) == 1
    assert by_kvikio[0].moved_nbytes > 100_000


def test_a_file_that_is_open_is_read_by_another_way_though_its_name_is_gone(
    tmp_path: Path, by_kvikio: list[ByKvikio]
) -> None:
    """A newer save may have removed it. Files opened later go that way too; closing closes all."""
    (tmp_path / "a").write_bytes(b"here")
    (tmp_path / "b").write_bytes(b"there")
    files = OpenFiles(str(tmp_path))
    files.open({"a"})
    (tmp_path / "a").unlink()
    files.read_by("gds")
    for path, expected in (("a", b"here"), ("b", b"there")):
        data = bytearray(len(expected))
        files.get(path).read(memoryview(data), 0)
        assert data == expected
    files.close()
    assert [file.path for file in by_kvikio] == [str(tmp_path / name) for name in ("a", "b")]
    assert not any(file.close.alive for file in by_kvikio)  # type: ignore[attr-defined]


def test_whole_blocks_of_an_open_file_go_past_the_page_cache(tmp_path: Path) -> None:
    """Everything else is read as before."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    (tmp_path / "a").write_bytes(bytes(range(256)) * 33)
    files = OpenFiles(str(tmp_path))
    files.open({"a"})
    files.read_by("direct")
    file = files.get("a")
    assert isinstance(file, PosixReader)
    assert file._direct_fd is not None
    data = bytearray(256 * 33 - 1)
    file.read(memoryview(data), 1)
    assert data == (bytes(range(256)) * 33)[1:]
    files.close()
    assert not file.close.alive


@pytest.mark.parametrize("is_stock", [False, True])
def test_a_load_past_the_page_cache_leaves_it_the_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stock: bool
) -> None:
    """Whatever byte a payload begins at, as in stock's files; small reads of envelopes and objects are not counted."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    if is_stock:
        dcp.save(state_of(1.0), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    else:
        gpudcp.save(state_of(1.0), tmp_path)
    select, read = reader.select, PosixReader.read
    reads: list[tuple[int, int, int]] = []
    direct: list[int] = []

    def counted(file: PosixReader, into: memoryview, byte_offset: int) -> None:
        if threading.current_thread().name.startswith("gpudcp-read"):
            reads.append((byte_offset, len(into), file.nbytes))
        read(file, into, byte_offset)

    def directly(*args: Any) -> int:
        moved = inner(*args)
        if threading.current_thread().name.startswith("gpudcp-read"):
            direct.append(moved)
        return moved

    inner = PosixReader._read_directly
    monkeypatch.setattr(PosixReader, "read", counted)
    monkeypatch.setattr(PosixReader, "_read_directly", directly)
    monkeypatch.setattr(reader, "select", lambda *args, **kwargs: select(*args, **kwargs)._replace(way="direct"))
    assert is_same(load(tmp_path, executor="interpret", slab_nbytes=65536, lanes=2), state_of(1.0))
    assert len(reads) > 1
    assert [offset % 4096 for offset, _, _ in reads] == [0] * len(reads)
    ends = [nbytes % 4096 for offset, nbytes, file_nbytes in reads if offset + nbytes == file_nbytes]
    assert sum(direct) == sum(nbytes for _, nbytes, _ in reads) - sum(ends)


def test_files_for_which_there_are_no_descriptors_left_are_read_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kvikio: list[ByKvikio]
) -> None:
    """Slower, but read."""
    (tmp_path / "a").write_bytes(b"here")
    files = OpenFiles(str(tmp_path))
    files.open({"a"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3, 3))
    files.read_by("gds")
    data = bytearray(4)
    files.get("a").read(memoryview(data), 0)
    assert data == b"here"
    assert by_kvikio == []
    files.close()
