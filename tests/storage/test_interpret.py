"""Whole checkpoints by the device executor over host memory: the cpu executor's files, stock's, and those of stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from storage_cases import blank_state, data_files, flip_a_bit, is_same, load, state_of

import gpudcp
from gpudcp.errors import CorruptCheckpointError

INTERPRET: dict[str, Any] = {"executor": "interpret", "slab_nbytes": 65536, "lanes": 2}


@pytest.fixture
def interpreted(tmp_path: Path) -> Path:
    """A directory that holds ``state_of(1.0)``, saved by the device executor."""
    directory = tmp_path / "interpreted"
    writer = gpudcp.GpuStorageWriter(directory, options=gpudcp.Options(**INTERPRET))
    gpudcp.save(state_of(1.0), storage_writer=writer)
    assert writer.report is not None
    assert writer.report.executor == "interpret"
    return directory


def stock_load(directory: Path) -> dict[str, Any]:
    """What stock torch loads of a ``state_of``."""
    found = blank_state()
    dcp.load(found, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return found


def test_data_files_are_the_cpu_executors_byte_for_byte(interpreted: Path, tmp_path: Path) -> None:
    """Whatever the slabs of either."""
    gpudcp.save(state_of(1.0), tmp_path / "cpu", options=gpudcp.Options(executor="cpu", slab_nbytes=4096))
    assert [path.read_bytes() for path in data_files(interpreted)] == [
        path.read_bytes() for path in data_files(tmp_path / "cpu")
    ]


def test_what_was_saved_is_loaded_by_either_executor_and_by_stock(interpreted: Path) -> None:
    """Tensors in one slab and over several, a number and an object."""
    assert is_same(load(interpreted, executor="cpu"), state_of(1.0))
    assert is_same(load(interpreted, **INTERPRET), state_of(1.0))
    assert is_same(stock_load(interpreted), state_of(1.0))


def test_stocks_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Its payloads begin at any byte."""
    dcp.save(state_of(3.0), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert is_same(load(tmp_path, **INTERPRET), state_of(3.0))


@pytest.mark.parametrize("distance", [0, 119_999])
def test_a_flipped_bit_is_found(interpreted: Path, distance: int) -> None:
    """In the first slab of a payload or in its last one; the error names the tensor."""
    flip_a_bit(interpreted, "large", distance)
    with pytest.raises(CorruptCheckpointError, match="large") as told:
        load(interpreted, **INTERPRET)
    assert told.value.fqn == "large"


def test_a_save_casts_as_the_cpu_executor_does(tmp_path: Path) -> None:
    """To bfloat16: one NaN whatever it was, ties to even, and bytes alike."""
    bits = torch.arange(-3000, 3000, dtype=torch.int32) * 715_827 + 1
    state = {"weight": bits.view(torch.float32)}
    for executor in ("cpu", "interpret"):
        gpudcp.save(
            state,
            tmp_path / executor,
            planner=gpudcp.DefaultSavePlanner(dtype=torch.bfloat16),
            options=gpudcp.Options(executor=executor),  # type: ignore[arg-type]
        )
    (one,), (other,) = data_files(tmp_path / "cpu"), data_files(tmp_path / "interpret")
    assert one.read_bytes() == other.read_bytes()


def test_a_load_casts_as_the_cpu_executor_does(interpreted: Path) -> None:
    """Within the kernels' rule, and a narrowing that is torch's."""
    found = {}
    for executor in ("cpu", "interpret"):
        state = blank_state() | {
            "weight": torch.zeros(12, 10, dtype=torch.float64),
            "step": torch.zeros((), dtype=torch.int32),
        }
        gpudcp.load(state, interpreted, options=gpudcp.Options(executor=executor))  # type: ignore[arg-type]
        found[executor] = state
    assert is_same(found["interpret"], found["cpu"])
    assert torch.equal(found["interpret"]["weight"], state_of(1.0)["weight"].double())
    assert int(found["interpret"]["step"]) == 1


def test_an_overwrite_replaces_the_checkpoint(interpreted: Path) -> None:
    """The second save takes the lanes of the first."""
    gpudcp.save(state_of(2.0), interpreted, options=gpudcp.Options(**INTERPRET))
    assert is_same(load(interpreted, **INTERPRET), state_of(2.0))
    assert len(data_files(interpreted)) == 1
