"""Walking over state dicts, and giving their meta tensors memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gpudcp._dcp import ShardedTensor
from gpudcp.errors import PlanError
from gpudcp.planners.values import local_tensor

_T = TypeVar("_T")


def iterate_state_dict(
    state_dict: _T,
    *,
    dtensor: Callable[[DTensor], Any],
    sharded_tensor: Callable[[ShardedTensor], Any],
    tensor: Callable[[torch.Tensor], Any],
) -> _T:
    """Replace every tensor, by its kind, with what a function makes of it: in place in dicts and lists.

    A tuple with a replaced value in it is replaced by a new one of its type. Everything else stays as it is; torch
    replaces values of types that it does not know by None.

    Returns:
        ``state_dict`` itself; of a tensor or a tuple, what stands in for it.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, DTensor):
            return dtensor(value)
        if isinstance(value, ShardedTensor):
            return sharded_tensor(value)
        if isinstance(value, torch.Tensor):
            return tensor(value)
        if isinstance(value, dict | list):
            for key, old in value.items() if isinstance(value, dict) else enumerate(value):
                if (new := visit(old)) is not old:
                    value[key] = new
        elif isinstance(value, tuple):
            parts = [visit(part) for part in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    visited: _T = visit(state_dict)
    return visited


def init_state_dict(state_dict: Any, device: torch.device | str | None = None) -> None:
    """Give every meta tensor of a state dict uninitialised memory, in place. A tensor under two names stays one.

    Args:
        state_dict: nested dicts, lists and tuples.
        device: where; by default, what `materialized` chooses.

    Raises:
        PlanError: a ShardedTensor is on the meta device.
    """
    # By identity; each with the tensor that it replaces, so that no other one gets its id.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def give_memory(value: torch.Tensor) -> torch.Tensor:
        if value.device.type != "meta":
            return value
        if id(value) not in made:
            made[id(value)] = value, materialized(value, device)
        return made[id(value)][1]

    def refuse_meta(value: ShardedTensor) -> ShardedTensor:
        if getattr(value, "device", None) == torch.device("meta"):
            raise PlanError("a ShardedTensor on the meta device cannot be given memory: use a DTensor")
        return value

    iterate_state_dict(state_dict, dtensor=give_memory, sharded_tensor=refuse_meta, tensor=give_memory)


def materialized(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """A tensor like this one, sizes, strides, dtype and placements, with uninitialised memory; no Parameter.

    Args:
        tensor: on any device, meta as a rule; of a DTensor, this rank's part is made, evenly sharded or not.
        device: where. By default, a DTensor goes to its mesh's kind of device, and a plain tensor to the process
            group's, the CPU where it has several or there is none; of a kind with several, to the current one.
    """
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device or _current(_group_device_type()))
    local = torch.empty_like(local_tensor(tensor), device=device or _current(tensor.device_mesh.device_type))
    return DTensor.from_local(
        local,
        device_mesh=tensor.device_mesh,
        placements=tensor.placements,
        run_check=False,
        # Uneven shards: the whole cannot be told from one of them.
        shape=tensor.size(),
        stride=tensor.stride(),
    )


def _current(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def _group_device_type() -> str:
    if not (dist.is_available() and dist.is_initialized()):
        return "cpu"
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return "cpu" if "cpu" in kinds else kinds[0]
