"""Read a whole checkpoint with stock torch, in a process where gpudcp cannot be imported. Started by ``demo.py``.

Writes what it read, as one flat dict, with torch.save.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def empty_state(metadata: Metadata) -> dict[str, Any]:
    """A place for all that a checkpoint holds. Tensors are filled with 0xA5, which no load may leave there."""
    state: dict[str, Any] = {}
    for name, saved in metadata.state_dict_metadata.items():
        state[name] = None
        if isinstance(saved, TensorStorageMetadata):
            tensor = torch.empty(saved.size, dtype=saved.properties.dtype)
            tensor.reshape(-1).view(torch.uint8).fill_(0xA5)
            state[name] = tensor
    return state


def silence_single_process_note() -> None:
    """torch warns at every dcp call of a process without ranks that it is one; here that is what was asked for."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def forbid_gpudcp() -> None:
    """From here on every import of gpudcp fails, also one that unpickling would do."""
    for name in ("gpudcp", "gpudcp_kernels"):
        if name in sys.modules:
            raise RuntimeError(f"{name} is already imported")
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say: not importable
    try:
        import gpudcp  # noqa: F401
    except ImportError:
        return
    raise RuntimeError("gpudcp can still be imported")


def main() -> None:
    checkpoint, target = map(Path, sys.argv[1:])
    forbid_gpudcp()
    silence_single_process_note()
    state = empty_state(dcp.FileSystemReader(checkpoint).read_metadata())
    dcp.load(state, checkpoint_id=checkpoint)
    torch.save(state, target)


if __name__ == "__main__":
    main()
