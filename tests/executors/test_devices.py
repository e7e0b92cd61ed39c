"""What the CUDA device asks of torch and of the driver, by recorders in their place: the GPU itself is not here."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpudcp import cudadriver
from gpudcp.executors import devicememory
from gpudcp.executors.devices import CudaDevice
from gpudcp.executors.slabs import HostSlab
from gpudcp.workers import Workers

SECOND = torch.device("cuda", 1)


class Driver:
    """Gives host memory in place of device memory, pins by writing it down, and answers with an error if told so."""

    def __init__(self, current: list[torch.device]) -> None:
        self._current = current
        self.slab = HostSlab(4 << 20)
        self.calls: list[tuple[str, int, int]] = []
        """Name, address and bytes, or flags."""
        self.result = 0
        self.capture_mode = 0
        """Of the thread: any other than 2, relaxed, and a call ends the capture of a graph elsewhere."""

    def cuMemAlloc_v2(self, address: Any, nbytes: ctypes.c_size_t) -> int:
        ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))[0] = self.slab.address
        return self._called("alloc", self.slab.address, nbytes.value)

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        return self._called("free", address.value, 0)

    def cuMemHostRegister_v2(self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, flags: ctypes.c_uint) -> int:
        assert flags.value == 1
        return self._called("register", address.value or 0, nbytes.value)

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:
        return self._called("unregister", address.value or 0, 0)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        place = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        place[0], self.capture_mode = self.capture_mode, place[0]
        return 0

    def cuStreamCreate(self, stream: Any, flags: ctypes.c_uint) -> int:
        assert flags.value == 1, "or it waits for the default stream"
        ctypes.cast(stream, ctypes.POINTER(ctypes.c_void_p))[0] = 0x5EA0
        return self._called("stream", 0x5EA0, 0)

    def cuStreamDestroy_v2(self, stream: ctypes.c_void_p) -> int:
        return self._called("destroy", stream.value or 0, 0)

    def _called(self, name: str, address: int, nbytes: int) -> int:
        assert self._current[-1:] == [SECOND], "the context of the device whose memory it is"
        assert self.capture_mode == 2
        self.calls.append((name, address, nbytes))
        return self.result


@pytest.fixture
def driver(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The driver's library, and torch with tensors in its memory."""
    driver = Driver(current)

    def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
        assert device == SECOND
        interface = memory.__cuda_array_interface__
        first = interface["data"][0] - driver.slab.address
        return driver.slab.tensor[first : first + interface["shape"][0]]

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        assert current[-1] == device == SECOND
        return 1 << 30, 1 << 32

    for module in (cudadriver, devicememory):
        monkeypatch.setattr(module, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return driver


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that are current, the innermost last, as ``torch.cuda.device`` makes them."""
    stack: list[torch.device] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        stack.append(wanted)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


@pytest.mark.parametrize("nbytes", [1, 12288, 2 << 20, (2 << 20) + 1])
def test_a_slab_begins_where_its_allocation_does_and_has_whole_pages(driver: Driver, nbytes: int) -> None:
    """The driver puts less than a page of 2 MiB anywhere in one, and cuFile knows an allocation by its first byte."""
    slab = devicememory.allocate(nbytes, SECOND)
    assert (slab.data_ptr(), slab.nbytes) == (driver.slab.address, nbytes)
    ((name, _, asked_nbytes), *_) = driver.calls
    assert name == "alloc"
    assert asked_nbytes % (2 << 20) == 0 < nbytes <= asked_nbytes


def test_a_device_without_room_is_out_of_memory(driver: Driver) -> None:
    """As torch says it, so that whoever asked makes do with less."""
    driver.result = 2
    with pytest.raises(torch.OutOfMemoryError, match="cuda:1: cuMemAlloc of 2097152 bytes: CUDA driver error 2"):
        devicememory.allocate(8192, SECOND)
    assert [call[0] for call in driver.calls] == ["alloc"]


def test_host_memory_is_pinned_for_the_device_as_long_as_the_slab_lives(driver: Driver) -> None:
    """Not for whichever device is current, where it would make a context."""
    slab = CudaDevice(SECOND).new_host_slab(8192)
    address = slab.address
    assert driver.calls == [("register", address, 8192)]
    del slab
    assert driver.calls[1:] == [("unregister", address, 0)]


def test_host_memory_that_cannot_be_pinned_is_out_of_memory_and_leaves_no_error_behind(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime, which keeps its last error for the next launch, is not asked; nothing is unpinned that was not."""

    def cudart() -> None:
        raise AssertionError("the CUDA runtime")

    monkeypatch.setattr(torch.cuda, "cudart", cudart)
    driver.result = 2
    with pytest.raises(torch.OutOfMemoryError, match="8192 bytes of host memory"):
        CudaDevice(SECOND).new_host_slab(8192)
    assert [call[0] for call in driver.calls] == ["register"]


@pytest.mark.usefixtures("driver")
def test_what_is_free_is_what_the_driver_says_of_the_device(
    current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes; torch can take what it keeps for its next tensors, too."""
    current.append(SECOND)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {SECOND: 7000}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {SECOND: 3000}.__getitem__)
    assert CudaDevice(SECOND).free_nbytes() == 1 << 30
    assert CudaDevice(SECOND).spare_nbytes() == (1 << 30) + 4000


def test_torch_gives_back_what_it_keeps(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device."""
    emptied: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.extend(current))
    CudaDevice(SECOND).reclaim()
    assert emptied == [SECOND]


def test_a_thread_is_bound_to_its_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that it does later, none of which ends the capture of a graph in another thread."""
    bound: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    CudaDevice(SECOND).bind_thread()
    assert bound == [SECOND]
    assert driver.capture_mode == 2


def test_a_thread_that_does_a_job_for_want_of_others_keeps_its_device(
    driver: Driver, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's, maybe: bound for the job, also one that fails; then its device and capture mode are its own again."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def job() -> None:
        CudaDevice(SECOND).bind_thread()
        seen.append((current[-1], driver.capture_mode))
        raise ValueError("mine")

    seen: list[tuple[torch.device, int]] = []
    bound: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    driver.capture_mode = 1
    with Workers(1, "some") as workers:
        assert isinstance(workers.submit(job).exception(), ValueError)
        assert (seen, current, driver.capture_mode, bound) == ([(SECOND, 2)], [], 1, [])


def test_calls_of_the_driver_leave_the_threads_capture_mode_as_it_was(driver: Driver) -> None:
    """They are relaxed, what the caller does next is not."""
    driver.capture_mode = 1
    devicememory.allocate(8192, SECOND)
    assert driver.capture_mode == 1


class _External:
    """What torch makes of a stream that is not its own."""

    def __init__(self, stream: int, device: torch.device) -> None:
        self.stream, self.device = stream, device


def test_a_stream_is_nobody_elses_and_ends_with_its_last_use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own are given out again after 32."""
    monkeypatch.setattr(torch.cuda, "ExternalStream", _External)
    stream = cudadriver.new_stream(SECOND)
    assert (stream.stream, stream.device) == (0x5EA0, SECOND)
    assert driver.calls == [("stream", 0x5EA0, 0)]
    del stream
    assert driver.calls[1:] == [("destroy", 0x5EA0, 0)]


def test_events_are_waited_for_without_spinning(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for the device must leave its core to others."""
    made: list[dict[str, bool]] = []

    class Event:
        def __init__(self, **options: bool) -> None:
            made.append(options)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "ExternalStream", _External)
    monkeypatch.setattr(_External, "record_event", lambda *_: None, raising=False)
    CudaDevice(SECOND).new_stream().record()
    assert made == [{"blocking": True}]
    assert driver.calls[0][0] == "stream"


def test_pinned_memory_is_not_given_to_forked_children(driver: Driver) -> None:
    """Each fork would copy all of it."""
    slab = HostSlab(1 << 20)
    devicememory.pin(slab, SECOND)
    assert driver.calls == [("register", slab.address, 1 << 20)]
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    (flags,) = [
        entry.split("VmFlags:")[1].split("\n")[0].split()
        for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps)
        if int(entry.split("-")[0], 16) <= slab.address < int(entry.split("-")[1].split()[0], 16)
    ]
    assert "dc" in flags  # "do not copy area on fork"
    del slab


def status_of_child(act: Callable[[], None]) -> int:
    """Fork, act there, and end as Python does not: 0, or what stopped it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_call_the_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it cannot, and torch says so. What is the parent's stays its own until that lets go of it."""
    monkeypatch.setattr(torch.cuda, "ExternalStream", _External)
    owners: list[Any] = [CudaDevice(SECOND).new_host_slab(8192), cudadriver.new_stream(SECOND)]
    monkeypatch.setattr(torch, "as_tensor", lambda memory, **_: owners.append(memory) or driver.slab.tensor)
    devicememory.allocate(8192, SECOND)
    called = list(driver.calls)

    def let_go() -> None:
        def refuse(_: torch.device) -> None:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

        ignored: list[Any] = []
        sys.unraisablehook = ignored.append
        torch.cuda.device = refuse  # type: ignore[assignment,misc]
        owners.clear()
        gc.collect()
        assert not ignored, ignored
        assert driver.calls == called

    assert status_of_child(let_go) == 0
    assert driver.calls == called
    owners.clear()
    assert sorted(call[0] for call in driver.calls[len(called) :]) == ["destroy", "free", "unregister"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("nbytes", [1 << 20, 4 << 20])
def test_a_forked_child_does_not_unmap_what_is_where_pinned_memory_was(driver: Driver, nbytes: int) -> None:
    """There is nothing of the slab in the child, so the system may put anything there: a library, a thread's stack."""
    slabs = [HostSlab(nbytes)]
    devicememory.pin(slabs[0], SECOND)
    address = slabs[0].address
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def let_go() -> None:
        private_fixed_anonymous = 0x02 | 0x100000 | 0x20  # fixed, but only where there is nothing
        found = libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, private_fixed_anonymous, -1, 0)
        assert found == address, ctypes.get_errno()
        ctypes.memset(address, 7, nbytes)
        slabs.clear()
        gc.collect()
        assert ctypes.string_at(address, nbytes) == bytes([7]) * nbytes

    assert status_of_child(let_go) == 0
    slabs.clear()
    assert [call[0] for call in driver.calls] == ["register", "unregister"]
