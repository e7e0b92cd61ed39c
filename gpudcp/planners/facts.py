"""What of a state dict decides the items of its plan, gathered at the speed of C: for plans that have not changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gpudcp._dcp import local_tensor_of, spec_of

PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
SIMPLE_TYPES = frozenset({int, float, str, bytes, bool, type(None)})

_SHAPE, _DTYPE, _LAYOUT, _MESH = map(attrgetter, ("shape", "dtype", "layout", "mesh"))
_REQUIRES_GRAD, _IS_NESTED = attrgetter("requires_grad"), attrgetter("is_nested")


class Facts(NamedTuple):
    """Equal facts are the same items. Of a value that is neither a tensor nor a DTensor only its type counts.

    A list for each fact rather than a tuple for each tensor: nothing is made for a tensor.
    """

    keys: list[str]
    kinds: list[type]
    specs: list[Any]
    """Of the DTensors."""
    meshes: set[int]
    """The very ones: equal ones need not place this process alike, as another rank it had another place."""
    shapes: list[torch.Size]
    """Of the DTensors' local tensors, then of the plain ones; dtypes too, and which are pinned."""
    dtypes: list[torch.dtype]
    require_grad: list[bool]
    """The DTensors themselves, then the plain ones."""
    are_pinned: list[bool]


def facts_of(state_dict: Mapping[str, Any], *, has_accelerator: bool) -> tuple[Facts, dict[str, torch.Tensor]] | None:
    """The facts, and the memory of each tensor by its key; None for a state dict with values that have to be asked.

    The facts hold no memory of the state dict.
    """
    keys, values = list(state_dict), list(state_dict.values())
    kinds = list(map(type, values))
    found = set(kinds)
    if not found <= _KNOWN_TYPES:
        return None
    distributed, plain = dict(zip(keys, values, strict=True)), {}
    if found != {DTensor}:
        distributed = {key: value for key, value, kind in zip(keys, values, kinds, strict=True) if kind is DTensor}
        plain = {key: value for key, value, kind in zip(keys, values, kinds, strict=True) if kind in PLAIN_TYPES}
    local = list(map(local_tensor_of, distributed.values()))
    if not set(map(type, local)) <= {torch.Tensor} or any(map(_IS_NESTED, plain.values())):
        return None
    if not set(map(_LAYOUT, plain.values())) <= {torch.strided}:
        return None
    tensors, specs = [*local, *plain.values()], list(map(spec_of, distributed.values()))
    facts = Facts(
        keys=keys,
        kinds=kinds,
        specs=specs,
        meshes=set(map(id, map(_MESH, specs))),
        shapes=list(map(_SHAPE, tensors)),
        dtypes=list(map(_DTYPE, tensors)),
        require_grad=list(map(_REQUIRES_GRAD, [*distributed.values(), *plain.values()])),
        # Without an accelerator nothing is.
        are_pinned=[tensor.is_pinned() for tensor in tensors] if has_accelerator else [],
    )
    return facts, dict(zip([*distributed, *plain], tensors, strict=True))


_KNOWN_TYPES = PLAIN_TYPES | SIMPLE_TYPES | {DTensor}
