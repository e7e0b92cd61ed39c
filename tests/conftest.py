"""Kernels run on the host: Triton's interpreter is switched on before the first of them is imported.

``TRITON_INTERPRET=0``, as `make test-gpu` sets it, runs them on a GPU. Besides: a disk that is small.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _no_figures_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What earlier transfers of this user taught is not seen, and nothing is added to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 192 KiB: room for one checkpoint, not for two."""
    at = tmp_path / "disk"
    at.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "none", at], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", at], check=True)
