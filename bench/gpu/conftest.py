"""What every bench here needs: a GPU, kernels compiled for it, and its clocks written down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.gpu.hardware import clocks
from bench.results import Suite


@pytest.fixture(autouse=True, scope="session")
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    triton_api = pytest.importorskip("gpudcp_kernels.triton_api", reason="Triton is not installed")
    if triton_api.IS_INTERPRETING:
        pytest.skip("this process interprets its kernels: unset TRITON_INTERPRET")


@pytest.fixture(autouse=True, scope="session")
def _no_figures_of_earlier_transfers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this user's transfers taught does not choose the way here, and nothing is added to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _clocks_are_noted(suite: Suite) -> Iterator[None]:
    """As they are found: nothing here changes a setting of the GPU."""
    before = clocks()
    yield
    suite.notes.append(f"clocks before: {before}; after: {clocks()}")
