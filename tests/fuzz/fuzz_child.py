"""Run in a process of its own: parse mutated inputs under a bound on memory and time, where no code may run.

Usage: fuzz_child.py DIRECTORY SEED INPUTS TARGET... Prints a line of JSON for each target: how many inputs were taken
and refused. Before each input its number, over all targets, goes to DIRECTORY/progress: so it is known which one ended
the process.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import signal
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import mutations
from fuzz_targets import Target, attempt, target

MORE_NBYTES = 128 << 20
"""Memory beyond what the process has when it begins: the bound of every input here, at most 2 MB long, is less, but for
libraries that are loaded late."""
INPUT_LIMIT_S = 20
_HARMFUL = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "sys.", "tempfile.", "webbrowser.")
_HARMLESS = ("os.listdir", "os.scandir", "sys._getframe", "sys.unraisablehook", "os.getxattr")


def input_of(name: str, seed: int, number: int, seeds: list[bytes]) -> bytes:
    """The same bytes for the same numbers."""
    return mutations.mutated(Random(f"{name} {seed} {number}"), seeds)


class Watch:
    """Ends the process when a parser does what only code does."""

    def __init__(self) -> None:
        self.is_on = False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event in _HARMLESS:
            return
        is_write = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if is_write or event.startswith(_HARMFUL):
            os.write(2, f"code was run: {event} {arguments!r}\n".encode())
            os._exit(7)


def bound_memory() -> None:
    """A MemoryError for whoever asks for more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_NBYTES, hard))


def warm_up(fuzzed: Target) -> None:
    """What is imported at the first use is imported."""
    for data in fuzzed.seeds:
        attempt(fuzzed, data)


def fuzz(name: str, seed: int, ninputs: int, fuzzed: Target, progress: mmap.mmap, begin: int) -> dict[str, Any]:
    """Parse mutated inputs of one target."""
    counts = {"target": name, "taken": 0, "refused": 0}
    for number in range(ninputs):
        progress[:8] = (begin + number).to_bytes(8, "little")
        data = input_of(name, seed, number, fuzzed.seeds)
        # Ends the process, also in the middle of C code.
        signal.setitimer(signal.ITIMER_REAL, INPUT_LIMIT_S)
        counts["taken" if attempt(fuzzed, data) else "refused"] += 1  # type: ignore[operator]
    signal.setitimer(signal.ITIMER_REAL, 0)
    return counts


def main(directory: Path, seed: int, ninputs: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    targets = [target(name, directory) for name in names]
    for fuzzed in targets:
        warm_up(fuzzed)
    with (directory / "progress").open("w+b") as file:
        file.truncate(8)
        progress = mmap.mmap(file.fileno(), 8)
    bound_memory()
    watch = Watch()
    for place, (name, fuzzed) in enumerate(zip(names, targets, strict=True)):
        watch.is_on = True
        counts = fuzz(name, seed, ninputs, fuzzed, progress, place * ninputs)
        watch.is_on = False
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
