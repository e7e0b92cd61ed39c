"""KvikIO files: whole transfers or an error with numbers, aligned requests only, and no default of the process touched.

Against a kvikio that records; test_kvikio_real.py runs the same module over the real one.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fake_kvikio import FakeKvikio, block_aligned, filled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpudcp.errors import CheckpointNotFoundError, PlanError, TransferError
from gpudcp.files import kvikio
from gpudcp.files import settings as process_settings
from gpudcp.files.base import DeviceFileReader, DeviceFileWriter
from gpudcp.files.kvikio import CompatMode, KvikioReader, KvikioWriter, cufile_facts, deregister, register
from gpudcp.files.posix import PosixReader, PosixWriter
from gpudcp.files.trial import try_device_io

BLOCK = 4096
CONTENT = bytes(i * 7 % 251 for i in range(5 * BLOCK))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    """The kvikio of this test."""
    package = FakeKvikio()
    package.install(monkeypatch)
    monkeypatch.setattr(kvikio, "_registered", {})
    return package


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file to read."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def writer_of(path: Path, *, fsync: bool = False) -> KvikioWriter:
    """A writer of a file as long as CONTENT."""
    return KvikioWriter(str(path), nbytes=len(CONTENT), is_direct=False, fsync=fsync)


def open_paths(under: Path) -> list[str]:
    """The files under a path that this process has open."""
    found = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sorted(each for each in found if each.startswith(str(under)))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_holds_what_device_and_host_memory_gave_and_ends_where_it_should(
    tmp_path: Path, package: FakeKvikio
) -> None:
    """Both into one file, in any order; `finish` cuts off what the last block has too much."""
    with writer_of(tmp_path / "file") as writer:
        assert writer.alignment_nbytes == BLOCK
        writer.write_device(filled(CONTENT[3 * BLOCK :]), 3 * BLOCK)
        writer.write(memoryview(CONTENT[BLOCK : 3 * BLOCK]), BLOCK)
        writer.write_device(filled(CONTENT[:BLOCK]), 0)
        writer.finish(len(CONTENT) - 5)
    assert (tmp_path / "file").read_bytes() == CONTENT[:-5]
    assert [each[0] for each in package.transfers] == ["write", "write"]


def test_threads_write_into_one_file(tmp_path: Path, package: FakeKvikio) -> None:
    """Our own threads: each request is one call of KvikIO, and its pool has no part in it."""
    with writer_of(tmp_path / "file") as writer:
        threads = [
            threading.Thread(target=writer.write_device, args=(filled(CONTENT[at : at + BLOCK]), at))
            for at in range(0, len(CONTENT), BLOCK)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish(len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [each[3] for each in package.transfers] == [BLOCK] * 5


def test_the_handle_is_closed_before_the_file_gets_its_length_and_is_synced(
    tmp_path: Path, package: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuFile has let go of the file by then; the sync covers what it wrote."""
    for name in ("ftruncate", "fsync"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (package.calls.append(name), call(*args))[1])
    with writer_of(tmp_path / "file", fsync=True) as writer:
        writer.finish(0)
    assert package.calls == ["open r+", "close", "ftruncate", "fsync"]


@pytest.mark.usefixtures("package")
def test_a_file_has_its_blocks_before_the_first_byte_and_ends_where_it_should(tmp_path: Path) -> None:
    """Whatever host memory does: cuFile writes directly, and direct writes that make a file longer wait in turn."""
    path = tmp_path / "file"
    with writer_of(path) as writer:
        assert path.stat().st_size == len(CONTENT)
        writer.write_device(filled(CONTENT), 0)
        writer.finish(len(CONTENT) - 5)
    assert path.read_bytes() == CONTENT[:-5]


