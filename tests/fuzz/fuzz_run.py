"""Fuzz the targets in a child. As a program: fuzz_run.py [INPUTS [SEED]], 100,000 inputs in all by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fuzz_child
from fuzz_targets import NAMES, target

_HERE = Path(__file__).parent


def fuzz(*names: str, ninputs: int, seed: int, directory: Path) -> list[dict[str, Any]]:
    """Parse that many mutated inputs of each target; returns how many of them were taken and refused.

    Raises:
        AssertionError: one of them ended the process, or raised what no parser may; it is left in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    child = subprocess.run(
        [sys.executable, str(_HERE / "fuzz_child.py"), str(directory), str(seed), str(ninputs), *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_HERE), *sys.path)))},
        check=False,
    )
    if child.returncode:
        place, number = divmod(int.from_bytes((directory / "progress").read_bytes(), "little"), ninputs)
        data = fuzz_child.input_of(names[place], seed, number, target(names[place], directory / "again").seeds)
        (found := directory / f"{names[place]}-{seed}-{number}").write_bytes(data)
        raise AssertionError(f"input {number} of {names[place]}, {found}: exit {child.returncode}\n{child.stderr}")
    return [json.loads(line) for line in child.stdout.splitlines()]


def main(ninputs: int = 100_000, seed: int = 0) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for counts in fuzz(*NAMES, ninputs=-(-ninputs // len(NAMES)), seed=seed, directory=directory):
        print(counts)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
