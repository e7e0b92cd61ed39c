"""What kernels cost when a process launches them for the first time, shown apart from the transfer that pays for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from gpudcp_kernels.checksum import SMALL_NBYTES
from gpudcp_kernels.tables import ALIGNMENT_NBYTES, Boxes

from gpudcp.arrays import Int64
from gpudcp.report import Stopwatch

_launched: dict[torch.device, set[Hashable]] = {}


def first_launch_apart(stopwatch: Stopwatch, device: torch.device, *kernels: Hashable) -> AbstractContextManager[Any]:
    """Around launches: their time is the phase ``compile`` if one of these kernels is new to this process and device.

    Triton compiles then, or finds what it compiled in its cache on disk. The launches themselves are asynchronous.
    """
    launched = _launched.setdefault(device, set())
    if launched.issuperset(kernels):
        return nullcontext()
    launched.update(kernels)
    return stopwatch.phase("compile")


def packing(memory_dtype: torch.dtype, file_dtype: torch.dtype, boxes: Boxes) -> Iterator[Hashable]:
    """The kernels that pack boxes: those aligned on both sides have one of their own."""
    are_aligned = (boxes.addresses | boxes.byte_offsets) % ALIGNMENT_NBYTES == 0
    return (("pack", memory_dtype, file_dtype, bool(each)) for each in np.unique(are_aligned))


def unpacking(
    file_dtype: torch.dtype, memory_dtype: torch.dtype, boxes: Boxes, *, is_dense: bool
) -> Iterator[Hashable]:
    """The kernels that unpack boxes: which one depends on where a box begins, in memory and in the slab."""
    are_aligned = 2 * (boxes.addresses % ALIGNMENT_NBYTES == 0) + (boxes.byte_offsets % ALIGNMENT_NBYTES == 0)
    return (("unpack", file_dtype, memory_dtype, is_dense, int(each)) for each in np.unique(are_aligned))


def checksumming(nbytes: Int64) -> Iterator[Hashable]:
    """The kernels that checksum ranges of so many bytes: small ones have one of their own."""
    return (("checksum", bool(each)) for each in np.unique(nbytes <= SMALL_NBYTES))