def test_a_disk_without_room_is_found_before_kvikio_opens_the_file(
    tmp_path: Path, package: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no file is left."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(TransferError, match="no room") as caught:
        writer_of(tmp_path / "file")
    assert caught.value.errno == errno.ENOSPC
    assert package.calls == []
    assert os.listdir(tmp_path) == open_paths(tmp_path) == []


@pytest.mark.parametrize("error", [None, RuntimeError("given up"), KeyboardInterrupt()], ids=repr)
def test_leaving_without_finish_closes_the_handle_and_removes_the_file(
    tmp_path: Path, package: FakeKvikio, error: BaseException | None
) -> None:
    """A file that is not finished is no file."""

    def leave() -> None:
        with writer_of(tmp_path / "file") as writer:
            writer.write_device(filled(CONTENT), 0)
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(type(error)):
            leave()
    assert package.calls == ["open r+", "close"]
    assert os.listdir(tmp_path) == []
    assert open_paths(tmp_path) == []


def test_an_existing_file_is_not_touched(path: Path, package: FakeKvikio) -> None:
    """A writer makes a new file, always; KvikIO, which would truncate with `w`, never sees this one."""
    with pytest.raises(FileExistsError):
        writer_of(path)
    assert path.read_bytes() == CONTENT
    assert package.calls == []


def test_a_file_that_kvikio_cannot_open_is_removed_and_the_error_names_it(tmp_path: Path, package: FakeKvikio) -> None:
    """As when cuFile's driver does not start."""
    package.open_error = RuntimeError("cuFile error")
    with pytest.raises(TransferError, match="KvikIO cannot open it: cuFile error") as caught:
        writer_of(tmp_path / "file")
    assert caught.value.path == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []
    assert open_paths(tmp_path) == []


# --- reading ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nbytes=st.integers(0, len(CONTENT)), block=st.integers(0, 4))
def test_any_length_is_read_in_whole_blocks_and_a_rest(
    path: Path, package: FakeKvikio, nbytes: int, block: int
) -> None:
    """KvikIO is asked for whole blocks, so that cuFile needs no bounce buffer; the rest comes by way of the host."""
    nbytes = min(nbytes, len(CONTENT) - block * BLOCK)
    package.transfers.clear()
    memory = filled(b"\xee" * (nbytes + BLOCK))
    reader = KvikioReader(str(path))
    reader.read_device(memory[:nbytes], block * BLOCK)
    reader.close()
    start = block * BLOCK
    assert bytes(memory.numpy()) == CONTENT[start : start + nbytes] + b"\xee" * BLOCK
    assert [each[3] for each in package.transfers] == [nbytes - nbytes % BLOCK] * (nbytes >= BLOCK)


def test_host_memory_is_read_at_any_offset(path: Path, package: FakeKvikio) -> None:
    """Through the page cache, and not by KvikIO."""
    reader = KvikioReader(str(path))
    into = bytearray(1000)
    reader.read(memoryview(into), 4095)
    assert into == CONTENT[4095:5095]
    assert reader.nbytes == len(CONTENT)
    assert package.transfers == []
    reader.close()


def test_the_handle_is_of_the_file_that_was_opened_whatever_becomes_of_its_name(
    path: Path, package: FakeKvikio
) -> None:
    """A newer save may remove it, or put another in its place, between the two openings."""

    def replace() -> None:
        path.unlink()
        path.write_bytes(bytes(len(CONTENT)))

    package.before_open = replace
    reader = KvikioReader(str(path))
    into = block_aligned(len(CONTENT))
    reader.read_device(into, 0)
    reader.close()
    assert bytes(into.numpy()) == CONTENT
    assert package.open_paths == [f"{path} (deleted)"]


def test_a_file_that_is_open_already_is_taken_over(path: Path, package: FakeKvikio) -> None:
    """Its name may be gone; it is closed with the reader, and where KvikIO cannot open it."""
    path.write_bytes(bytes(8192))
    files = [PosixReader(str(path)) for _ in range(2)]
    path.unlink()
    reader = KvikioReader(str(path), file=files[0])
    reader.read_device(block_aligned(8192), 0)
    reader.close()
    assert package.transfers
    package.open_error = RuntimeError("no handle")
    with pytest.raises(TransferError, match="no handle"):
        KvikioReader(str(path), file=files[1])
    assert not any(file.close.alive for file in files)


def test_a_missing_file_is_its_own_error_and_one_that_kvikio_cannot_open_is_closed(
    path: Path, package: FakeKvikio
) -> None:
    """Missing means an incomplete checkpoint, or a newer one."""
    with pytest.raises(CheckpointNotFoundError):
        KvikioReader(str(path) + "x")
    package.open_error = RuntimeError("cuFile error")
    with pytest.raises(TransferError, match="KvikIO cannot open it"):
        KvikioReader(str(path))
    assert open_paths(path) == []


def test_a_closed_reader_reads_nothing(path: Path, package: FakeKvikio) -> None:
    """Its descriptors may be other files' by now; a second close does nothing."""
    reader = KvikioReader(str(path))
    reader.close()
    reader.close()
    with pytest.raises(TransferError, match="the file is closed"):
        reader.read_device(block_aligned(BLOCK), 0)
    with pytest.raises(TransferError, match="the file is closed"):
        reader.read(memoryview(bytearray(1)), 0)
    assert package.calls == ["open r", "close"]
    assert package.transfers == []


def test_a_reader_that_becomes_garbage_closes_its_file(path: Path, package: FakeKvikio) -> None:
    """A load that failed between two of DCP's calls has nobody to close its files."""
    reader = KvikioReader(str(path))
    assert len(open_paths(path)) == 2
    del reader
    gc.collect()
    assert package.calls == ["open r", "close"]
    assert open_paths(path) == []


@pytest.mark.usefixtures("package")
def test_a_rest_past_the_end_is_an_error_with_numbers(path: Path) -> None:
    """A file that was cut off must not read as zeros."""
    path.write_bytes(CONTENT[: BLOCK + 10])
    reader = KvikioReader(str(path))
    with pytest.raises(TransferError, match="the file ends at byte") as caught:
        reader.read_device(block_aligned(BLOCK + 20), 0)
    assert (caught.value.byte_offset, caught.value.expected_nbytes, caught.value.moved_nbytes) == (BLOCK, 20, 10)


# --- both ------------------------------------------------------------------------------------------------------------


def transfers(tmp_path: Path) -> dict[str, Callable[[torch.Tensor, int], None]]:
    """A write and a read of device memory."""
    (tmp_path / "readable").write_bytes(CONTENT)
    return {
        "write": writer_of(tmp_path / "written").write_device,
        "read": KvikioReader(str(tmp_path / "readable")).read_device,
    }


@pytest.mark.parametrize("what", ["write", "read"])
@pytest.mark.parametrize("moved", [0, 4096, 8191])
def test_a_transfer_that_moved_other_than_all_is_an_error_with_numbers(
    tmp_path: Path, package: FakeKvikio, what: str, moved: int
) -> None:
    """KvikIO says how much it moved and leaves it at that."""
    package.receipt = lambda _: moved
    with pytest.raises(TransferError, match=f"{what} of 8192 bytes at 4096 moved {moved}") as caught:
        transfers(tmp_path)[what](block_aligned(2 * BLOCK), BLOCK)
    error = caught.value
    assert (error.byte_offset, error.expected_nbytes, error.moved_nbytes) == (4096, 8192, moved)
    assert str(tmp_path) in error.path


@pytest.mark.parametrize("what", ["write", "read"])
@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError])
def test_an_error_of_kvikio_is_a_transfer_error_with_its_text(
    tmp_path: Path, package: FakeKvikio, what: str, kind: type[Exception]
) -> None:
    """KvikIO raises built-ins without a path."""
    package.error = kind("cuFile said no")
    with pytest.raises(TransferError, match=f"{what} of 4096 bytes at 0 failed: cuFile said no") as caught:
        transfers(tmp_path)[what](block_aligned(BLOCK), 0)
    assert caught.value.expected_nbytes == BLOCK
    assert caught.value.__cause__ is package.error


