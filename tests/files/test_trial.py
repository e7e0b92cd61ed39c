"""A trial transfer says how device memory moves, claims GPUDirect Storage only where it is certain, and never hangs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fake_kvikio import FakeKvikio, block_aligned

from gpudcp.errors import BackendUnavailableError
from gpudcp.files import kvikio, trial
from gpudcp.files.trial import TRIAL_NBYTES, DeviceIO, try_device_io

BOTH = ("write", "read")


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_answers", {})


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    """The kvikio of this test."""
    package = FakeKvikio()
    package.install(monkeypatch)
    return package


def try_in(directory: Path, *, deadline_s: float = 20.0) -> DeviceIO:
    """A trial of new memory."""
    return try_device_io(str(directory), block_aligned(TRIAL_NBYTES), deadline_s=deadline_s)


def test_kvikios_compat_mode_is_never_called_gds(tmp_path: Path, package: FakeKvikio) -> None:
    """It is POSIX calls, whatever else the machine has."""
    package.is_compat, package.falls_back = True, BOTH
    assert try_in(tmp_path) == (False, "KvikIO in compat mode: POSIX calls through pinned memory")


def test_bytes_that_pass_through_no_system_call_went_by_gds(tmp_path: Path, package: FakeKvikio) -> None:
    """cuFile may fall back without a word, but what it does then is counted by the kernel."""
    assert try_in(tmp_path).is_gds
    assert {each[0] for each in package.transfers} == {"write", "read"}
    assert all(each[3] == TRIAL_NBYTES for each in package.transfers)


@pytest.mark.parametrize("falls_back", [BOTH, ("write",), ("read",)], ids=str)
def test_a_fallback_inside_cufile_is_not_called_gds(
    tmp_path: Path, package: FakeKvikio, falls_back: tuple[str, ...]
) -> None:
    """The module is loaded, KvikIO thinks that it uses it, and the bytes go another way, if only in one direction."""
    package.falls_back = falls_back
    found = try_in(tmp_path)
    assert not found.is_gds
    assert "passed through POSIX calls" in found.reason


@pytest.mark.parametrize("is_nvidia_fs_loaded", [True, False])
def test_kvikios_own_fallback_for_a_file_is_not_called_gds(
    tmp_path: Path, package: FakeKvikio, is_nvidia_fs_loaded: bool
) -> None:
    """It opens the file without O_DIRECT, and says nothing; that cuFile may not fall back is beside the point."""
    package.may_fall_back, package.is_nvidia_fs_loaded = False, is_nvidia_fs_loaded
    package.opens_without_direct_io = True
    found = try_in(tmp_path)
    assert not found.is_gds
    assert package.compat_mode == "AUTO"


def test_gds_names_the_memory_that_cufile_takes_for_itself(tmp_path: Path, package: FakeKvikio) -> None:
    """It is no part of the lanes."""
    assert "cuFile takes up to 128 MiB of device memory for itself" in try_in(tmp_path).reason
    package.is_nvidia_fs_loaded = package.may_fall_back = False
    trial._answers.clear()
    assert "cuFile takes up to 128 MiB of device memory for itself" in try_in(tmp_path).reason


def test_without_nvidia_fs_it_is_gds_only_where_cufile_may_not_fall_back(tmp_path: Path, package: FakeKvikio) -> None:
    """PCI P2PDMA may go through system calls too, so the count says nothing about it."""
    package.is_nvidia_fs_loaded, package.falls_back = False, BOTH
    assert not try_in(tmp_path).is_gds
    package.falls_back = ()
    trial._answers.clear()
    assert not try_in(tmp_path).is_gds
    trial._answers.clear()
    package.may_fall_back = False
    assert try_in(tmp_path).is_gds
    assert package.settings == [("compat_mode", "OFF"), ("compat_mode", "as found")]


class DeviceMemory(torch.Tensor):
    """Host memory that says it is a GPU's, and writes down on which stream its bytes are copied."""

    is_cuda = True
    device = torch.device("cuda", 0)
    copied: ClassVar[list[tuple[str, object]]] = []
    stream: ClassVar[object] = "the default stream"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in ("copy_", "cpu", "to", "clone", "tolist"):
            cls.copied.append((func.__name__, cls.stream))
        return super().__torch_function__(func, types, args, kwargs or {})


class OwnStream:
    """A stream that nobody else has; it is waited for."""

    def synchronize(self) -> None:
        DeviceMemory.copied.append(("synchronize", self))


