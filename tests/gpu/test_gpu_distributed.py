"""Ranks and DTensors on one GPU: FSDP2 over NCCL, and several ranks that share the device over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from gpu_children import answer, started

pytestmark = pytest.mark.gpu


def test_an_fsdp2_model_and_its_optimizer_make_the_round_trip(tmp_path: Path) -> None:
    """By gpudcp, and each way with stock; AdamW's steps are on the host."""
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    child = started("sharing_child.py", "fsdp", str(tmp_path / "fsdp"), RANK="0", WORLD_SIZE="1")
    assert answer(child, timeout_s=180) == []


def test_ranks_that_share_a_gpu_reshard_on_load(tmp_path: Path) -> None:
    """Rows were saved, columns are loaded; replicas are written once, in pieces."""
    children = [
        started("sharing_child.py", "gloo", str(tmp_path / "gloo"), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)
    ]
    assert [answer(child, timeout_s=180) for child in children] == [[], []]
