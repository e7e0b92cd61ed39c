"""Device memory: how much a transfer takes, and what it does where there is hardly any. Nobody else may use the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_children import answer, started

from gpudcp.executors.devicememory import allocate, pin
from gpudcp.executors.slabs import HostSlab

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.mark.parametrize("kernels", ["warm", "cold"])
@pytest.mark.parametrize("mib_left", [200, 90, 24, 2])
def test_a_full_device_slows_a_transfer_and_never_fails_it(tmp_path: Path, mib_left: int, kernels: str) -> None:
    """Room for all lanes, for some, for smaller slabs, for none: then the cpu executor. The bytes are the same."""
    found = answer(started("memory_child.py", "full", str(tmp_path), str(mib_left), kernels), timeout_s=180)
    print(f"{found['free_nbytes'] / MIB:.0f} MiB were free:", *found["reports"], sep="\n")
    assert found["free_nbytes"] <= (mib_left + 8) * MIB
    assert found["differences"] == []


def test_memory_that_cannot_be_pinned_leaves_no_error_for_the_next_launch() -> None:
    """Twice is once too often; torch takes what was pinned once for what it is."""
    slab = HostSlab(MIB)
    pin(slab, DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        pin(slab, DEVICE)
    assert slab.tensor.is_pinned()
    assert int(torch.ones(3, device=DEVICE).sum()) == 3


@pytest.mark.parametrize("nbytes", [4096, MIB, 3 * MIB, 32 * MIB + 12288])
def test_device_memory_begins_on_a_page_of_its_own(nbytes: int) -> None:
    """cuFile knows an allocation by its first byte."""
    memory = [allocate(nbytes, DEVICE) for _ in range(3)]
    assert [tensor.data_ptr() % (2 * MIB) for tensor in memory] == [0, 0, 0]
    assert {tensor.nbytes for tensor in memory} == {nbytes}


@pytest.mark.parametrize("options", ["own", "defaults"])
def test_device_memory_taken_is_that_of_the_lanes(tmp_path: Path, options: str) -> None:
    """However large the state dict: lanes times slab, their margins, and tables of some MiB; 256 MiB by default."""
    found = answer(started("memory_child.py", "bound", str(tmp_path), options), timeout_s=180)
    print(found)
    assert found["differences"] == []
    # Each lane's margins are rounded up to the driver's 2 MiB; torch's allocator takes tables in segments of 20 MiB.
    assert found["lanes_nbytes"] <= found["taken_nbytes"]
    if options == "own":
        assert found["taken_nbytes"] <= found["lanes_nbytes"] + 3 * 4 * MIB + 48 * MIB
        assert found["torch_peak_nbytes"] <= 32 * MIB
    else:
        assert found["taken_nbytes"] <= 256 * MIB
