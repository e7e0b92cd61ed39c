"""POSIX files: what the kernel does in part goes on, what it refuses is an error with numbers, nothing is left over."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pickle
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gpudcp.errors import CheckpointNotFoundError, TransferError
from gpudcp.files import posix
from gpudcp.files.filesystems import supports_direct_io
from gpudcp.files.posix import PosixReader, PosixWriter, fsync_directory

NBYTES = 5 * 4096
CONTENT = bytes(i * 7 % 251 for i in range(NBYTES))


def page_aligned(data: bytes) -> memoryview:
    """The data in memory that direct I/O accepts."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def writer_of(path: Path, *, nbytes: int = NBYTES, is_direct: bool = False, fsync: bool = False) -> PosixWriter:
    """A writer; the knobs that matter to a test are its arguments."""
    return PosixWriter(str(path), nbytes=nbytes, is_direct=is_direct, fsync=fsync)


def write_file(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """A whole file, as an executor writes it: in pieces, then finished."""
    with writer_of(path, nbytes=len(data), fsync=fsync) as writer:
        for start in range(0, len(data), 64 << 10):
            writer.write(memoryview(data)[start : start + (64 << 10)], start)
        writer.finish(len(data))


@pytest.fixture(params=["buffered", "direct"])
def is_direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    """Both ways of writing."""
    if request.param == "direct" and not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    return bool(request.param == "direct")


def open_paths(under: Path) -> list[str]:
    """The files under a path that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if path.startswith(str(under)))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, NBYTES - 1, NBYTES])
def test_a_file_holds_what_was_written_and_ends_where_it_should(tmp_path: Path, is_direct: bool, nbytes: int) -> None:
    """Writes come as whole blocks, in any order; `finish` cuts off what the last one has too much."""
    path = tmp_path / "file"
    with writer_of(path, nbytes=nbytes, is_direct=is_direct) as writer:
        for start in reversed(range(0, nbytes, 8192)):
            writer.write(page_aligned(CONTENT[start : start + 8192]), start)
        writer.finish(nbytes)
    assert path.read_bytes() == CONTENT[:nbytes]


def test_threads_write_into_one_file(tmp_path: Path, is_direct: bool) -> None:
    """Positions travel with each write: the file has no cursor that threads could share."""
    path = tmp_path / "file"
    with writer_of(path, is_direct=is_direct) as writer:
        threads = [
            threading.Thread(target=writer.write, args=(page_aligned(CONTENT[start : start + 4096]), start))
            for start in range(0, NBYTES, 4096)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish(NBYTES)
    assert path.read_bytes() == CONTENT


def test_an_existing_file_is_not_touched(tmp_path: Path, is_direct: bool) -> None:
    """A writer makes a new file, always: an old checkpoint's may have the name."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        writer_of(path, is_direct=is_direct)
    assert path.read_bytes() == b"old"


def test_a_file_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    """The system's error keeps its number."""
    with pytest.raises(TransferError) as caught:
        writer_of(tmp_path / "nowhere" / "file")
    assert caught.value.path == str(tmp_path / "nowhere" / "file")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("error", [None, RuntimeError("given up"), KeyboardInterrupt()], ids=repr)
def test_leaving_without_finish_removes_the_file(tmp_path: Path, is_direct: bool, error: BaseException | None) -> None:
    """Whether by an error or by forgetting: a file that is not finished is no file."""

    def leave(writer: PosixWriter) -> None:
        with writer:
            writer.write(page_aligned(CONTENT), 0)
            if error is not None:
                raise error

    if error is None:
        leave(writer_of(tmp_path / "file", is_direct=is_direct))
    else:
        with pytest.raises(type(error)):
            leave(writer_of(tmp_path / "file", is_direct=is_direct))
    assert os.listdir(tmp_path) == []


def test_no_descriptor_is_left_open(tmp_path: Path, is_direct: bool) -> None:
    """Neither by a finished file nor by one that was given up."""
    with writer_of(tmp_path / "one", nbytes=0, is_direct=is_direct) as writer:
        assert open_paths(tmp_path) == [f"{tmp_path}/one"]
        writer.finish(0)
    with writer_of(tmp_path / "two", nbytes=0, is_direct=is_direct):
        pass
    assert open_paths(tmp_path) == []


def short_writes(count: int, calls: list[tuple[int, int]]) -> Callable[[int, memoryview, int], int]:
    """A pwrite that moves at most ``count`` bytes."""
    pwrite = os.pwrite

    def write(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data)))
        return pwrite(fd, data[:count], offset)

    return write


