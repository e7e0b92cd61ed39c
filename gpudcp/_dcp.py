"""The only room for private torch.distributed names: each is checked here, at import, and used under a public name.

Tried with torch 2.11.0 and 2.13.0. A torch whose private names changed fails here with one clear sentence, not in
mid-save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors as flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element, traverse_state_dict_v_2_3
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gpudcp.errors import PlanError

__all__ = [
    "ExtensionRegistry",
    "ItemExtras",
    "ShardedTensor",
    "StorageInfo",
    "StreamTransformExtension",
    "dtensor_parts",
    "dtensor_with_local",
    "flatten_as_torch_2_3",
    "flatten_sharded_tensors",
    "flatten_state_dict",
    "group_timeout",
    "item_extras",
    "local_box",
    "local_tensor_of",
    "new_gloo_group",
    "set_element",
    "spec_of",
    "storage_info",
]

_EXPECTED_FIELDS = ["relative_path", "offset", "length", "transform_descriptors"]

if [field.name for field in dataclasses.fields(StorageInfo)] != _EXPECTED_FIELDS:
    raise ImportError(
        f"torch {torch.__version__}: the checkpoint's per-item storage record has the fields "
        f"{[field.name for field in dataclasses.fields(StorageInfo)]}, this gpudcp knows {_EXPECTED_FIELDS}; "
        "upgrade gpudcp, or use a torch that it names in its README"
    )


def local_box(tensor: DTensor) -> tuple[torch.Size, torch.Size] | None:
    """Offsets and sizes, in elements, of what this rank holds of a DTensor; None on a rank outside of its mesh.

    Raises:
        PlanError: it holds rows that do not lie side by side: torch gives the box of the first ones and their number.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:
        return None
    for dim, placement in enumerate(placements):
        # A strided shard, which FSDP makes of what is sharded already; the shards to its right put it right again.
        factor = getattr(placement, "split_factor", 1)
        to_the_right = [
            mesh.size(other)
            for other in range(dim + 1, len(placements))
            if getattr(placements[other], "dim", None) == getattr(placement, "dim", None)
        ]
        if mesh.size(dim) > 1 and factor not in (1, prod(to_the_right)):
            raise PlanError(
                f"a DTensor with placements {placements} on a mesh of {mesh.shape}: no box describes a shard"
            )
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return torch.Size(offsets), torch.Size(sizes)


def dtensor_parts(tensor: DTensor) -> tuple[torch.Tensor, Any]:
    """This rank's local tensor, and the spec, without the autograd function that ``to_local`` is."""
    local = tensor._local_tensor
    if type(local) is not torch.Tensor and isinstance(local, AsyncCollectiveTensor):
        local = local.wait()  # the result, which it has memory for from the start
    return local, tensor._spec


local_tensor_of, spec_of = attrgetter("_local_tensor"), attrgetter("_spec")
"""The same two of a DTensor, the local tensor as it is; for ``map``, at the speed of C."""


def dtensor_with_local(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """The same part of the same tensor, in other memory, which need not be on the mesh's devices."""
    make: Any = DTensor
    made: DTensor = make(local, tensor._spec, requires_grad=tensor.requires_grad)
    return made


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long the group's collectives wait; None: torch does not say."""
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


def new_gloo_group(ranks: Sequence[int], name: str, timeout: timedelta | None) -> dist.ProcessGroup:
    """A gloo group of these ranks, in this order, made by them alone.

    `dist.new_group` is for all ranks of the world together or, with ``use_local_synchronization``, goes by how many
    groups a rank is in, and so waits for ever where one is in more than another.

    Args:
        ranks: global ones; this process's is among them.
        name: the same on all of them, and that of no other group.
        timeout: of its collectives; None: torch's default.
    """
    world: Any = distributed_c10d._world
    _, store = world.pg_map[world.default_pg]
    make: Any = distributed_c10d._new_process_group_helper
    group: dist.ProcessGroup
    group, _ = make(
        len(ranks),
        list(ranks).index(dist.get_rank()),
        list(ranks),
        dist.Backend("gloo"),
        store,
        name,
        timeout=timeout or distributed_c10d.default_pg_timeout,
    )
    world.pg_group_ranks[group] = {rank: number for number, rank in enumerate(ranks)}
    return group


def flatten_as_torch_2_3(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """`flatten_state_dict` as torch 2.3 and before had it: dicts without tensors stay whole."""
    flat: dict[str, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}

    def visit(path: tuple[Any, ...], value: Any) -> None:
        fqn = ".".join(map(str, path))
        flat[fqn], paths[fqn] = value, path

    traverse_state_dict_v_2_3(state_dict, visit)
    return flat, paths


class ItemExtras(NamedTuple):
    """What our own checkpoints hold of an item beside stock's record; all None in stock's."""

    payload_offset: int | None
    """First byte, in the file, of a payload that is the chunk's elements, row-major. None: find it in the item."""
    dtype: torch.dtype | None
    """Of that payload."""
    crc32: int | None
    """Of that payload or, where there is none, of the whole item. None: not computed."""


def storage_info(relative_path: str, offset: int, length: int, extras: ItemExtras) -> StorageInfo:
    """The record that ``.metadata`` holds of one item, in bytes of its file.

    The extras ride along as attributes, which stock torch neither knows nor minds.
    """
    info = StorageInfo(relative_path, offset, length)
    info.__dict__.update(gpudcp=tuple(extras))
    return info


def item_extras(info: StorageInfo) -> ItemExtras:
    """The extras of a record, wherever it comes from.

    Raises:
        ValueError: they are not what this package writes.
    """
    values = info.__dict__.get("gpudcp")
    if values is None:
        return _NO_EXTRAS
    if type(values) is not tuple or len(values) != 3:
        raise ValueError(f"{values!r} are no item extras")
    payload_offset, dtype, crc32 = values
    if type(payload_offset) is type(crc32) is int and payload_offset >= 0 <= crc32 and type(dtype) is torch.dtype:
        return tuple.__new__(ItemExtras, values)  # nearly always, and at half the cost
    for number in (payload_offset, crc32):
        if not (number is None or (type(number) is int and number >= 0)):
            raise ValueError(f"{values!r} are no item extras")
    if (payload_offset is None) != (dtype is None) or not isinstance(dtype, torch.dtype | None):
        raise ValueError(f"{values!r} are no item extras")
    return ItemExtras(payload_offset, dtype, crc32)


_NO_EXTRAS = ItemExtras(None, None, None)