@pytest.mark.parametrize("what", ["write", "read"])
def test_what_is_not_aligned_is_refused_before_a_byte_moves(tmp_path: Path, package: FakeKvikio, what: str) -> None:
    """cuFile would do it, slowly and without a word."""
    move = transfers(tmp_path)[what]
    for tensor, byte_offset in (
        (block_aligned(2 * BLOCK)[1 : 1 + BLOCK], 0),
        (block_aligned(2 * BLOCK)[512 : 512 + BLOCK], 512),
        (block_aligned(BLOCK), 512),
        (block_aligned(BLOCK).view(torch.int8), 0),
        (block_aligned(BLOCK).view(2, -1), 0),
        (block_aligned(2 * BLOCK)[::2], 0),
    ):
        with pytest.raises(PlanError):
            move(tensor, byte_offset)
    if what == "write":
        with pytest.raises(PlanError, match="4097 bytes are no multiple of 4096"):
            move(block_aligned(BLOCK + 1), 0)
    assert package.transfers == []


def test_registered_memory_is_named_by_its_base_and_an_offset(path: Path, package: FakeKvikio) -> None:
    """cuFile knows registered memory by the address that was registered; anything else it takes for unregistered."""
    slab = filled(CONTENT[: 4 * BLOCK])
    base = slab.data_ptr()
    reader = KvikioReader(str(path))
    register(slab)
    assert package.registered == [(base, 4 * BLOCK)]
    reader.read_device(slab[2 * BLOCK : 3 * BLOCK], 0)
    other = block_aligned(BLOCK)
    reader.read_device(other, 0)
    deregister(slab)
    assert package.registered == []
    reader.read_device(slab[2 * BLOCK : 3 * BLOCK], 0)
    assert package.transfers == [
        ("read", base, 4 * BLOCK, BLOCK, 2 * BLOCK),
        ("read", other.data_ptr(), BLOCK, BLOCK, 0),
        ("read", base + 2 * BLOCK, BLOCK, BLOCK, 0),
    ]
    assert bytes(slab[2 * BLOCK : 3 * BLOCK].numpy()) == CONTENT[:BLOCK]


