"""Host slabs: page-aligned buffers, allocated once for a transfer and used in turn."""

from __future__ import annotations

import mmap

import torch


class HostSlab:
    """One page-aligned host buffer: as a memoryview, as a flat uint8 tensor, and as an address."""

    __slots__ = ("address", "nbytes", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        memory = mmap.mmap(-1, nbytes)
        self.nbytes = nbytes
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
