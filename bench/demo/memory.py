"""How much memory one save or one load takes on top of the tensors themselves. Each is a process of its own.

The figure: the process' anonymous and shared memory (RssAnon + RssShmem of /proc/<pid>/status), its largest value while
the call runs less its value just before, read from outside about every half millisecond. Pages that are mapped from a
file are not counted: the kernel can take them back at any time. Before, the library has saved and loaded one small
tensor, so that what it imports or allocates once does not count.
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from libraries import Library, by_name
from stock import silence_single_process_note
from weights import places_for, read_weights

CHILD_LIMIT_S = 60.0
SAMPLE_INTERVAL_S = 0.0005


class MemoryProbeError(RuntimeError):
    """The measured process failed or took too long; what it wrote to stderr is on the terminal."""


def measure_peak_extra_nbytes(library: Library, direction: str, directory: Path) -> int:
    """Run one save into, or one load from, ``directory`` in a process of its own and watch its memory."""
    with _child(library.name, direction, directory) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        _expect(child.stdout.readline(), "ready", library, direction)
        before = peak = _resident_nbytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], SAMPLE_INTERVAL_S)[0]:
            peak = max(peak, _resident_nbytes(child.pid))
        _expect(child.stdout.readline(), "done", library, direction)
    return peak - before


@contextmanager
def _child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        # A killed child closes its output, which ends every wait of the parent.
        limit = threading.Timer(CHILD_LIMIT_S, child.kill)
        limit.start()
        try:
            yield child
        finally:
            child.kill()
            limit.cancel()


def _expect(line: str, word: str, library: Library, direction: str) -> None:
    if line.strip() != word:
        raise MemoryProbeError(f"{direction} with {library.name}: the measured process said {line!r}, not {word!r}")


def _resident_nbytes(pid: int) -> int:
    kilobytes = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024


def _run_child(library: Library, direction: str, directory: Path) -> None:
    silence_single_process_note()
    small = {"small": torch.zeros(1024)}
    with tempfile.TemporaryDirectory(dir=directory.parent) as warm_up:
        library.save(small, Path(warm_up))
        library.load(small, Path(warm_up))
    weights = read_weights()
    # The weights stay alive beside the places: freed memory that the load takes up again would not be seen.
    tensors = weights if direction == "save" else places_for(weights)
    print("ready", flush=True)
    sys.stdin.readline()
    (library.save if direction == "save" else library.load)(tensors, directory)
    print("done", flush=True)
    sys.stdin.readline()  # stays as it is until the parent has seen enough


if __name__ == "__main__":
    _run_child(by_name(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
