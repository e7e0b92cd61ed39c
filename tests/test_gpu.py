"""Tensors on a GPU, saved and loaded through host slabs by the cpu executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import gpudcp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _state(device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {
        "large": torch.randn(3000, 1000),
        "strided": torch.randn(700, 900).t(),
        "bf16": torch.randn(1 << 20).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "int": torch.arange(100_003),
    }
    return {fqn: tensor.to(device) for fqn, tensor in state.items()}


def test_cuda_tensors_are_saved_as_stock_saves_them(tmp_path: Path) -> None:
    """Stock torch loads, on the CPU, what was on the GPU."""
    gpudcp.save(_state("cuda"), tmp_path)
    loaded = {fqn: torch.zeros_like(tensor) for fqn, tensor in _state("cpu").items()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert all(torch.equal(loaded[fqn], tensor) for fqn, tensor in _state("cpu").items())


def test_a_stock_checkpoint_is_loaded_into_cuda_tensors(tmp_path: Path) -> None:
    """Bytes reach the device whatever strides and dtypes the destinations have."""
    dcp.save(_state("cpu"), checkpoint_id=tmp_path)
    loaded = {fqn: torch.zeros_like(tensor) for fqn, tensor in _state("cuda").items()}
    gpudcp.load(loaded, tmp_path)
    assert all(torch.equal(loaded[fqn].cpu(), tensor) for fqn, tensor in _state("cpu").items())


def test_a_tensor_still_being_computed_is_saved_as_it_will_be(tmp_path: Path) -> None:
    """The save waits for the work that the caller has queued on its stream."""
    tensor = torch.ones(1 << 22, device="cuda")
    for _ in range(64):
        tensor = tensor * 1.0001
    gpudcp.save({"tensor": tensor}, tmp_path)
    loaded = {"tensor": torch.zeros(1 << 22)}
    gpudcp.load(loaded, tmp_path)
    assert torch.equal(loaded["tensor"], tensor.cpu())
