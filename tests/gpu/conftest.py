"""Everything here needs one GPU, and kernels compiled for it: elsewhere it is skipped, with the reason.

`make test-ptx` runs the tests of kernels alone, marked ptx, on the host.
"""

from __future__ import annotations

import pytest
import torch

triton_api = pytest.importorskip("gpudcp_kernels.triton_api", reason="Triton is not installed")


RUNS_PTX = triton_api.ON_HOST and not triton_api.IS_INTERPRETING


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu() -> None:
    if RUNS_PTX:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if triton_api.IS_INTERPRETING:
        pytest.skip("this process interprets its kernels: run `make test-gpu`, which sets TRITON_INTERPRET=0")


@pytest.fixture(autouse=True)
def _leaves_no_error_behind() -> None:
    """A wrong access of an earlier test must not be taken for one of the next."""
    if not RUNS_PTX:
        torch.cuda.synchronize()