def test_a_short_write_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may take fewer bytes than it was given, at any byte."""
    calls: list[tuple[int, int]] = []
    with writer_of(tmp_path / "file") as writer:
        monkeypatch.setattr(os, "pwrite", short_writes(3000, calls))
        writer.write(memoryview(CONTENT[:8192]), 0)
        writer.write(memoryview(CONTENT[8192:]), 8192)
        writer.finish(NBYTES)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert calls[:3] == [(0, 8192), (3000, 5192), (6000, 2192)]


def test_a_short_direct_write_goes_on_from_the_block_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next direct write must begin on a block, so the block that was written in part is written again."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    calls: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def write(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data)))
        return pwrite(fd, data[:8192], offset) - (100 if len(data) > 8192 else 0)

    with writer_of(tmp_path / "file", is_direct=True) as writer:
        monkeypatch.setattr(os, "pwrite", write)
        writer.write(page_aligned(CONTENT), 0)
        writer.finish(NBYTES)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert calls == [(0, NBYTES), (4096, NBYTES - 4096), (8192, NBYTES - 8192), (12288, 8192)]


def test_a_write_that_does_not_move_is_an_error_with_numbers(
    tmp_path: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero bytes for ever would be a hang."""
    answers = iter([8192, 0])
    with writer_of(tmp_path / "file", is_direct=is_direct) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *_: next(answers))
        with pytest.raises(TransferError) as caught:
            writer.write(page_aligned(CONTENT), 4096)
    error = caught.value
    assert (error.byte_offset, error.expected_nbytes, error.moved_nbytes) == (4096, NBYTES, 8192)
    assert str(error) == f"{tmp_path}/file: write of {NBYTES} bytes at 4096 stopped after 8192"


def test_a_direct_write_that_never_fills_a_block_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a block each time means the same block again each time."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    answers = iter([4096 + 512, *[512] * 100])
    with writer_of(tmp_path / "file", is_direct=True) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *_: next(answers))
        with pytest.raises(TransferError) as caught:
            writer.write(page_aligned(CONTENT), 0)
    assert caught.value.moved_nbytes == 4096
    assert (tmp_path / "file").exists() is False


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_keeps_the_systems_error(
    tmp_path: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """How far it got and why it stopped, also on the other ranks, where it arrives by pickle."""
    calls = iter([lambda: 4096])

    def write(*_: object) -> int:
        call = next(calls, None)
        if call is None:
            raise OSError(number, os.strerror(number))
        return call()

    with writer_of(tmp_path / "file", is_direct=is_direct) as writer:
        monkeypatch.setattr(os, "pwrite", write)
        with pytest.raises(TransferError) as caught:
            writer.write(page_aligned(CONTENT), 8192)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.errno == number
        assert (error.path, error.byte_offset) == (f"{tmp_path}/file", 8192)
        assert (error.expected_nbytes, error.moved_nbytes) == (NBYTES, 4096)
        assert os.strerror(number) in str(error)
        assert isinstance(error, OSError)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_an_error_and_leaves_no_file(small_directory: Path) -> None:
    """The real ENOSPC."""
    with pytest.raises(TransferError) as caught:
        write_file(small_directory / "file", bytes(2 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.byte_offset is not None
    assert caught.value.byte_offset + (caught.value.moved_nbytes or 0) <= 1 << 20
    assert os.listdir(small_directory) == []


def test_a_disk_without_room_is_found_before_the_first_direct_byte(small_directory: Path) -> None:
    """Direct files get their blocks at once."""
    if not supports_direct_io(str(small_directory)):
        pytest.skip("no O_DIRECT on tmpfs here")
    with pytest.raises(TransferError, match="no room") as caught:
        writer_of(small_directory / "file", nbytes=2 << 20, is_direct=True)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_directory) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF])
