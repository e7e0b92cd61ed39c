"""How much memory one save or one load takes on top of the tensors themselves. Every figure is a process of its own.

The figure is the kernel's own high-water mark of the resident memory (VmHWM of /proc/self/status, set back by writing 5
to /proc/self/clear_refs) less the resident memory just before, with all tensors there and touched. So no peak is too
short to be seen. The page cache belongs to no process, except where a library maps its file (safetensors does, to
load): mapped pages count, though the kernel can take them back.

Before, the library has saved and loaded one small tensor: what it imports or allocates once does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from bench.peers import GPUDCP, PEERS, Peer
from bench.tensors import check_filled, llama_like, spoil

_ROOT = Path(__file__).parents[1]


def peak_extra_nbytes(peer: Peer, direction: str, directory: Path, *, nbytes: int, hidden: int) -> int:
    """Of one save of ``nbytes`` of a model into ``directory``, or of one load of it from there."""
    arguments = [peer.name, direction, directory, nbytes, hidden]
    child = subprocess.run(
        [sys.executable, "-m", "bench.peak_memory", *map(str, arguments)],
        cwd=_ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: int = json.loads(child.stdout)["peak_extra_nbytes"]
    return found


def _run(peer: Peer, direction: str, directory: Path, nbytes: int, hidden: int) -> int:
    with tempfile.TemporaryDirectory(dir=directory.parent) as warm_up:
        small = {"small": torch.zeros(1024)}
        peer.save(small, Path(warm_up))
        peer.load(small, Path(warm_up))
    tensors = llama_like(nbytes, hidden=hidden)
    if direction == "load":
        spoil(tensors)
    Path("/proc/self/clear_refs").write_text("5")
    before_nbytes = _status_nbytes("VmRSS")
    (peer.save if direction == "save" else peer.load)(tensors, directory)
    extra_nbytes = _status_nbytes("VmHWM") - before_nbytes
    if direction == "load":
        check_filled(tensors)
    return extra_nbytes


def _status_nbytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def main() -> None:
    name, direction, directory, nbytes, hidden = sys.argv[1:]
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    peer = next(peer for peer in (GPUDCP, *PEERS) if peer.name == name)
    extra_nbytes = _run(peer, direction, Path(directory), int(nbytes), int(hidden))
    print(json.dumps({"peak_extra_nbytes": extra_nbytes}))


if __name__ == "__main__":
    main()
