"""Every executor, in rings of several shapes, over every place for files."""

from __future__ import annotations

from pathlib import Path

import pytest
from executor_fakes import Files, MemoryBackend, PosixBackend
from executor_rings import RINGS, Ring

from gpudcp.files.tune import supports_direct_io


@pytest.fixture(params=RINGS, ids=lambda r: f"{r.executor}-{r.lanes}x{r.slab_nbytes}-{r.threads}threads")
def ring(request: pytest.FixtureRequest) -> Ring:
    """An executor with a ring of some shape."""
    ring: Ring = request.param
    return ring


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The cpu executor shows all rings over all places for files. Interpreted, each ring has one: it takes too long."""
    places = {"interpret-2x8192": "memory", "interpret-1x4096": "posix buffered"}
    left_out = [
        item
        for item in items
        for ring, place in places.items()
        if ring in item.name and place not in item.name and ("memory" in item.name or "posix" in item.name)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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