def test_a_file_system_that_reserves_no_blocks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Reserving is for speed alone."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with writer_of(tmp_path / "file", is_direct=True) as writer:
        writer.write(page_aligned(CONTENT), 0)
        writer.finish(NBYTES)
    assert (tmp_path / "file").read_bytes() == CONTENT


def emulated(fd: int, byte_offset: int, nbytes: int) -> None:
    """What glibc's posix_fallocate does where the kernel's fallocate cannot, and to a descriptor that is not direct."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    for block in range(byte_offset, byte_offset + nbytes, 4096):
        os.pwrite(fd, b"\0", block)


def test_blocks_are_reserved_by_the_file_system_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library would write a byte into each, and so every block twice. The descriptor is as it was, afterwards."""
    path = tmp_path / "file"
    with PosixWriter(str(path), nbytes=NBYTES, is_direct=False, fsync=False, is_reserved=True) as writer:
        assert path.stat().st_size == NBYTES
        writer.finish(NBYTES - 5)
    assert path.stat().st_size == NBYTES - 5
    path.unlink()
    monkeypatch.setattr(os, "posix_fallocate", emulated)
    with PosixWriter(str(path), nbytes=NBYTES, is_direct=False, fsync=False, is_reserved=True) as writer:
        assert path.stat().st_size == path.stat().st_blocks == 0
        writer.write(memoryview(CONTENT)[4096:], 4096)
        writer.write(memoryview(CONTENT)[:4096], 0)
        writer.finish(NBYTES)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_file_whose_blocks_are_not_reserved_is_closed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Whatever came in between; nobody has the writer yet."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(TransferError if isinstance(error, OSError) else KeyboardInterrupt):
        PosixWriter(str(tmp_path / "file"), nbytes=NBYTES, is_direct=False, fsync=False, is_reserved=True)
    assert os.listdir(tmp_path) == open_paths(tmp_path) == []


@pytest.mark.parametrize("fsync", [True, False])
def test_a_file_gets_its_length_before_it_is_synced_and_is_synced_before_it_is_closed(
    tmp_path: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    """In another order a power cut could leave a longer file, or none; without fsync there is none."""
    calls: list[str] = []
    for name in ("ftruncate", "fsync", "close"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))[1])
    with writer_of(tmp_path / "file", is_direct=is_direct, fsync=fsync) as writer:
        writer.write(page_aligned(CONTENT), 0)
        writer.finish(NBYTES - 5)
    assert calls == ["ftruncate", *["fsync"] * fsync, "close"]


@pytest.mark.parametrize("name", ["ftruncate", "fsync"])
def test_a_file_that_cannot_be_finished_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An fsync that failed means that bytes may be lost, for good."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(TransferError, match="cannot be finished") as caught:
        write_file(tmp_path / "file", CONTENT, fsync=True)
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file to read."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def read(reader: PosixReader, nbytes: int, byte_offset: int) -> bytes:
    """A read into new memory."""
    into = bytearray(nbytes)
    reader.read(memoryview(into), byte_offset)
    return bytes(into)


