"""Stock torch, in a process where gpudcp cannot be imported, reads what gpudcp saved."""

from __future__ import annotations

from pathlib import Path

import interop_cases
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import gpudcp
from gpudcp.errors import PlanError


def test_gpudcp_cannot_be_imported_where_stock_reads(found_by_stock: dict[str, list[str]]) -> None:
    """The child has no gpudcp, neither found nor loaded."""
    assert found_by_stock["blocked"] == []


@pytest.mark.parametrize("case", interop_cases.CASES)
def test_stock_reads_every_value_bit_for_bit(found_by_stock: dict[str, list[str]], case: str) -> None:
    """All dtypes, views, nested values, objects and Stateful objects come back as they were."""
    assert found_by_stock[case] == []


def test_stock_reads_every_shard_of_other_meshes(found_by_stock: dict[str, list[str]]) -> None:
    """DTensors on six meshes, loaded rank by rank, hold their slices of what was saved whole."""
    assert found_by_stock["resharded"] == []


@pytest.mark.parametrize("case", ["nesting", "dtypes"])
def test_stock_reads_into_an_empty_state_dict_and_converts(found_by_stock: dict[str, list[str]], case: str) -> None:
    """The load from keys and dcp_to_torch_save rebuild the whole state dict."""
    assert found_by_stock[f"{case}_from_nothing"] == []


def test_every_dtype_of_torch_is_saved_or_quantized_or_refused() -> None:
    """No dtype escapes the lists of these tests: a new one in torch is taken for a plain one, and tried."""
    named = {*interop_cases.SUB_BYTE_NAMES, *interop_cases.QUANTIZED_NAMES, *interop_cases.BITS_NAMES}
    assert named <= {str(dtype).removeprefix("torch.") for dtype in interop_cases.every_dtype()}
    assert {torch.bool, torch.uint64, torch.complex32, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2} <= {
        *interop_cases.plain_dtypes()
    }


def save_and_load_by_stock(state: dict[str, torch.Tensor], path: Path) -> None:
    dcp.save(state, checkpoint_id=path)
    dcp.load(state, checkpoint_id=path)


@pytest.mark.parametrize("name", [*interop_cases.SUB_BYTE_NAMES, *interop_cases.BITS_NAMES])
def test_a_dtype_that_stock_cannot_read_back_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Stock fails on save or on load; gpudcp refuses at once, names tensor and dtype, and leaves no checkpoint."""
    dtype = getattr(torch, name)
    tensor = torch.empty(4, dtype=dtype)
    with pytest.raises(CheckpointException):
        save_and_load_by_stock({"weight": tensor}, tmp_path / "stock")

    with pytest.raises(PlanError, match=rf"weight: dtype torch\.{name} cannot be saved"):
        gpudcp.save({"weight": tensor}, tmp_path / "ours")
    assert [*(tmp_path / "ours").iterdir()] == []
