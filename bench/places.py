"""Directories that every contender finds in the same state."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def empty_directory(path: Path) -> Path:
    """Make it, without what was there; then nothing of an earlier turn is left for the disk to do."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    os.sync()
    return path


def need_room(path: Path, nbytes: int) -> None:
    """Skip the bench where ``nbytes`` and a tenth more do not fit."""
    free_nbytes = shutil.disk_usage(path).free
    if free_nbytes < 1.1 * nbytes:
        pytest.skip(f"needs {1.1 * nbytes / 2**30:.1f} GiB in {path}, {free_nbytes / 2**30:.1f} are free")
