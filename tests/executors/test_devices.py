"""What the CUDA device asks of torch and of the driver, by recorders in their place: the GPU itself is not here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpudcp.executors import devicememory, devices
from gpudcp.executors.devices import CudaDevice
from gpudcp.executors.slabs import HostSlab

SECOND = torch.device("cuda", 1)


class Driver:
    """Gives host memory, at addresses as the driver gives them for small allocations: multiples of 512."""

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self.slab = HostSlab(1 << 20)
        self.asked_nbytes = 0

    def cuMemAlloc_v2(self, address: Any, nbytes: ctypes.c_size_t) -> int:
        ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64))[0] = self.slab.address + self._distance
        self.asked_nbytes = nbytes.value
        return 0

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        assert address.value == self.slab.address + self._distance
        return 0


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


@pytest.mark.parametrize("distance", [0, 512, 4096 - 512, 5120])
def test_a_slab_is_on_a_block_wherever_the_driver_put_it(
    distance: int, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And within the allocation, whose context is that of the slab's device."""
    driver = Driver(distance)

    def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
        assert device == SECOND
        interface = memory.__cuda_array_interface__
        first = interface["data"][0] - driver.slab.address
        return driver.slab.tensor[first : first + interface["shape"][0]]

    def mem_get_info(device: torch.device) -> None:
        assert current[-1] == device == SECOND

    monkeypatch.setattr(devicememory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    slab = devicememory.allocate(12288, SECOND)
    assert slab.data_ptr() % 4096 == 0
    assert slab.nbytes == 12288
    begin = driver.slab.address + distance
    assert begin <= slab.data_ptr()
    assert slab.data_ptr() + slab.nbytes <= begin + driver.asked_nbytes


def test_host_memory_is_pinned_for_the_device(current: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for whichever is current, where it would make a context."""
    pinned: list[tuple[torch.device, int]] = []

    def host_slab(nbytes: int, *, is_pinned: bool) -> None:
        assert is_pinned
        pinned.append((current[-1], nbytes))

    monkeypatch.setattr(devices, "HostSlab", host_slab)
    CudaDevice(SECOND).new_host_slab(8192)
    assert pinned == [(SECOND, 8192)]


def test_a_thread_is_bound_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all that it does later."""
    bound: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    CudaDevice(SECOND).bind_thread()
    assert bound == [SECOND]
