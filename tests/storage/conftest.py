"""A checkpoint to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import storage_cases

import gpudcp


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that holds ``state_of(1.0)``."""
    directory = tmp_path / "checkpoint"
    gpudcp.save(storage_cases.state_of(1.0), directory)
    return directory
