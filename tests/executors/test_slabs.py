"""Host slabs: one piece of memory, seen in three ways."""

from __future__ import annotations

import torch

from gpudcp.executors.slabs import HostSlab


def test_view_tensor_and_address_are_the_same_memory() -> None:
    """What one writes the others read."""
    slab = HostSlab(8192)
    slab.view[4096:4100] = b"slab"
    assert bytes(slab.tensor[4096:4100].tolist()) == b"slab"
    slab.tensor[8191] = 7
    assert slab.view[8191] == 7
    assert slab.address == slab.tensor.data_ptr()


def test_a_slab_is_aligned_zeroed_and_of_the_length_asked_for() -> None:
    """Direct I/O needs pages; gaps between items need zeros."""
    slab = HostSlab(3 * 4096)
    assert slab.address % 4096 == 0
    assert slab.nbytes == len(slab.view) == slab.tensor.numel() == 3 * 4096
    assert slab.tensor.dtype == torch.uint8
    assert bytes(slab.view) == bytes(3 * 4096)
