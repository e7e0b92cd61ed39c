"""The contract of an executor, and of those it works for: where tensors come from, where they go, which files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from gpudcp.chunkplan.load import LoadChunkPlan
from gpudcp.chunkplan.save import SaveChunkPlan, SaveFilePlan
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.report import Stopwatch


class SaveSource(Protocol):
    """Gives the tensors of a save, by position of their write item."""

    keeps_memory: bool
    """Whether a tensor's memory stays as it is until `Executor.save` returns; else only until the next `resolve`."""

    def resolve(self, position: int) -> torch.Tensor:
        """A tensor of the chunk's sizes, of the item's dtype or one that the executor casts to it.

        Called once each, and once more where another executor starts over, because a device ran out of memory.
        """


class LoadTarget(Protocol):
    """Takes the tensors of a load, by position of their read item. All calls come from the caller's own thread."""

    def device_of(self, position: int) -> torch.device | None:
        """Where the destination is, for an executor with several devices; None: nobody knows before `resolve`."""

    def resolve(self, position: int) -> torch.Tensor:
        """The destination, of the item's lengths. Called once each, just before the item's first byte is needed."""

    def commit(self, position: int, tensor: torch.Tensor) -> None:
        """Every byte of the item stands in ``tensor``, the one that `resolve` gave, and its checksum was right."""


class FileReceipt(NamedTuple):
    """A finished file of a save."""

    nbytes: int
    crcs: list[int | None]
    """CRC-32 of each write of the file's plan, in its order: of the payload, or of the literal; None: not computed."""


class Executor(Protocol):
    """Moves bytes as a plan says: same plan, same bytes, whichever executor."""

    name: str
    slab_nbytes: int
    """What plans for this executor are cut into: the largest single transfer, a multiple of 4096."""
    reads_large_apart: bool
    """Whether plans for this executor give a large chunk a read of its own."""
    checksum: str
    """What computes CRC-32, for the report."""

    def save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        """Write every file of the plan whole; on return all are finished. One receipt for every file of the plan."""

    def load(
        self,
        plan: LoadChunkPlan,
        target: LoadTarget,
        open_file: Callable[[str], FileReader],
        stopwatch: Stopwatch,
    ) -> None:
        """Read what the plan says into the target, checking checksums before `commit`.

        Raises:
            CorruptCheckpointError: a payload's CRC-32 is not the one in the plan.
        """
