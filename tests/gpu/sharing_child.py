"""Run in processes of their own: ranks with DTensors on one GPU save and load. Prints JSON: what was different.

Usage, with RANK and WORLD_SIZE set: sharing_child.py fsdp DIRECTORY (one rank, NCCL), or sharing_child.py gloo
DIRECTORY (several ranks; NCCL refuses two on one GPU).
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpu_cases import DEVICE
from gpu_states import bits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import gpudcp


def fsdp(directory: Path) -> list[str]:
    """Train a step, save, spoil, load, by gpudcp and by stock in turn; the optimizer's state too."""
    model, optimizer = _trained(seed=1)
    expected = _flat(_state(model, optimizer))
    gpudcp.save(_state(model, optimizer), directory / "gpudcp")
    dcp.save(_state(model, optimizer), checkpoint_id=directory / "stock")
    problems = []
    for load, name in ((gpudcp.load, "gpudcp"), (dcp.load, "gpudcp"), (gpudcp.load, "stock")):
        other_model, other_optimizer = _trained(seed=2)
        state = _state(other_model, other_optimizer)
        load(state, checkpoint_id=directory / name)
        set_state_dict(
            other_model,
            other_optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        found = _flat(_state(other_model, other_optimizer))
        problems += [
            f"{load.__module__} of {name}: {key}" for key in expected if not torch.equal(expected[key], found[key])
        ]
    return problems


def gloo(directory: Path) -> list[str]:
    """Rows saved, columns loaded, replicas written once, by ranks that share the device."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = DeviceMesh("cuda", torch.arange(world))
    full = torch.arange(480 * 64, dtype=torch.float32, device=DEVICE).view(480, 64)
    large = torch.arange(1 << 20, dtype=torch.float32, device=DEVICE).view(1024, 1024)

    def local(tensor: torch.Tensor, placement: Any) -> DTensor:
        part = tensor if isinstance(placement, Replicate) else tensor.chunk(world, placement.dim)[rank].clone()
        return DTensor.from_local(part, mesh, [placement], run_check=False)

    gpudcp.save({"sharded": local(full, Shard(0)), "replicated": local(large, Replicate())}, directory)
    blank_full, blank_large = torch.zeros_like(full), torch.zeros_like(large)
    places = {"sharded": local(blank_full, Shard(1)), "replicated": local(blank_large, Replicate())}
    gpudcp.load(dict(places), directory)
    expected = {"sharded": local(full, Shard(1)), "replicated": local(large, Replicate())}
    return [key for key in places if not torch.equal(places[key].to_local(), expected[key].to_local())]


def _trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(130, 130) for _ in range(3))).to(DEVICE)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 130, device=DEVICE)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def _flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        return {key: each for part in value for key, each in _flat(value[part], f"{name}.{part}").items()}
    if isinstance(value, DTensor):
        value = value.to_local()
    return {name: bits(value).clone()} if isinstance(value, torch.Tensor) else {}


if __name__ == "__main__":
    case, path = sys.argv[1], Path(sys.argv[2])
    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if case == "fsdp" else "gloo",
        init_method=f"file://{path}.store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=60),
    )
    print(json.dumps(fsdp(path) if case == "fsdp" else gloo(path)))
    dist.destroy_process_group()
