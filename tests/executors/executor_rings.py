"""The executors of the conformance suite, in rings of several shapes. A new executor joins the suite here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpudcp.executors.base import Executor
from gpudcp.executors.cpu import CpuExecutor

EXECUTORS: dict[str, Callable[..., Executor]] = {"cpu": CpuExecutor}


@dataclass(frozen=True)
class Ring:
    """An executor with so many slabs of such a size, and so many threads."""

    executor: str
    lanes: int
    threads: int
    slab_nbytes: int

    def make(self, *, has_checksum: bool = True) -> Executor:
        return EXECUTORS[self.executor](lanes=self.lanes, threads=self.threads, has_checksum=has_checksum)


RINGS = [
    Ring(name, lanes, threads, slab_nbytes)
    for name in EXECUTORS
    for lanes, threads, slab_nbytes in ((1, 1, 4096), (2, 3, 8192), (4, 2, 4096), (3, 1, 1 << 20))
]