@pytest.mark.usefixtures("package")
def test_kvikio_files_take_device_memory_and_posix_files_do_not(tmp_path: Path) -> None:
    """How an executor tells them apart."""
    (tmp_path / "readable").touch()
    with writer_of(tmp_path / "one") as writer:
        assert isinstance(writer, DeviceFileWriter)
    with PosixWriter(str(tmp_path / "two"), nbytes=0, is_direct=False, fsync=False) as posix_writer:
        assert not isinstance(posix_writer, DeviceFileWriter)
    assert isinstance(KvikioReader(str(tmp_path / "readable")), DeviceFileReader)
    assert not isinstance(PosixReader(str(tmp_path / "readable")), DeviceFileReader)


@pytest.mark.usefixtures("package")
def test_registered_memory_lives_until_it_is_deregistered() -> None:
    """Freed before, its pages would stay pinned, and cuFile would take the address for memory that is gone."""
    slab = block_aligned(BLOCK)
    address, lives = slab.data_ptr(), weakref.ref(slab)
    register(slab)
    del slab
    gc.collect()
    kept = lives()
    assert kept is not None
    assert kept.data_ptr() == address
    deregister(kept)
    del kept
    gc.collect()
    assert lives() is None


def test_no_default_of_the_process_is_touched_but_for_opening_a_file_in_a_mode_that_was_asked_for(
    tmp_path: Path, path: Path, package: FakeKvikio
) -> None:
    """And there it is put back."""
    for name, move in transfers(tmp_path).items():
        move(block_aligned(BLOCK), 0)
        assert package.settings == [], name
    try_device_io(str(tmp_path), block_aligned(1 << 20))
    assert package.settings == []
    package.before_open = lambda: package.settings.append(("open", ""))
    KvikioReader(str(path), compat_mode="ON").close()
    assert package.settings == [("compat_mode", "ON"), ("open", ""), ("compat_mode", "as found")]


