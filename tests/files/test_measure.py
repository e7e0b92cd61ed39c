"""Every way that works is measured, the bytes really move, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from fake_kvikio import FakeKvikio, block_aligned
from hypothesis import given
from hypothesis import strategies as st

from gpudcp.errors import TransferError
from gpudcp.files import measure as module
from gpudcp.files import trial
from gpudcp.files.figures import Way
from gpudcp.files.filesystems import supports_direct_io
from gpudcp.files.kvikio import KvikioReader, KvikioWriter, deregister
from gpudcp.files.measure import Measurements, measure, settings
from gpudcp.files.posix import PosixReader, PosixWriter

MIB = 1 << 20
CUDA = torch.device("cuda", 0)


def measured(directory: Path, device: torch.device | str = "cpu", *, nbytes: int = 2 * MIB) -> Measurements:
    """A small measurement: two thread counts, two request sizes."""
    return measure(
        str(directory),
        torch.device(device),
        nbytes=nbytes,
        threads=(1, 2),
        requests_nbytes=(MIB // 2, MIB),
        allocate=lambda nbytes, _: block_aligned(nbytes),
    )


def unavailable(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory of a GPU, where there is none."""
    raise AssertionError(f"{nbytes} bytes of {device}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    """A GPU whose memory is the host's, and a KvikIO that moves it."""
    package = FakeKvikio()
    package.install(monkeypatch)
    monkeypatch.setattr(trial, "_answers", {})
    monkeypatch.setattr(module, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(module, "_pinned", block_aligned)
    return package


@given(
    threads=st.lists(st.integers(1, 64), min_size=1, unique=True),
    requests_nbytes=st.lists(st.integers(1, 256).map(lambda blocks: blocks * 4096), min_size=1, unique=True),
)
def test_every_thread_count_and_every_request_size_is_tried_in_few_settings(
    threads: list[int], requests_nbytes: list[int]
) -> None:
    """A cross through the middle, not the whole grid."""
    pairs = settings(threads, requests_nbytes)
    assert {each for each, _ in pairs} == set(threads)
    assert {each for _, each in pairs} == set(requests_nbytes)
    assert len(pairs) == len(set(pairs)) == len(threads) + len(requests_nbytes) - 1


def test_host_memory_is_measured_by_every_way_that_works(tmp_path: Path) -> None:
    """Each in every setting; the others have a reason."""
    found = measured(tmp_path)
    ways = {("write", "buffered"), ("read", "buffered")}
    if supports_direct_io(str(tmp_path)):
        ways |= {("write", "direct"), ("read", "direct")}
    assert {(each.direction, each.way) for each in found.figures} == ways
    assert len(found.figures) == 3 * len(ways)
    assert all(each.gb_per_s > 0 and each.ntransfers == 1 for each in found.figures)
    assert found.not_measured["gds"] == found.not_measured["compat"] == "there is no GPU memory to move"
    assert set(found.not_measured) | {each.way for each in found.figures} == set(get_args(Way))
    assert os.listdir(tmp_path) == []


def test_a_gpu_is_measured_by_gds_and_by_compat_mode(tmp_path: Path, gpu: FakeKvikio) -> None:
    """Compat mode is forced while its files are opened, and put back; pinned memory goes the POSIX ways."""
    found = measured(tmp_path, CUDA)
    expected = [(direction, way) for way in ("gds", "compat", "buffered") for direction in ("write", "read")]
    assert {(each.direction, each.way) for each in found.figures} >= set(expected)
    assert gpu.settings == [("compat_mode", "ON"), ("compat_mode", "as found")] * 6, "for a writer and a reader"
    assert found.not_measured.keys() <= {"direct"}
    assert os.listdir(tmp_path) == []
    assert gpu.registered == [], "what was registered is so no more"


def test_gds_is_measured_with_memory_as_slabs_are(tmp_path: Path, gpu: FakeKvikio) -> None:
    """Allocations of their own, registered; where cuFile registers none, without, as transfers go."""
    bases: list[int] = []

    def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
        assert device == CUDA
        memory = block_aligned(nbytes)
        bases.append(memory.data_ptr())
        return memory

    for registers in (True, False):
        gpu.registers = registers
        gpu.transfers.clear()
        trial._answers.clear()
        found = measure(str(tmp_path), CUDA, nbytes=2 * MIB, threads=(1,), requests_nbytes=(MIB,), allocate=allocate)
        assert "gds" in {each.way for each in found.figures}
        assert {address for _, address, *_ in gpu.transfers} <= set(bases)
        assert all(dev_offset == 0 for *_, dev_offset in gpu.transfers)
    assert gpu.registered == []


@pytest.mark.parametrize("reason", [None, "no nvidia-fs"])
def test_what_is_not_surely_gds_is_measured_as_compat_mode_alone(
    tmp_path: Path, gpu: FakeKvikio, monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    """A figure called GDS that is none would be remembered."""
    gpu.falls_back = ("write", "read")
    monkeypatch.setattr(module, "unavailable_reason", lambda kind: reason if kind == "gds" else None)
    found = measured(tmp_path, CUDA)
    assert "gds" not in {each.way for each in found.figures}
    assert found.not_measured["gds"] == (reason or trial.try_device_io(str(tmp_path), block_aligned(1)).reason)
    assert "compat" in {each.way for each in found.figures}


def test_a_gpu_whose_trial_fails_is_measured_by_pinned_memory(tmp_path: Path, gpu: FakeKvikio) -> None:
    """With the trial's error for a reason."""
    gpu.error = RuntimeError("cuFile said no")
    found = measured(tmp_path, CUDA)
    assert "cuFile said no" in found.not_measured["gds"]
    assert {each.way for each in found.figures} <= {"direct", "buffered"}


def test_every_byte_is_written_once_and_read_once_by_as_many_threads_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of the size that the figure names."""
    calls: list[tuple[str, int, int]] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def move(self: object, data: memoryview, byte_offset: int) -> None:
            calls.append((name, byte_offset, len(data)))
            call(self, data, byte_offset)

        return move

    monkeypatch.setattr(PosixWriter, "write", recorded("write", PosixWriter.write))
    monkeypatch.setattr(PosixReader, "read", recorded("read", PosixReader.read))
    monkeypatch.setattr(module, "supports_direct_io", lambda _: False)
    monkeypatch.setattr(module, "opens_named_file_directly", lambda _: False)
    found = measure(
        str(tmp_path), torch.device("cpu"), nbytes=4 * MIB, threads=(3,), requests_nbytes=(MIB,), allocate=unavailable
    )
    assert "opens no file with O_DIRECT" in found.not_measured["direct"]
    expected = [(number * MIB, MIB) for number in range(4)]
    for name in ("write", "read"):
        assert sorted(call[1:] for call in calls if call[0] == name) == expected


def test_too_little_room_is_found_before_the_first_byte(tmp_path: Path) -> None:
    """The disk is somebody's: it is not filled to the brim."""
    with pytest.raises(TransferError, match="bytes are free"):
        measured(tmp_path, nbytes=1 << 60)
    with pytest.raises(TransferError, match="No such file"):
        measured(tmp_path / "gone")
    assert os.listdir(tmp_path) == []


class OneFails:
    """Stands for a system call: the one for byte 0 fails while another one runs, which then takes its time."""

    def __init__(self, real: Callable[..., int], close: Callable[[int], None]) -> None:
        self.real, self.real_close = real, close
        self.others: list[bool] = []
        """Of every other call, whether the descriptor was closed while it ran."""
        self._has_other, self._is_closed = threading.Event(), threading.Event()
        self._fd = -1

    def __call__(self, fd: int, data: Any, byte_offset: int) -> int:
        self._fd = fd
        if byte_offset == 0:
            assert self._has_other.wait(20)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._has_other.set()
        self.others.append(self._is_closed.wait(0.2))
        return 0 if self.others[-1] else self.real(fd, data, byte_offset)

    def close(self, fd: int) -> None:
        self.real_close(fd)
        if fd == self._fd:
            self._is_closed.set()


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_a_file_is_not_closed_while_other_threads_still_move_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Else they would write to whatever file has the descriptor's number next. They stop after the request in hand."""
    call = OneFails(getattr(os, name), os.close)
    monkeypatch.setattr(module, "supports_direct_io", lambda _: False)
    monkeypatch.setattr(module, "opens_named_file_directly", lambda _: False)
    monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(os, "close", call.close)
    with pytest.raises(TransferError, match=os.strerror(errno.ENOSPC)):
        measure(
            str(tmp_path),
            torch.device("cpu"),
            nbytes=64 << 12,
            threads=(2,),
            requests_nbytes=(4096,),
            allocate=unavailable,
        )
    assert not any(call.others)
    assert len(call.others) < 32, "all requests of the other thread"
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["write_device", "read_device"])
def test_memory_is_let_go_of_when_no_thread_moves_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """cuFile must not lose a registration in mid-transfer, nor KvikIO a handle."""
    log: list[str] = []
    has_other, has_failed = threading.Event(), threading.Event()

    def move(_self: object, _tensor: torch.Tensor, byte_offset: int) -> None:
        if byte_offset == 0:
            assert has_other.wait(20)
            has_failed.set()
            raise TransferError("no", path="no")
        has_other.set()
        assert has_failed.wait(20)
        time.sleep(0.2)
        log.append("moved")

    kind = KvikioWriter if name == "write_device" else KvikioReader
    monkeypatch.setattr(kind, name, move)
    monkeypatch.setattr(module, "deregister", lambda memory: (log.append("let go"), deregister(memory)))
    with pytest.raises(TransferError, match="no"):
        measure(
            str(tmp_path),
            CUDA,
            nbytes=2 << 12,
            threads=(2,),
            requests_nbytes=(4096,),
            allocate=lambda n, _: block_aligned(n),
        )
    assert log == ["moved", "let go", "let go"]


def test_a_transfer_that_fails_ends_the_measurement_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a write, whose file was not finished, and of a read, whose file was."""

    def fail(*_: object) -> None:
        raise TransferError("no", path="no")

    for kind, name in ((PosixReader, "read"), (PosixWriter, "write")):
        monkeypatch.setattr(kind, name, fail)
        with pytest.raises(TransferError, match="no"):
            measured(tmp_path)
        assert os.listdir(tmp_path) == []