@pytest.fixture
def own_stream(monkeypatch: pytest.MonkeyPatch) -> OwnStream:
    """The stream of the trial's thread, where there is no GPU."""
    stream = OwnStream()

    @contextmanager
    def current(given: object) -> Iterator[None]:
        DeviceMemory.stream, before = given, DeviceMemory.stream
        yield
        DeviceMemory.stream = before

    monkeypatch.setattr(kvikio, "_stream_of", lambda _: stream)
    monkeypatch.setattr(trial, "relax_stream_capture", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", current)
    for name in ("device", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(DeviceMemory, "copied", [])
    return stream


@pytest.mark.usefixtures("package")
def test_a_trial_waits_for_no_stream_but_its_own(tmp_path: Path, own_stream: OwnStream) -> None:
    """Training's may be busy for longer than the deadline, and that it took too long would be the answer for good."""
    memory = block_aligned(TRIAL_NBYTES).as_subclass(DeviceMemory)
    assert try_device_io(str(tmp_path), memory, deadline_s=20).is_gds
    once = [("copy_", own_stream), ("synchronize", own_stream)]
    assert DeviceMemory.copied == once * 2 * trial._TIMES_COUNTED


@pytest.mark.parametrize("direction", ["write", "read"])
def test_wrong_bytes_make_it_unavailable(tmp_path: Path, package: FakeKvikio, direction: str) -> None:
    """What arrives is compared, both ways."""
    package.spoils = (direction,)
    with pytest.raises(BackendUnavailableError, match="a trial transfer failed: what was") as caught:
        try_in(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).endswith("use Options(files='auto') or 'posix'")


def test_an_error_or_a_short_transfer_makes_it_unavailable(tmp_path: Path, package: FakeKvikio) -> None:
    """With KvikIO's own words."""
    package.error = RuntimeError("cuFile said no")
    with pytest.raises(BackendUnavailableError, match="cuFile said no"):
        try_in(tmp_path)
    trial._answers.clear()
    package.error, package.receipt = None, lambda size: size - 1
    with pytest.raises(BackendUnavailableError, match="moved"):
        try_in(tmp_path)


def test_a_transfer_that_hangs_is_given_up_at_the_deadline(tmp_path: Path, package: FakeKvikio) -> None:
    """The training goes on; the trial's thread is left where it is."""
    release = threading.Event()
    package.receipt = lambda size: size if release.wait(20) else 0
    try:
        with pytest.raises(BackendUnavailableError, match=r"did not return within 0\.05 s"):
            try_in(tmp_path, deadline_s=0.05)
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "gpudcp-trial":
                thread.join()


def test_a_place_is_tried_once_and_a_failure_is_remembered(tmp_path: Path, package: FakeKvikio) -> None:
    """The same file system and device."""
    try_in(tmp_path)
    ntransfers = len(package.transfers)
    (tmp_path / "below").mkdir()
    try_in(tmp_path / "below")
    assert len(package.transfers) == ntransfers
    trial._answers.clear()
    package.error = RuntimeError("cuFile said no")
    for _ in range(2):
        with pytest.raises(BackendUnavailableError):
            try_in(tmp_path)
    assert len(package.transfers) == ntransfers + 1


def test_without_being_asked_no_file_with_a_name_is_made(
    tmp_path: Path, package: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was tried before, the error says how to ask; it is not remembered as the answer."""
    monkeypatch.setattr(trial, "has_unnamed_files", lambda _: False)
    memory = block_aligned(TRIAL_NBYTES)
    with pytest.raises(BackendUnavailableError, match=r"run gpudcp\.tune on it"):
        try_device_io(str(tmp_path), memory, is_asked_for=False)
    assert package.transfers == []
    asked = try_device_io(str(tmp_path), memory)
    assert try_device_io(str(tmp_path), memory, is_asked_for=False) == asked


@pytest.fixture(params=["unnamed", "named"])
def kind_of_file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems with and without unnamed files."""
    opened = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, mode)

    if request.param == "named":
        monkeypatch.setattr(os, "open", refuse)
    return str(request.param)


@pytest.mark.usefixtures("kind_of_file")
def test_nothing_is_left_behind(tmp_path: Path, package: FakeKvikio) -> None:
    """Neither by a trial that passed nor by one that failed."""
    before = len(os.listdir("/proc/self/fd"))
    assert try_in(tmp_path).is_gds
    trial._answers.clear()
    package.error = RuntimeError("cuFile said no")
    with pytest.raises(BackendUnavailableError):
        try_in(tmp_path)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before
