"""Choosing an executor and a way to the files: by name it is that one or an error, "auto" says what it took."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from gpudcp_kernels import launching

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors import select as select_module
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.cuda import DeviceExecutor
from gpudcp.executors.select import Selection, select, unavailable
from gpudcp.files.tune import Choice
from gpudcp.options import Options

CPU = {torch.device("cpu")}
GPU = {torch.device("cuda", 1), torch.device("cpu")}


def selected(options: Options, path: Path, devices: set[torch.device] | None = CPU) -> Selection:
    return select(options, str(path), direction="write", devices=lambda: devices)


def test_the_cpu_executor_is_what_its_name_gets(tmp_path: Path) -> None:
    """Asked for by name, the reason is the name."""
    found = selected(Options(executor="cpu", files="posix"), tmp_path)
    assert isinstance(found.executor, CpuExecutor)
    assert found.reasons[0] == "Options(executor='cpu')"


def test_auto_says_why_it_took_the_cpu_executor(tmp_path: Path) -> None:
    """The reason goes into the report, so it is a sentence and not a name."""
    found = selected(Options(), tmp_path)
    assert found.executor.name == "cpu"
    assert found.reasons[0] == "the cpu executor: no tensor on a GPU"


def test_auto_falls_back_where_kernels_cannot_run_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a GPU do not make a save fail."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(select_module, "unavailable", lambda executor: f"no {executor}, for a test")
    found = selected(Options(), tmp_path, GPU)
    assert found.executor.name == "cpu"
    assert found.reasons[0] == "the cpu executor: no cuda, for a test"


@pytest.fixture(autouse=True)
def _gpus_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "_capability", lambda _: (9, 0))


def test_tensors_on_several_gpus_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has lanes, which take memory; in the order of their numbers, whatever the set's."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(select_module, "unavailable", lambda _: None)
    some = {torch.device("cuda", number) for number in (10, 2, 0)} | CPU
    devices, reason = select_module._choose_devices(Options(lanes=3), lambda: some)
    assert list(map(str, devices)) == ["cuda:0", "cuda:2", "cuda:10"]
    more = "3 lanes, each with its slab of memory, on each of 3 GPUs"
    assert reason == f"the cuda executor: tensors on cuda:0, cuda:2, cuda:10; {more}"
    assert select_module._choose_devices(Options(executor="cuda", lanes=3), lambda: some) == (
        devices,
        f"Options(executor='cuda'); {more}",
    )


def test_each_gpu_gets_a_device_of_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are chosen for all of them, by figures of the first; interpreted, there is one device."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(select_module, "unavailable", lambda _: None)
    monkeypatch.setattr(select_module, "figures_name", str)
    asked: list[torch.device] = []
    choice = Choice("buffered", 8, None, "measured")
    monkeypatch.setattr(select_module, "choose_files", lambda *given: asked.extend(given[3:]) or choice)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    found = selected(Options(), tmp_path, {second, first})
    assert isinstance(found.executor, DeviceExecutor)
    assert [device.torch_device for device in found.executor._devices] == found.devices == [first, second]
    assert (asked, found.device) == ([first, second], "cuda:0")
    assert selected(Options(executor="interpret"), tmp_path, {second, first}).devices == [torch.device("cpu")]
    assert selected(Options(executor="cpu"), tmp_path, {second, first}).devices == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("options", "asked", "remedy"),
    [
        (Options(executor="cuda"), "Options(executor='cuda')", "use Options(executor='auto') or 'cpu'"),
        (Options(files="gds"), "Options(files='gds')", "use Options(files='auto') or 'posix'"),
        (Options(files="kvikio"), "Options(files='kvikio')", "use Options(files='auto') or 'posix'"),
        (Options(executor="cpu", files="gds"), "Options(files='gds')", "use Options(files='auto') or 'posix'"),
    ],
)
def test_a_backend_asked_for_by_name_is_refused_and_not_replaced(
    tmp_path: Path, options: Options, asked: str, remedy: str
) -> None:
    """The message begins with what was asked and ends with the remedy."""
    with pytest.raises(BackendUnavailableError) as caught:
        selected(options, tmp_path)
    assert str(caught.value).startswith(f"{asked}: ")
    assert str(caught.value).endswith(remedy)


def test_only_what_works_here_has_no_reason_against_it() -> None:
    """None means available."""
    assert unavailable("cpu") is None
    assert unavailable("interpret") is None
    assert "use Options(executor='auto') or 'cpu'" in (unavailable("cuda") or "")


def test_without_triton_neither_device_executor_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is to install it."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(select_module.importlib.util, "find_spec", lambda _: None)
    for executor in ("cuda", "interpret"):
        assert "pip install triton" in (unavailable(executor) or "")


def test_without_a_c_compiler_kernels_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would fail at its first launch, in the middle of a save."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select_module, "_kernels_on_host", lambda: False)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "C compiler" in (unavailable("cuda") or "")


def test_where_triton_cannot_launch_its_own_words_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's headers, libcuda in the linker's cache, or a directory to write to: whatever it raises."""

    class Driver:
        @property
        def utils(self) -> None:
            raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(launching.triton.runtime.driver, "_active", Driver(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select_module, "_kernels_on_host", lambda: False)
    monkeypatch.setattr(select_module, "c_compiler", lambda: "gcc")
    launching.why_no_launch.cache_clear()
    try:
        assert "(AssertionError: libcuda.so cannot found!)" in (unavailable("cuda") or "")
    finally:
        launching.why_no_launch.cache_clear()


def test_a_gpu_that_no_kernel_was_compiled_for_is_left_to_the_cpu_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself; by name it may be tried."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(select_module, "unavailable", lambda _: None)
    monkeypatch.setattr(select_module, "_capability", lambda _: (7, 5))
    gpu = torch.device("cuda", 0)
    devices, reason = select_module._choose_devices(Options(), lambda: {gpu})
    assert devices == []
    assert "cuda:0 has compute capability below 8.0" in reason
    assert select_module._choose_devices(Options(executor="cuda"), lambda: {gpu})[0] == [gpu]


def test_the_interpreter_runs_the_device_executor_on_the_host(tmp_path: Path) -> None:
    """By name only, with files of the host."""
    found = selected(Options(executor="interpret", lanes=2, slab_nbytes=8192), tmp_path)
    assert (found.executor.name, found.executor.slab_nbytes, found.device) == ("interpret", 8192, "cpu")
    assert found.way in ("direct", "buffered")


def test_the_files_of_a_report_are_those_of_whoever_moved_the_bytes() -> None:
    """Host memory takes no GPUDirect Storage, whatever was chosen for the device's."""
    host = CpuExecutor(lanes=1, threads=1, slab_nbytes=4096, has_checksum=True)
    assert Selection(host, "gds", 1, "some GPU", ("", "")).files == "posix buffered"
    assert Selection(host, "direct", 1, "some GPU", ("", "")).files == "posix direct"
    assert Selection(host, "direct", 1, "cpu", ("", "")).files == "posix direct"
    host.name = "cuda"
    assert Selection(host, "gds", 1, "some GPU", ("", "")).files == "KvikIO, GPUDirect Storage"


@pytest.mark.parametrize(
    ("request_nbytes", "expected"),
    [(16 << 20, 16 << 20), (4096, 1 << 20), (1 << 40, 32 << 20), (5000, 4 << 20), (None, 4 << 20)],
)
def test_a_host_slab_is_the_request_that_was_measured_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_nbytes: int | None, expected: int
) -> None:
    """Within reason: anybody may have written the figures' file. Threads come with it, shared by a node's ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    choice = Choice("buffered", 8, request_nbytes, "measured")
    monkeypatch.setattr(select_module, "choose_files", lambda *_: choice)
    found = selected(Options(), tmp_path)
    assert (found.executor.slab_nbytes, found.threads) == (expected, 4)
    assert selected(Options(executor="interpret"), tmp_path).executor.slab_nbytes == 32 << 20
    assert selected(Options(slab_nbytes=8192), tmp_path).executor.slab_nbytes == 8192


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(2, "1", 1), (8, "1", 2), (8, "4", 1), (1, "1", 1)])
def test_a_core_is_left_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str, threads: int
) -> None:
    """Beside training a rank's threads leave one of its cores free, unless somebody says how many there are to be."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)

    def found(options: Options, *, is_beside_training: bool) -> int:
        path = str(tmp_path)
        return select(
            options, path, direction="write", devices=lambda: CPU, is_beside_training=is_beside_training
        ).threads

    assert found(Options(), is_beside_training=True) == threads
    assert found(Options(), is_beside_training=False) == min(2, max(1, cores // int(ranks)))
    assert found(Options(threads=3), is_beside_training=True) == 3


def test_the_options_of_the_ring_reach_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes, threads, slabs and checksum are the user's; what is not said has a default."""
    made: list[dict[str, object]] = []
    monkeypatch.setattr(select_module, "CpuExecutor", lambda **options: made.append(options))
    selected(Options(lanes=3, threads=5, slab_nbytes=4096, checksum=False), tmp_path)
    selected(Options(), tmp_path)
    assert made == [
        {"lanes": 3, "threads": 5, "slab_nbytes": 4096, "has_checksum": False},
        {"lanes": 4, "threads": 2, "slab_nbytes": 4 << 20, "has_checksum": True},
    ]
