"""Device memory of its own allocations, by the CUDA driver: never a part of a segment of torch's caching allocator.

cuFile registers whole allocations, and a slab must not pin, or be pinned with, what belongs to training.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import torch

from gpudcp.options import SLAB_ALIGNMENT_NBYTES


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Flat uint8 on a CUDA device, on a multiple of 4096, freed with the last tensor that shares it.

    Raises:
        torch.OutOfMemoryError: the driver has no room.
    """
    driver, alignment = _driver(), SLAB_ALIGNMENT_NBYTES
    address = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # makes the device's context this thread's
        # Memory of less than a megabyte or two the driver aligns to 512 bytes only.
        result = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes + alignment))
    if result != 0:
        raise torch.OutOfMemoryError(f"{device}: cuMemAlloc of {nbytes} bytes: CUDA driver error {result}")
    memory = _Memory(address.value, nbytes + alignment)
    weakref.finalize(memory, _free, address.value, device).atexit = False  # the driver may be gone by then
    first = -address.value % alignment
    return torch.as_tensor(memory, device=device)[first : first + nbytes]


def _free(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)
        _driver().cuMemFree_v2(ctypes.c_uint64(address))


class _Memory:
    """What torch keeps alive for as long as a tensor shares it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