@pytest.mark.parametrize(("byte_offset", "nbytes"), [(0, NBYTES), (1, 10), (4095, 2), (NBYTES - 1, 1), (NBYTES, 0)])
def test_any_range_of_a_file_is_read(path: Path, byte_offset: int, nbytes: int) -> None:
    """No alignment is asked for, of the range or of the memory."""
    reader = PosixReader(str(path))
    assert reader.nbytes == NBYTES
    assert read(reader, nbytes, byte_offset) == CONTENT[byte_offset : byte_offset + nbytes]
    reader.close()


def test_a_short_read_goes_on_where_it_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give fewer bytes than there are."""
    offsets: list[int] = []
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return preadv(fd, [buffer[:1000] for buffer in buffers], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert read(PosixReader(str(path)), 2500, 7) == CONTENT[7:2507]
    assert offsets == [7, 1007, 2007]


@pytest.mark.parametrize(("byte_offset", "moved"), [(NBYTES - 10, 10), (NBYTES, 0), (NBYTES + 5, 0)])
def test_a_read_past_the_end_is_an_error_with_numbers(path: Path, byte_offset: int, moved: int) -> None:
    """A file that was cut off must not read as zeros."""
    with pytest.raises(TransferError) as caught:
        read(PosixReader(str(path)), 100, byte_offset)
    error = caught.value
    assert (error.path, error.byte_offset) == (str(path), byte_offset)
    assert (error.expected_nbytes, error.moved_nbytes) == (100, moved)
    assert f"the file ends at byte {byte_offset + moved}" in str(error)


def test_a_read_that_fails_keeps_the_systems_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far it got and why it stopped."""
    reader = PosixReader(str(path))
    answers = iter([30])

    def fail(*_: object) -> int:
        for answer in answers:
            return answer
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(TransferError) as caught:
        read(reader, 100, 5)
    error = caught.value
    assert error.errno == errno.EIO
    assert (error.byte_offset, error.expected_nbytes, error.moved_nbytes) == (5, 100, 30)


def test_a_directory_is_no_file_to_read(tmp_path: Path) -> None:
    """It opens, and then it does not read."""
    with pytest.raises(TransferError) as caught:
        read(PosixReader(str(tmp_path)), 1, 0)
    assert caught.value.errno == errno.EISDIR


def test_a_file_that_is_missing_or_closed_to_us_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing is its own error, as a checkpoint that lacks a file is an incomplete one."""
    with pytest.raises(CheckpointNotFoundError, match="a file that the checkpoint names does not exist"):
        PosixReader(str(tmp_path / "gone"))

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TransferError, match="cannot be opened") as caught:
        PosixReader(str(tmp_path / "secret"))
    assert caught.value.errno == errno.EACCES


def test_an_open_file_stays_readable_when_its_name_is_gone(path: Path) -> None:
    """A newer save may remove it while it is being read."""
    reader = PosixReader(str(path))
    path.unlink()
    assert read(reader, NBYTES, 0) == CONTENT


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, NBYTES - 4096, NBYTES - 1, NBYTES])
@pytest.mark.parametrize(("byte_offset", "shift"), [(0, 0), (4096, 0), (4096, 512), (7, 0), (7, 7)])
def test_a_direct_reader_reads_any_range_too(path: Path, byte_offset: int, shift: int, nbytes: int) -> None:
    """Directly what is aligned, through the page cache what is not, and nothing beyond what was asked for."""
    reader = direct_reader(path)
    nbytes = min(nbytes, NBYTES - byte_offset)
    memory = page_aligned(b"\xee" * (NBYTES + 8192))
    reader.read(memory[shift : shift + nbytes], byte_offset)
    reader.close()
    assert bytes(memory[:shift]) == b"\xee" * shift
    assert bytes(memory[shift:]) == CONTENT[byte_offset : byte_offset + nbytes] + b"\xee" * (
        NBYTES + 8192 - shift - nbytes
    )


def direct_reader(path: Path) -> PosixReader:
    """A reader with O_DIRECT, where the test's directory has it."""
    if not supports_direct_io(str(path.parent)):
        pytest.skip(f"no O_DIRECT in {path.parent}")
    return PosixReader(str(path), is_direct=True)


