"""What of a state dict decides the items of its plan, gathered at the speed of C: for plans that have not changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gpudcp._dcp import dtensor_facts

PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
SIMPLE_TYPES = frozenset({int, float, str, bytes, bool, type(None)})
_TENSOR_FACTS = attrgetter("shape", "dtype", "requires_grad", "layout")
_IS_NESTED = attrgetter("is_nested")


class Facts(NamedTuple):
    """Equal facts are the same items. Of a value that is neither a tensor nor a DTensor only its type counts."""

    keys: tuple[str, ...]
    kinds: list[type]
    of_dtensors: list[tuple[Any, ...]]
    of_tensors: list[tuple[Any, ...]]
    """Of plain tensors and of the DTensors' local ones."""
    are_pinned: list[bool]


def facts_of(state_dict: Mapping[str, Any], *, has_accelerator: bool) -> tuple[Facts, dict[str, torch.Tensor]] | None:
    """The facts, and the memory of each tensor by its key; None for a state dict with values that have to be asked."""
    kinds = list(map(type, state_dict.values()))
    if not set(kinds) <= _KNOWN_TYPES:
        return None
    dtensors = [value for kind, value in zip(kinds, state_dict.values(), strict=True) if kind is DTensor]
    found = list(map(dtensor_facts, dtensors))
    local_tensors = [facts[0] for facts in found]
    if not set(map(type, local_tensors)) <= {torch.Tensor}:
        return None
    locals_of = iter(local_tensors)
    tensors = {
        key: next(locals_of) if kind is DTensor else value
        for kind, (key, value) in zip(kinds, state_dict.items(), strict=True)
        if kind not in SIMPLE_TYPES
    }
    if any(map(_IS_NESTED, tensors.values())):  # it has no shape
        return None
    facts = Facts(
        keys=tuple(state_dict),
        kinds=kinds,
        of_dtensors=[facts[1:] for facts in found],
        of_tensors=list(map(_TENSOR_FACTS, tensors.values())),
        # Without an accelerator nothing is.
        are_pinned=[tensor.is_pinned() for tensor in tensors.values()] if has_accelerator else [],
    )
    return facts, tensors


_KNOWN_TYPES = PLAIN_TYPES | SIMPLE_TYPES | {DTensor}
