"""Directories that every contender finds in the same state."""

from __future__ import annotations

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
