"""SIGKILL at any instant of an overwrite leaves the old checkpoint or the new one, whole; other ranks hear of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PHASES = ("plan", "write", "fsync", "rename", "clean-up")


@pytest.mark.slow
@pytest.mark.parametrize(("nranks", "instants"), [(1, 44), (2, 30)])
def test_every_kill_is_survived(tmp_path: Path, nranks: int, instants: int) -> None:
    """The group's timeout is ten minutes: a rank that waited for it would not end in time."""
    script = Path(__file__).with_name("sigkilled_saves.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(nranks), str(instants)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["slowest_s"] < 10
    left = found["left"]
    assert all(left[phase]["killed"] >= 25 for phase in PHASES), left
    assert all(left[phase]["old"] + left[phase]["new"] == instants for phase in PHASES)
    assert nranks > 1 or sum(left[phase]["killed"] for phase in PHASES) >= 200, left
    # Old before the rename, new after it: both happen.
    assert left["write"]["old"] == left["write"]["killed"]
    assert left["rename"]["old"] > 0
    assert left["rename"]["new"] > 0
    assert left["clean-up"]["new"] == instants
