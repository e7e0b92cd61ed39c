"""Files that fail: each time a clear error or a correct result, the old checkpoint whole, nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest
from fault_cases import names, number_in, save, state_of
from filesystem import EVERY_ERROR, Fault, FileSystem, failing, short

import gpudcp
from gpudcp.errors import CheckpointBusyError, CorruptCheckpointError, GpuDcpError, TransferError

WRITES = ("open", "pwrite", "write", "posix_fallocate", "ftruncate", "fsync", "replace")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of 1."""
    save(1, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def overwrite(directory: Path, faulty: tuple[str, ...], at: int, fault: Fault, **options: object) -> tuple[bool, int]:
    """Save 2 while one call fails; whether an error was raised, and how many calls there were."""
    with pytest.MonkeyPatch.context() as patch:
        system = FileSystem(directory, faulty, at, fault).install(patch)
        try:
            save(2, directory, **options)
        except GpuDcpError:
            return True, system.ncalls
        return False, system.ncalls


@pytest.mark.parametrize("error", EVERY_ERROR)
@pytest.mark.parametrize("direct_io", ["off", "on"])
def test_a_save_survives_a_failure_of_any_call(directory: Path, error: str, direct_io: str) -> None:
    """Every open, write, fsync, ... in turn: an error and the old checkpoint, or the new one; the next is clean."""
    failed, ncalls, at = 0, 1, 0
    while at <= ncalls:
        at += 1
        is_error, ncalls = overwrite(directory, WRITES, at, failing(EVERY_ERROR[error]), direct_io=direct_io)
        # The rename stands when only the fsync after it failed: the error says that it may not survive a power cut.
        assert number_in(directory) in ((1, 2) if is_error else (2,))
        failed += is_error
        save(1, directory)
        assert number_in(directory) == 1
        assert len([name for name in names(directory) if name.endswith(".distcp")]) == len(names(directory)) - 1
    assert failed > 10


def test_short_writes_go_on(directory: Path) -> None:
    """Every write in turn moves half of its bytes, to the page cache and past it."""
    for direct_io in ("off", "on"):
        at, ncalls = 0, 1
        while at <= ncalls:
            at += 1
            is_error, ncalls = overwrite(directory, ("pwrite",), at, short, direct_io=direct_io)
            assert not is_error
            assert number_in(directory) == 2
            save(1, directory)


def load_with(directory: Path, faulty: tuple[str, ...], at: int, fault: Fault) -> tuple[int | None, int]:
    """Load while one call fails; what was loaded, or None for an error, and how many calls there were."""
    with pytest.MonkeyPatch.context() as patch:
        system = FileSystem(directory, faulty, at, fault).install(patch)
        try:
            return number_in(directory), system.ncalls
        except GpuDcpError:
            return None, system.ncalls


@pytest.mark.parametrize("error", ["EIO", "short"])
def test_a_load_survives_a_failure_of_any_read(directory: Path, error: str) -> None:
    """A failed one is an error, a short one goes on; so it is with every open, that of ``.metadata`` among them."""
    faulty = ("preadv",) if error == "short" else ("open", "preadv")
    found, at, ncalls = [], 0, 1
    while at <= ncalls:
        at += 1
        number, ncalls = load_with(directory, faulty, at, short if error == "short" else failing(errno.EIO))
        found.append(number)
    assert set(found) == ({1} if error == "short" else {1, None})
    assert len(found) > 3


def test_old_files_that_cannot_be_removed_go_with_the_next_save(directory: Path) -> None:
    """The save itself is done."""
    for at in (1, 2):
        is_error, _ = overwrite(directory, ("unlink",), at, failing(errno.EIO))
        assert not is_error
        assert number_in(directory) == 2
    save(1, directory)
    assert number_in(directory) == 1
    assert len([name for name in names(directory) if name.endswith(".distcp")]) == len(names(directory)) - 1


def test_a_disk_that_is_full_leaves_the_old_checkpoint(small_disk: Path) -> None:
    """A real one; what was written is removed again, and a smaller save succeeds."""
    directory = small_disk / "checkpoint"
    save(1, directory, fsync=True)
    (small_disk / "ballast").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 32768)
    )
    with pytest.raises(TransferError, match="No space left on device") as told:
        save(2, directory)
    assert told.value.errno == errno.ENOSPC
    assert number_in(directory) == 1
    assert len(names(directory)) == 2
    (small_disk / "ballast").unlink()
    save(3, directory)
    assert number_in(directory) == 3
    assert len(names(directory)) == 2


def test_a_read_only_directory_is_a_clear_error(small_disk: Path) -> None:
    """And can be read."""
    directory = small_disk / "checkpoint"
    save(1, directory)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TransferError, match="Read-only file system") as told:
        save(2, directory)
    assert told.value.errno == errno.EROFS
    assert number_in(directory) == 1


def test_data_files_that_were_swapped_are_told_by_their_checksums(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one checkpoint, as of two ranks, each under the other's name."""
    monkeypatch.setattr("gpudcp.chunkplan.save.FULL_FILE_NBYTES", 4096)
    save(2, directory, threads=2, direct_io="off")
    first, second = sorted(directory.glob("*.distcp"))
    aside = directory / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    with pytest.raises((CorruptCheckpointError, TransferError), match=r"\.distcp"):
        number_in(directory)


def test_a_data_file_of_the_save_before_is_told_by_its_checksums(directory: Path) -> None:
    """Same names of tensors, same places, other values."""
    old = sorted(directory.glob("*.distcp"))[0].read_bytes()
    save(2, directory)
    sorted(directory.glob("*.distcp"))[0].write_bytes(old)
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        number_in(directory)


def test_of_two_saves_at_once_one_is_refused_and_the_other_is_whole(directory: Path) -> None:
    """Whoever holds the directory goes on; the other hears at once who is in the way."""
    outcomes: list[int] = []
    refused: list[CheckpointBusyError] = []
    begin = threading.Barrier(2)

    def try_once(number: int) -> None:
        try:
            save(number, directory)
            outcomes.append(number)
        except CheckpointBusyError as err:
            refused.append(err)

    def race(number: int) -> None:
        begin.wait()
        for _ in range(5):
            try_once(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) + len(refused) == 10
    assert number_in(directory) in outcomes
    save(4, directory)
    assert number_in(directory) == 4
    assert len([name for name in names(directory) if name.endswith(".distcp")]) == len(names(directory)) - 1


def test_a_reader_during_overwrites_sees_one_checkpoint_at_a_time(directory: Path) -> None:
    """All of one number, however often it changes; or, where it changes too often, it is told so."""
    is_over = threading.Event()
    written: list[int] = []

    def write() -> None:
        for number in range(2, 14):
            save(number, directory, fsync=False)
            written.append(number)
        is_over.set()

    thread = threading.Thread(target=write)
    thread.start()
    found = []
    while not is_over.is_set():
        with contextlib.suppress(CheckpointBusyError):
            found.append(number_in(directory))
    thread.join()
    assert written == list(range(2, 14))
    assert found
    assert found == sorted(found)
    assert number_in(directory) == 13


def test_what_is_saved_is_what_is_compared(tmp_path: Path) -> None:
    """The checks above would see one wrong element."""
    wrong = state_of(1)
    wrong["weight"][77] += 1
    gpudcp.save(wrong, tmp_path / "checkpoint")
    with pytest.raises(AssertionError, match="weight"):
        number_in(tmp_path / "checkpoint")