class InMidOpening:
    """A thread that opens a file in a mode, and stays in KvikIO's call until it is told to go on."""

    def __init__(self, package: FakeKvikio, path: Path, compat_mode: CompatMode | None) -> None:
        self._is_there, self._may_go_on = threading.Event(), threading.Event()
        self._package, self._path, self._compat_mode = package, path, compat_mode
        self.thread = threading.Thread(target=self._open)

    def _open(self) -> None:
        with suppress(TransferError):
            KvikioReader(str(self._path), compat_mode=self._compat_mode).close()

    def _stay(self) -> None:
        if threading.current_thread() is self.thread:
            self._is_there.set()
            assert self._may_go_on.wait(20)

    def __enter__(self) -> InMidOpening:
        self._package.before_open = self._stay
        self.thread.start()
        assert self._is_there.wait(20)
        return self

    def go_on(self) -> None:
        self._may_go_on.set()

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self.thread.join()


def meanwhile(opening: InMidOpening, act: Callable[[], object]) -> None:
    """``act`` in a thread of its own that begins while the file is being opened, which then goes on."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(act)
        with suppress(FutureTimeoutError):
            done.result(0.1)
        opening.go_on()
        done.result(20)


def test_memory_is_registered_and_deregistered_also_while_another_thread_measures_compat_mode(
    path: Path, package: FakeKvikio
) -> None:
    """KvikIO does neither in that mode, and says nothing: the memory would be freed while cuFile still knows it."""
    slab, other = block_aligned(BLOCK), block_aligned(BLOCK)
    register(slab)
    with InMidOpening(package, path, "ON") as opening:
        meanwhile(opening, lambda: deregister(slab))
    assert package.registered == []
    with InMidOpening(package, path, "ON") as opening:
        meanwhile(opening, lambda: register(other))
    assert package.registered == [(other.data_ptr(), BLOCK)]


def test_a_file_is_opened_as_ever_while_another_thread_refuses_compat_mode(path: Path, package: FakeKvikio) -> None:
    """It may fall back; the trial's may not. And what cuFile is said to be is no other thread's either."""
    package.opens_without_direct_io = True
    with InMidOpening(package, path, "OFF") as opening:
        meanwhile(opening, lambda: KvikioReader(str(path)).close())
    said: list[bool] = []
    with InMidOpening(package, path, "ON") as opening:
        meanwhile(opening, lambda: said.append(cufile_facts().is_compat_mode))
    assert said == [False]


def test_modes_of_several_threads_never_overlap_and_the_one_before_comes_back(path: Path, package: FakeKvikio) -> None:
    """Put back in another order, compat mode would be on for good."""
    with InMidOpening(package, path, "OFF") as opening:
        meanwhile(opening, lambda: KvikioReader(str(path), compat_mode="ON").close())
    assert [mode for _, mode in package.settings] == ["OFF", "as found", "ON", "as found"]
    assert package.compat_mode == "AUTO"


def test_a_finalizer_may_let_go_of_memory_in_the_midst_of_an_opening(path: Path, package: FakeKvikio) -> None:
    """It runs in any thread, at any moment, and it too deregisters for KvikIO's own mode."""
    for compat_mode in (None, "ON", "OFF"):
        slab = block_aligned(BLOCK)
        register(slab)
        package.before_open = lambda slab=slab: deregister(slab)
        KvikioReader(str(path), compat_mode=compat_mode).close()
        assert package.registered == []
        assert package.compat_mode == "AUTO"


def test_an_opening_that_hangs_holds_up_nobody_but_who_wants_another_mode(
    path: Path, package: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a trial may, on a file system that does not answer; and those get an error."""
    monkeypatch.setattr(process_settings, "WAIT_S", 0.05)
    slab = block_aligned(BLOCK)
    with InMidOpening(package, path, None):
        KvikioReader(str(path)).close()
        register(slab)
        with pytest.raises(TransferError, match="another thread has been using it"):
            KvikioReader(str(path), compat_mode="ON")
        deregister(slab)
    with InMidOpening(package, path, "OFF"):
        with pytest.raises(TransferError, match="another thread has been using it"):
            KvikioReader(str(path))
        with pytest.raises(OSError, match="another thread has been using it"):
            register(slab)
    assert package.registered == []
    assert open_paths(path) == []


def test_the_module_imports_no_kvikio_by_itself() -> None:
    """Where there is none, everything else works."""
    assert not hasattr(kvikio, "CuFile")
    assert "kvikio" not in {name for name, module in vars(kvikio).items() if module is sys.modules.get("kvikio")}
