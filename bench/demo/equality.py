"""Are two state dicts the same, byte for byte? Compares bits: no tolerance, and a NaN equals itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

Flat = dict[str, Any]


def flatten_full(state: Mapping[str, Any]) -> Flat:
    """Dotted names, as a checkpoint has them, to whole CPU tensors and objects. Collective where there are DTensors."""
    return {name: _full(value) for name, value in _walk(state, "")}


def find_differences(expected: Flat, found: Flat) -> list[str]:
    """One line for each name that is missing, unexpected or different. Empty: the two are equal."""
    lines = [f"{name}: missing" for name in expected.keys() - found.keys()]
    lines += [f"{name}: unexpected" for name in found.keys() - expected.keys()]
    lines += [
        f"{name}: different" for name in expected.keys() & found.keys() if not _is_same(expected[name], found[name])
    ]
    return sorted(lines)


def count_nbytes(state: Flat) -> int:
    """Bytes of all tensors."""
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def count_tensors(state: Flat) -> int:
    """How many of the values are tensors; the rest are objects."""
    return sum(isinstance(value, torch.Tensor) for value in state.values())


def _walk(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        name = f"{prefix}{key}"
        # A list of dicts is a level of names in a checkpoint (param_groups); any other list is one object.
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _walk(value, f"{name}.")
        else:
            yield name, value


def _full(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    # A copy: the training goes on and would change what was remembered.
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _is_same(expected: Any, found: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return type(expected) is type(found) and bool(expected == found)
    return (
        isinstance(found, torch.Tensor)
        and (expected.dtype, expected.shape) == (found.dtype, found.shape)
        and torch.equal(_bits(expected), _bits(found))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
