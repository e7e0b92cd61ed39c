"""The real KvikIO under our files, on machines without a GPU: a stub of the CUDA driver calls host memory a device's.

The stub is built for the test. KvikIO runs its compat mode over it: its own code opens, writes, reads and refuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.kvikio,
    pytest.mark.skipif(importlib.util.find_spec("kvikio") is None, reason="KvikIO is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler to build the stub driver with"),
]

_HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child found, in a process of its own: the loader reads its path when a process starts."""
    libraries, directory = tmp_path_factory.mktemp("stub"), tmp_path_factory.mktemp("files")
    source, library = _HERE / "stub_driver" / "libcuda_stub.c", libraries / "libcuda.so.1"
    # Without warnings: the stub declares of the driver's functions only the parameters that it uses.
    flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)
    path = os.pathsep.join(filter(None, (str(_HERE), *sys.path)))
    searched = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    done = subprocess.run(
        [sys.executable, str(_HERE / "kvikio_child.py"), str(directory)],
        env={**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": searched, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_device_and_host_memory_make_one_file(found: dict[str, Any]) -> None:
    """Registered memory by base and offset, more than a bounce buffer at once, host memory beside it."""
    assert found["is_written_right"]


def test_device_memory_is_read_whole_and_in_part_from_a_file_whose_name_is_gone(found: dict[str, Any]) -> None:
    """At block offsets, of any length."""
    assert found["is_read_right"]
    assert found["is_part_right"]


def test_a_read_past_the_end_and_one_of_a_closed_file_are_errors_with_numbers(found: dict[str, Any]) -> None:
    """KvikIO raises a RuntimeError without a path."""
    path, byte_offset, expected_nbytes, is_by_kvikio = found["past_the_end"]
    assert os.path.basename(path) == "file"
    assert (byte_offset, expected_nbytes, is_by_kvikio) == ((20 << 20) + 4096, 4096, True)
    assert found["is_closed"]


def test_a_trial_calls_compat_mode_by_its_name(found: dict[str, Any]) -> None:
    """There is no GPUDirect Storage under a stub."""
    assert found["trial"] == [False, "KvikIO in compat mode: POSIX calls through pinned memory"]


def test_defaults_of_the_process_are_left_as_found(found: dict[str, Any]) -> None:
    """Compat mode, where it is asked for one file, is put back."""
    assert found["asked_for"] == "ON"
    assert found["changed"] == []


def test_the_probe_sees_the_stub_for_what_it_is(found: dict[str, Any]) -> None:
    """A library that loads, and a cuInit that finds no device."""
    for reason in found["reasons"]:
        assert reason.startswith("cuInit answers error 100")


def test_nothing_is_left_behind(found: dict[str, Any]) -> None:
    """No file, and no open one."""
    assert found["left"] == []
    assert found["open"] == []
