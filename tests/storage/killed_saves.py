"""Run in a process of its own: overwrite a checkpoint again and again, in children that are killed on the way.

Usage: killed_saves.py DIRECTORY. A child dies before its n-th system call, n = 1, 2, ... until one finishes. Prints
JSON: how many left the old checkpoint, how many the new one, and what was wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import storage_cases

import gpudcp

CALLS = ("open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "unlink", "close")
FINISHED, KILLED = 3, 4


class Killer:
    """Ends the process before the n-th call."""

    def __init__(self, countdown: int) -> None:
        self._countdown = countdown
        self._guard = threading.Lock()
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._guard:
                self._countdown -= 1
                if self._countdown == 0:
                    os._exit(KILLED)
            return real(*arguments, **keywords)

        return call


def overwrite(directory: Path, countdown: int) -> int:
    """Save in a child that dies before its n-th call; returns the child's exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Killer(countdown)
            gpudcp.save(storage_cases.state_of(2.0), directory, options=gpudcp.Options(slab_nbytes=65536))
            code = FINISHED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(directory: Path) -> dict[str, Any]:
    """All points in turn."""
    old, new = storage_cases.state_of(1.0), storage_cases.state_of(2.0)
    original = directory / "original"
    gpudcp.save(old, original)
    counts = {"old": 0, "new": 0, "finished": 0}
    problems: list[str] = []
    for countdown in range(1, 200):
        victim = directory / "victim"
        shutil.copytree(original, victim)
        code = overwrite(victim, countdown)
        found = storage_cases.load(victim)
        is_old, is_new = storage_cases.is_same(found, old), storage_cases.is_same(found, new)
        counts["old"] += is_old
        counts["new"] += is_new
        if not (is_old or is_new) or code not in (FINISHED, KILLED) or (code == FINISHED and not is_new):
            problems.append(f"killed at call {countdown} (exit code {code}): {storage_cases.names(victim)}")
        again = storage_cases.state_of(3.0)
        gpudcp.save(again, victim)
        if not storage_cases.is_same(storage_cases.load(victim), again) or len(storage_cases.names(victim)) != 2:
            problems.append(f"after call {countdown}: {storage_cases.names(victim)}")
        shutil.rmtree(victim)
        if code == FINISHED:
            counts["finished"] += 1
            break
    return {**counts, "problems": problems}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
