"""Small checkpoints that are all of one number, and what a directory holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import gpudcp


def state_of(number: int) -> dict[str, Any]:
    """Two tensors of more than a small slab each, a small one and an object, of which every part depends on it."""
    return {
        "weight": torch.arange(6000, dtype=torch.int32) * number,
        "large": torch.full((100, 100), float(number)),
        "step": torch.tensor(number),
        "note": f"number {number}",
    }


def save(number: int, directory: Path, **options: Any) -> None:
    """Save a state in slabs of a page, so that every file takes several writes."""
    gpudcp.save(state_of(number), directory, options=gpudcp.Options(slab_nbytes=8192, **options))


def number_in(directory: Path, **options: Any) -> int:
    """The number whose checkpoint the directory holds, bit for bit."""
    found = {key: torch.zeros_like(value) if key != "note" else "" for key, value in state_of(0).items()}
    gpudcp.load(found, directory, options=gpudcp.Options(slab_nbytes=8192, **options))
    number = int(found["step"])
    for key, value in state_of(number).items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    return number


def names(directory: Path) -> set[str]:
    """Everything in the directory."""
    return {path.name for path in directory.iterdir()}
