"""Children for the exchange with stock torch: each is started once for all tests that look at what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpudcp

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


def run_child(script: str, *arguments: str, timeout_s: float) -> Any:
    """The JSON that a script beside this file prints as its last line."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "kernels"))),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, str(_HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{script}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def found_by_stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What stock torch, alone in its process, found different in checkpoints that gpudcp saved, by case."""
    import interop_cases

    directory = tmp_path_factory.mktemp("saved_by_gpudcp")
    for case, build in {**interop_cases.CASES, "shards": interop_cases.of_shards}.items():
        gpudcp.save(build(), directory / case)
    found: dict[str, list[str]] = run_child("stock_child.py", str(directory), timeout_s=120)
    return found


@pytest.fixture(scope="session")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """The directory in which four ranks went through all scenarios, and what went wrong, by scenario and rank."""
    directory = tmp_path_factory.mktemp("distributed")
    found: dict[str, dict[str, str]] = run_child("distributed_child.py", str(directory), timeout_s=300)
    return directory, found
