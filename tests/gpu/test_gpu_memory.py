"""Device memory: how much a transfer takes, and what it does where there is hardly any. Nobody else may use the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_children import answer, started

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


def test_device_memory_taken_is_that_of_the_lanes(tmp_path: Path) -> None:
    """However large the state dict: lanes times slab, their margins, and tables of some MiB."""
    found = answer(started("memory_child.py", "bound", str(tmp_path)), timeout_s=180)
    print(found)
    assert found["differences"] == []
    # Each lane's margins are rounded up to the driver's 2 MiB; torch's allocator takes tables in segments of 20 MiB.
    assert found["lanes_nbytes"] <= found["taken_nbytes"] <= found["lanes_nbytes"] + 3 * 4 * MIB + 48 * MIB
    assert found["torch_peak_nbytes"] <= 32 * MIB