def test_whole_blocks_and_only_those_are_read_directly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short reads go on from the block where they stopped; the page cache takes the rest."""
    reader = direct_reader(path)
    calls: list[tuple[bool, int, int]] = []
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((fd != reader.fileno(), offset, len(buffers[0])))
        return preadv(fd, [buffers[0][:8192]], offset) - (100 if len(buffers[0]) > 8192 else 0)

    memory = page_aligned(bytes(NBYTES))
    monkeypatch.setattr(os, "preadv", short)
    reader.read(memory[: 3 * 4096 + 10], 4096)
    assert bytes(memory[: 3 * 4096 + 10]) == CONTENT[4096 : 4 * 4096 + 10]
    assert calls == [(True, 4096, 12288), (True, 8192, 8192), (False, 16384, 10)]
    calls.clear()
    reader.read(memory[1:4097], 0)
    reader.read(memory[:4096], 1)
    assert [is_direct for is_direct, _, _ in calls] == [False, False]


def test_a_direct_read_past_the_end_is_an_error_with_numbers(path: Path) -> None:
    """As of any other reader."""
    path.write_bytes(CONTENT[:5000])
    with pytest.raises(TransferError, match="the file ends at byte 5000") as caught:
        direct_reader(path).read(page_aligned(bytes(12288)), 0)
    assert (caught.value.expected_nbytes, caught.value.moved_nbytes) == (12288, 5000)


def test_a_file_that_cannot_be_opened_directly_is_an_error_and_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it has found out before that it works."""
    opened = os.open

    def refuse(name: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(name, flags)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TransferError, match="cannot be opened with O_DIRECT") as caught:
        PosixReader(str(path), is_direct=True)
    assert (caught.value.path, caught.value.errno) == (str(path), errno.EINVAL)
    assert open_paths(path) == []


def test_a_direct_reader_closes_both_its_descriptors(path: Path) -> None:
    """By a call, or as garbage; the name may be gone before."""
    reader = direct_reader(path)
    assert open_paths(path) == [str(path)] * 2
    assert reader.alignment_nbytes == 4096
    assert PosixReader(str(path)).alignment_nbytes == 1
    reader.close()
    assert open_paths(path) == []
    reader = direct_reader(path)
    del reader
    assert open_paths(path) == []


def test_a_closed_reader_reads_nothing(path: Path, tmp_path: Path) -> None:
    """The number of its descriptor may be another file's by now."""
    reader = PosixReader(str(path))
    reader.close()
    reader.close()
    (tmp_path / "other").write_bytes(bytes(NBYTES))
    other = PosixReader(str(tmp_path / "other"))
    with pytest.raises(TransferError, match="closed"):
        read(reader, 10, 0)
    assert read(other, 10, 0) == bytes(10)


def test_a_reader_that_becomes_garbage_closes_its_file(path: Path) -> None:
    """A load that failed between two of DCP's calls has nobody to close its files."""
    reader = PosixReader(str(path))
    assert open_paths(path) == [str(path)]
    del reader
    assert open_paths(path) == []


# --- directories -----------------------------------------------------------------------------------------------------


def test_a_directory_is_synced_by_its_own_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is on stable storage when its directory is; and the descriptor is closed."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    fsync_directory(str(tmp_path))
    assert synced == [str(tmp_path)]
    assert open_paths(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_directory_that_cannot_be_synced_is_an_error_unless_none_can_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems over FUSE sync no directory: there is nothing to wait for. A failure is another matter."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(posix.os, "fsync", fail)
    if number == errno.EIO:
        with pytest.raises(TransferError) as caught:
            fsync_directory(str(tmp_path))
        assert (caught.value.path, caught.value.errno) == (str(tmp_path), errno.EIO)
    else:
        fsync_directory(str(tmp_path))
