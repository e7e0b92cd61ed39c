"""Directories that every contender finds in the same state."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

from bench import cache


def empty_directory(path: Path) -> Path:
    """Make it, without what was there; then nothing of an earlier turn is left for the disk to do."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    os.sync()
    return path


def touch_free_memory(nbytes: int) -> None:
    """Use as much free memory once, and give it back.

    A virtual machine returns free memory to its host, which takes it back page by page, at a tenth of the speed and for
    whoever has the next turn. After this, every contender that fills pages finds them there.
    """
    with mmap.mmap(-1, nbytes) as memory:
        for start in range(0, nbytes, mmap.PAGESIZE):
            memory[start] = 1


def need_cold_reads(path: Path) -> None:
    """Skip the bench where files cannot be brought out of the page cache."""
    probe = path / "cold"
    probe.write_bytes(bytes(1 << 20))
    try:
        cache.drop([probe])
    except cache.StillCachedError as err:
        pytest.skip(f"no cold reads here: {err}")
    finally:
        probe.unlink()


def need_room(path: Path, nbytes: int) -> None:
    """Skip the bench where ``nbytes`` and a tenth more do not fit."""
    free_nbytes = shutil.disk_usage(path).free
    if free_nbytes < 1.1 * nbytes:
        pytest.skip(f"needs {1.1 * nbytes / 2**30:.1f} GiB of room, {free_nbytes / 2**30:.1f} are free")
