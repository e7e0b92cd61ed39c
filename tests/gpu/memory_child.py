"""Run in a process of its own: save and load on a device that is nearly full, or see how much memory they take.

Usage: memory_child.py full DIRECTORY MIB_LEFT cold|warm, or memory_child.py bound DIRECTORY own|defaults. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from gpu_cases import DEVICE
from gpu_states import blank, differences, load, save

from gpudcp.executors.devicememory import allocate

_MIB = 1 << 20
_GRAIN_NBYTES = 2 * _MIB  # the driver hands out memory in pages of this size


def full(directory: Path, mib_left: int, *, is_warm: bool) -> dict[str, Any]:
    """A round trip of 96 MiB with so much device memory left. Warm: with kernels that were used before."""
    state = {f"{n}": torch.randn((8 << 20) // 4 + n, device=DEVICE) for n in range(12)} | {"step": torch.tensor(1.0)}
    state["cast"] = state["0"].to(torch.bfloat16)[1:]
    places = blank(state)
    if is_warm:
        save(state, directory / "warm", executor="cuda", lanes=1, slab_nbytes=_MIB)
        load(places, directory / "warm", executor="cuda", lanes=1, slab_nbytes=_MIB)
        places = blank(state)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    ballast, most_nbytes = [], torch.cuda.mem_get_info(DEVICE)[0]
    while (free_nbytes := torch.cuda.mem_get_info(DEVICE)[0]) >= mib_left * _MIB + _GRAIN_NBYTES:
        most_nbytes = min(most_nbytes, (free_nbytes - mib_left * _MIB) // 2)
        nbytes = max(_GRAIN_NBYTES, most_nbytes // _GRAIN_NBYTES * _GRAIN_NBYTES)
        try:
            ballast.append(allocate(nbytes, torch.device("cuda", 0)))
        except torch.OutOfMemoryError:
            if nbytes == _GRAIN_NBYTES:
                break
            most_nbytes = nbytes // 2
    free_nbytes = torch.cuda.mem_get_info(DEVICE)[0]
    reports = [str(save(state, directory / "full")), str(load(places, directory / "full"))]
    return {"free_nbytes": free_nbytes, "reports": reports, "differences": differences(state, places)}


def bound(directory: Path, options: dict[str, int]) -> dict[str, Any]:
    """How much less memory is free while 1 GiB is saved and loaded, at most; sampled, and for torch's share exact.

    By default also with tensors of the host in every slab, which go through the device.
    """
    state = {f"{n}": torch.randn(_MIB, device=DEVICE if options or n % 2 else "cpu") for n in range(256)}
    places = blank(state)
    save(state, directory / "first", executor="cuda", lanes=1, slab_nbytes=_MIB)
    load(places, directory / "first", executor="cuda", lanes=1, slab_nbytes=_MIB)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free_nbytes, allocated_nbytes = torch.cuda.mem_get_info(DEVICE)[0], torch.cuda.memory_allocated()
    least_free_nbytes, is_over = free_nbytes, threading.Event()

    def watch() -> None:
        nonlocal least_free_nbytes
        while not is_over.wait(0.001):
            least_free_nbytes = min(least_free_nbytes, torch.cuda.mem_get_info(DEVICE)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    save(state, directory / "bound", executor="cuda", **options)
    load(places, directory / "bound", executor="cuda", **options)
    is_over.set()
    watcher.join()
    return {
        "lanes_nbytes": options.get("lanes", 4) * options.get("slab_nbytes", 32 * _MIB),
        "taken_nbytes": free_nbytes - least_free_nbytes,
        "torch_peak_nbytes": torch.cuda.max_memory_allocated() - allocated_nbytes,
        "differences": differences(state, places),
    }


if __name__ == "__main__":
    case, path = sys.argv[1], Path(sys.argv[2])
    if case == "bound":
        found = bound(path, {"lanes": 3, "slab_nbytes": 16 * _MIB} if sys.argv[3] == "own" else {})
    else:
        found = full(path, int(sys.argv[3]), is_warm=sys.argv[4] == "warm")
    print(json.dumps(found))
