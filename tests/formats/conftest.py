"""What the format tests share: a bound on memory while hostile bytes are read."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

MORE_NBYTES = 1 << 30


@pytest.fixture(scope="module")
def bounded_memory() -> Iterator[None]:
    """One GiB more than now, at most: a pickle that asks for a larger memo gets a MemoryError, not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_NBYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
