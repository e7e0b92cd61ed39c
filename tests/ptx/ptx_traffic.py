"""Which sectors of 32 bytes the warps of a launch ask the GPU's memory for: how well their accesses are coalesced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SECTOR_NBYTES = 32

_recording: list[Traffic] = []


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of every instruction that loaded or stored global memory."""

    _asked: list[tuple[str, npt.NDArray[Any]]] = field(default_factory=list)
    """The opcode, and the sectors of each warp."""

    def nbytes(self, opcode: str, tensor: torch.Tensor) -> int:
        """Of the sectors of a tensor, each as often as an instruction of a warp asked for it."""
        first = tensor.data_ptr() // SECTOR_NBYTES
        last = (tensor.data_ptr() + tensor.nbytes - 1) // SECTOR_NBYTES
        return SECTOR_NBYTES * sum(
            int(((first <= sectors) & (sectors <= last)).sum()) for name, sectors in self._asked if name == opcode
        )

    def add(self, opcode: str, warps: npt.NDArray[Any], addresses: npt.NDArray[Any]) -> None:
        """One instruction, by each of its threads; an access is aligned, so it lies in one sector."""
        _, sectors = np.unique(np.stack((warps, addresses // SECTOR_NBYTES)), axis=1)
        self._asked.append((opcode, sectors))


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What kernels do meanwhile."""
    _recording.append(Traffic())
    try:
        yield _recording[-1]
    finally:
        _recording.pop()


def note(opcode: str, warps: npt.NDArray[Any], addresses: npt.NDArray[Any]) -> None:
    for each in _recording:
        each.add(opcode, warps, addresses)
