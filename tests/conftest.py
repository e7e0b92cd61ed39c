"""Kernels run on the host: Triton's interpreter is switched on before the first of them is imported.

``TRITON_INTERPRET=0``, as `make test-gpu` sets it, runs them on a GPU.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _no_figures_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What earlier transfers of this user taught is not seen, and nothing is added to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
