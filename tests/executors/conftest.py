"""Every executor, in rings of several shapes, over every place for files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from executor_fakes import Files, MemoryBackend, PosixBackend

from gpudcp.executors.base import Executor
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.files.tune import supports_direct_io

EXECUTORS: dict[str, Callable[..., Executor]] = {"cpu": CpuExecutor}
"""A new executor joins the suite here."""


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


@pytest.fixture(params=RINGS, ids=lambda r: f"{r.executor}-{r.lanes}x{r.slab_nbytes}-{r.threads}threads")
def ring(request: pytest.FixtureRequest) -> Ring:
    """An executor with a ring of some shape."""
    ring: Ring = request.param
    return ring


@pytest.fixture
def rings(ring: Ring) -> list[Ring]:
    """All rings of the same executor."""
    return [other for other in RINGS if other.executor == ring.executor]


@pytest.fixture(params=["memory", "posix buffered", "posix direct"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """Recording files, of each backend."""
    if request.param == "memory":
        return Files(MemoryBackend())
    is_direct = request.param == "posix direct"
    if is_direct and not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    return Files(PosixBackend(tmp_path, is_direct=is_direct))
