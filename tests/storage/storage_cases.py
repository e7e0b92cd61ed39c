"""Small checkpoints to save, to look into and to damage."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

import gpudcp

LOCK = ".gpudcp.lock"


def state_of(number: float) -> dict[str, Any]:
    """Two tensors, of which one is larger than a small slab, a scalar and an object; all bytes depend on ``number``."""
    return {
        "weight": torch.arange(120.0).view(12, 10) + number,
        "large": torch.arange(30_000, dtype=torch.int32).view(100, 300) + int(number),
        "step": torch.tensor(number, dtype=torch.float64),
        "note": f"number {number}",
    }


def blank_state() -> dict[str, Any]:
    """Destinations for `state_of`."""
    tensors = {key: torch.zeros_like(value) for key, value in state_of(0.0).items() if isinstance(value, torch.Tensor)}
    return {**tensors, "note": ""}


def load(directory: Path, **options: Any) -> dict[str, Any]:
    """What gpudcp loads of such a state."""
    found = blank_state()
    gpudcp.load(found, directory, options=gpudcp.Options(**options))
    return found


def is_same(state: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two such states hold the same bits."""
    return list(state) == list(expected) and all(
        torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
        if isinstance(value, torch.Tensor)
        else value == expected[key]
        for key, value in state.items()
    )


def names(directory: Path) -> set[str]:
    """Everything in the directory."""
    return {path.name for path in directory.iterdir()}


def check_settled(directory: Path) -> None:
    """``state_of(1.0)`` is whole, nothing is left beside it, and the next save succeeds."""
    assert is_same(load(directory), state_of(1.0))
    assert len(names(directory)) == 2
    gpudcp.save(state_of(5.0), directory)
    assert is_same(load(directory), state_of(5.0))
    assert len(names(directory)) == 2


def data_files(directory: Path) -> list[Path]:
    """The data files in the directory, by name."""
    return sorted(directory.glob("*.distcp"))


def metadata_of(directory: Path, name: str = ".metadata") -> Metadata:
    """What stock torch would read."""
    metadata: Metadata = pickle.loads((directory / name).read_bytes())
    return metadata


def rewrite_metadata(directory: Path, change: Callable[[Metadata], None]) -> None:
    """Change the metadata and write it as stock torch does."""
    metadata = metadata_of(directory)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def record_of(metadata: Metadata, fqn: str) -> Any:
    """The storage record of the only item of ``fqn``."""
    (record,) = [record for index, record in metadata.storage_data.items() if index.fqn == fqn]
    return record


def flip_a_bit(directory: Path, fqn: str, distance: int = 0, *, from_payload: bool = True) -> None:
    """Flip a bit of an item: of the byte at ``distance`` from its payload's start, or from its own start."""
    record = record_of(metadata_of(directory), fqn)
    path = directory / record.relative_path
    data = bytearray(path.read_bytes())
    start = record.gpudcp[0] if from_payload else record.offset
    assert start is not None
    assert record.offset <= start + distance < record.offset + record.length
    data[start + distance] ^= 1
    path.write_bytes(data)
