"""Host memory that another process of this user can map, without a name anywhere: it is gone with its last user."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import NamedTuple

import torch

from gpudcp.errors import BackendUnavailableError


class SharedPlace(NamedTuple):
    """Where memory is, for another process."""

    path: str
    """To open and map."""
    nbytes: int
    byte_offset: int


class SharedSlab:
    """Flat uint8 in shared memory. Not limited by the size of /dev/shm.

    Raises:
        BackendUnavailableError: this Python cannot make it.
    """

    def __init__(self, nbytes: int) -> None:
        if not hasattr(os, "memfd_create"):  # Pythons built for a C library before 2.27 have none
            raise BackendUnavailableError(
                "this Python has no os.memfd_create, without which no other process can write; "
                "use Options(async_mode='thread')"
            )
        self.nbytes = nbytes
        self._fd = os.memfd_create("gpudcp", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, nbytes)
        self.tensor = _mapped(self._fd, nbytes)
        self.address = self.tensor.data_ptr()
        _slabs.add(self)

    def place(self, address: int, nbytes: int) -> SharedPlace | None:
        """Where these bytes of memory are, if they are in this slab."""
        start = address - self.address
        if not 0 <= start <= start + nbytes <= self.nbytes:
            return None
        return SharedPlace(f"/proc/{os.getpid()}/fd/{self._fd}", self.nbytes, start)


_slabs: weakref.WeakSet[SharedSlab] = weakref.WeakSet()


def shared_place(address: int, nbytes: int) -> SharedPlace | None:
    """Where memory of this process is for another one; None: nowhere."""
    found = (slab.place(address, nbytes) for slab in _slabs)
    return next((place for place in found if place is not None), None)


def map_shared(path: str, nbytes: int) -> torch.Tensor:
    """Another process's slab."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _mapped(fd, nbytes)
    finally:
        os.close(fd)


def _mapped(fd: int, nbytes: int) -> torch.Tensor:
    with torch.inference_mode(False):  # the caller's own mode may have ended when the memory is used again
        return torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
