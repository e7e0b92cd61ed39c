"""What the CUDA device asks of torch and of the driver, by recorders in their place: the GPU itself is not here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpudcp.executors import devicememory
from gpudcp.executors.devices import CudaDevice
from gpudcp.executors.slabs import HostSlab

SECOND = torch.device("cuda", 1)


class Driver:
    """Gives host memory in place of device memory, pins by writing it down, and answers with an error if told so."""

    def __init__(self, current: list[torch.device]) -> None:
        self._current = current
        self.slab = HostSlab(4 << 20)
        self.calls: list[tuple[str, int, int]] = []
        """Name, address and bytes, or flags."""
        self.result = 0

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

    def _called(self, name: str, address: int, nbytes: int) -> int:
        assert self._current[-1:] == [SECOND], "the context of the device whose memory it is"
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

    monkeypatch.setattr(devicememory, "_driver", lambda: driver)
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
def test_what_is_free_is_what_the_driver_says_of_the_device(current: list[torch.device]) -> None:
    """In bytes."""
    current.append(SECOND)
    assert CudaDevice(SECOND).free_nbytes() == 1 << 30


def test_a_thread_is_bound_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that it does later."""
    bound: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    CudaDevice(SECOND).bind_thread()
    assert bound == [SECOND]
