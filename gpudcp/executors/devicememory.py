"""Memory by the CUDA driver itself: device memory of its own allocations, and host memory pinned for a device.

Never a part of a segment of torch's caching allocator: cuFile registers whole allocations, and a slab must not pin, or
be pinned with, what belongs to training. And never by the CUDA runtime: it remembers an error that its caller has
handled, and torch raises that at the next launch of whatever kernel.
"""

from __future__ import annotations

import ctypes

import torch

from gpudcp.cudadriver import context_of, driver, when_gone
from gpudcp.executors.sharedmemory import SharedSlab
from gpudcp.executors.slabs import HostSlab

_GRAIN_NBYTES = 2 << 20
"""The driver's pages. It divides them among smaller allocations, aligned to 512 bytes; whole ones begin on a page, and
so begins the slab where its allocation does, by which alone cuFile knows it again."""
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context, as the runtime does it


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Flat uint8 on a CUDA device, from an allocation's first byte on, freed with the last tensor that shares it.

    Raises:
        torch.OutOfMemoryError: the driver has no room.
    """
    address, whole_nbytes = ctypes.c_uint64(), -(-nbytes // _GRAIN_NBYTES) * _GRAIN_NBYTES
    with context_of(device):
        result = driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(whole_nbytes))
    if result != 0:
        raise torch.OutOfMemoryError(f"{device}: cuMemAlloc of {whole_nbytes} bytes: CUDA driver error {result}")
    memory = _Memory(address.value, whole_nbytes)
    when_gone(memory, _free, address.value, device)
    with torch.inference_mode(False):  # the caller's own mode may have ended when the memory is used again
        return torch.as_tensor(memory, device=device)[:nbytes]


def pin(slab: HostSlab | SharedSlab, device: torch.device) -> None:
    """Register a host slab, for as long as it lives: the device then copies to and from it while the host goes on.

    Raises:
        torch.OutOfMemoryError: no more memory can be pinned.
    """
    with context_of(device):
        result = driver().cuMemHostRegister_v2(
            ctypes.c_void_p(slab.address), ctypes.c_size_t(slab.nbytes), ctypes.c_uint(_PORTABLE)
        )
    if result != 0:
        raise torch.OutOfMemoryError(f"{slab.nbytes} bytes of host memory: cuMemHostRegister: driver error {result}")
    if isinstance(slab, HostSlab):
        slab.keep_from_children()
    # The memory itself is unmapped later: the slab and its tensor go first.
    when_gone(slab, _unpin, slab.address, device)


def _free(address: int, device: torch.device) -> None:
    with context_of(device):
        driver().cuMemFree_v2(ctypes.c_uint64(address))


def _unpin(address: int, device: torch.device) -> None:
    with context_of(device):
        driver().cuMemHostUnregister(ctypes.c_void_p(address))


class _Memory:
    """What torch keeps alive for as long as a tensor shares it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
