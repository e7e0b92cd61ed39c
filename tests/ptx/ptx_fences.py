"""Memory of the host with a fence on both sides, and who touches one: byte by byte, as compute-sanitizer finds it."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ptx_instructions import PtxError

_ALIGNMENT_NBYTES = 512  # of what torch allocates on a GPU
_FENCE_NBYTES = 4096

_fences: dict[int, int] = {}
"""Where each begins and ends. None overlap."""


def fenced_copy(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, around which no kernel may read or write."""
    memory = np.empty(tensor.nbytes + 2 * _FENCE_NBYTES + _ALIGNMENT_NBYTES, np.uint8)
    begin = memory.ctypes.data
    start = -(-(begin + _FENCE_NBYTES) // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
    end = start + tensor.nbytes
    _fences.update({start - _FENCE_NBYTES: start, end: end + _FENCE_NBYTES})
    weakref.finalize(memory, _remove, start - _FENCE_NBYTES, end)
    flat = torch.from_numpy(memory[start - begin : end - begin])
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _remove(*begins: int) -> None:
    for begin in begins:
        del _fences[begin]


def check(addresses: npt.NDArray[Any], nbytes: int) -> None:
    """Raises PtxError where so many bytes from one of the addresses on touch a fence."""
    begins = np.array(sorted(_fences), np.int64)
    ends = np.array([_fences[begin] for begin in begins.tolist()], np.int64)
    last = np.searchsorted(begins, addresses + nbytes) - 1  # that begins before the access ends
    touches = (last >= 0) & (addresses < np.append(ends, 0)[last])
    if touches.any():
        begin = int(begins[last[touches][0]])
        raise PtxError(f"{nbytes} bytes {int(addresses[touches][0]) - begin} after the beginning of a fence")
