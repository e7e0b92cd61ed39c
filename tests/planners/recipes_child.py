"""One of two ranks that save with recipes, under gpudcp's driver and storage and under torch's."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import gpudcp
from gpudcp.planners.recipes import (
    DDPLoadBalancingPlanner,
    MetaModelMaterialize,
    RenameLoadPlanner,
    RenameSavePlanner,
    SaveExtraDataPlanner,
)


def replicated_state() -> dict[str, Any]:
    """What both ranks have alike, as under DDP."""
    sizes = {"large": 50_000, "b": 30_000, "c": 15_000, "d": 5_000, "e": 100}
    tensors = {key: torch.arange(float(size)) + number for number, (key, size) in enumerate(sizes.items())}
    return {"model": tensors, "step": 7, "sharded": torch.arange(60.0).view(15, 4)}


def main(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=40))
    state = replicated_state()
    full = state["sharded"]
    mesh = init_device_mesh("cpu", (2,))
    state["sharded"] = distribute_tensor(full, mesh, [Shard(0)])
    planners = {
        "balanced": DDPLoadBalancingPlanner,
        "extra": lambda: SaveExtraDataPlanner(lambda: {"extra": {"epoch": 3}}),
        "renamed": lambda: RenameSavePlanner("net."),
    }
    for name, planner in planners.items():
        gpudcp.save(state, directory / "ours" / name, planner=planner())
        dcp.save(state, storage_writer=dcp.FileSystemWriter(directory / "torchs" / name), planner=planner())
    for storage in ("ours", "torchs"):
        for load in (gpudcp.load, dcp.load):
            blank = distribute_tensor(torch.zeros_like(full), mesh, [Shard(0)])
            found: dict[str, Any] = {"sharded": blank, "step": 0}
            load(found, checkpoint_id=directory / storage / "renamed", planner=RenameLoadPlanner("net."))
            assert torch.equal(found["sharded"].to_local(), state["sharded"].to_local())
            assert found["step"] == 7
            found = {"sharded": distribute_tensor(full.to("meta"), mesh, [Shard(0)])}
            load(found, checkpoint_id=directory / storage / "balanced", planner=MetaModelMaterialize("cpu"))
            assert torch.equal(found["sharded"].to_local(), state["sharded"].to_local())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort the interpreter on its way out (pytorch#190489)
