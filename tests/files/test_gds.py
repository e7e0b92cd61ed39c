"""Whether GPUDirect Storage can work is asked in a child, which may crash or hang; reasons come with remedies."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpudcp.files import gds, gds_child
from gpudcp.files.gds import ProbeFailed, ask_child, gds_obstacles, kvikio_obstacles, unavailable_reason

WORKING: dict[str, Any] = {
    "cuda": {"error": None, "init": 0, "ndevices": 8},
    "nvidia_fs": {"version": "version: 2.25", "nnodes": 16, "are_nodes_open_to_us": True},
    "p2pdma": {"kernel": False, "driver": False, "cufile": False},
    "is_udev_readable": True,
    "is_compat_forced": False,
    "kvikio": {"error": None, "version": "26.10.00", "compat_mode": "AUTO", "is_compat_preferred": False},
    "cufile_error": None,
}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for function in (gds._obstacles, gds.machine_facts):
        function.cache_clear()
    yield
    for function in (gds._obstacles, gds.machine_facts):
        function.cache_clear()


def facts_with(**changed: Any) -> dict[str, Any]:
    """A machine where everything works, but for this; dicts are changed by key."""
    facts = copy.deepcopy(WORKING)
    for name, value in changed.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    return facts


def on_machine(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any] | Exception) -> None:
    """KvikIO is installed, and the child says this."""

    def answer() -> dict[str, Any]:
        if isinstance(facts, Exception):
            raise facts
        return facts

    answer.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(gds, "machine_facts", answer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_where_everything_works_nothing_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the way that the bytes go is named."""
    on_machine(monkeypatch, WORKING)
    assert unavailable_reason("gds") is None
    assert unavailable_reason("kvikio") is None
    assert gds.transport() == "nvidia-fs"


def test_p2pdma_is_the_other_way_to_gds_and_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel module is needed then; a kernel that does not show its configuration may have it."""
    for kernel in (True, None):
        facts = facts_with(nvidia_fs={"version": None}, p2pdma={"kernel": kernel, "driver": True, "cufile": True})
        gds._obstacles.cache_clear()
        on_machine(monkeypatch, facts)
        assert unavailable_reason("gds") is None
        assert gds.transport() == "PCI P2PDMA"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kvikio": {"error": "ImportError: libkvikio.so"}}, "KvikIO does not import (ImportError: libkvikio.so)"),
        ({"cuda": {"error": "libcuda.so.1: cannot open"}}, "install the NVIDIA driver"),
        ({"cuda": {"init": 100}}, "cuInit answers error 100: see whether nvidia-smi works"),
        ({"cuda": {"ndevices": 0}}, "no device: see CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_keeps_kvikio_from_working_keeps_gds_from_working_too(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    """The first obstacle alone: those behind it cannot be seen yet."""
    on_machine(monkeypatch, facts_with(**changed))
    for kind in ("gds", "kvikio"):
        reason = unavailable_reason(kind)
        assert reason is not None
        assert said in reason
        assert reason.endswith("use Options(files='auto') or 'posix'")
    assert gds.transport() == ""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cufile_error": "libcufile.so.0: cannot open"}, "pip install nvidia-cufile"),
        ({"nvidia_fs": {"version": None}}, "modprobe nvidia-fs"),
        ({"nvidia_fs": {"nnodes": 0, "are_nodes_open_to_us": False}}, "pass the nodes into the container"),
        ({"nvidia_fs": {"are_nodes_open_to_us": False}}, "is not open to this user"),
        ({"is_compat_forced": True}, "unset CUFILE_FORCE_COMPAT_MODE"),
        ({"is_udev_readable": False}, "-v /run/udev:/run/udev:ro"),
        ({"kvikio": {"compat_mode": "ON", "is_compat_preferred": True}}, "unset KVIKIO_COMPAT_MODE"),
        ({"kvikio": {"is_compat_preferred": True}}, "try KVIKIO_COMPAT_MODE=OFF"),
    ],
)
def test_what_keeps_gds_from_working_leaves_kvikio_its_compat_mode(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], said: str
) -> None:
    """Each obstacle with what to do about it."""
    on_machine(monkeypatch, facts_with(**changed))
    reason = unavailable_reason("gds")
    assert reason is not None
    assert said in reason
    assert reason.endswith("use Options(files='auto') or 'posix'")
    assert unavailable_reason("kvikio") is None


def test_all_obstacles_to_gds_are_named_at_once() -> None:
    """One trip to whoever looks after the machine, not four."""
    facts = facts_with(
        nvidia_fs={"version": None, "nnodes": 0},
        is_udev_readable=False,
        cufile_error="gone",
        kvikio={"is_compat_preferred": True},
    )
    assert kvikio_obstacles(facts) == []
    found = gds_obstacles(facts)
    assert len(found) == 3
    assert "PCI P2PDMA, which lacks a kernel with CONFIG_PCI_P2PDMA, RMForceStaticBar1=1" in found[1]


def test_without_kvikio_no_child_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most machines; the remedy is its name."""

    def fail() -> None:
        raise AssertionError("asked")

    fail.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(gds, "machine_facts", fail)
    reason = unavailable_reason("gds")
    assert reason is not None
    assert "pip install kvikio-cu13" in reason


def test_a_probe_that_failed_is_a_reason_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error: `auto` falls back."""
    on_machine(monkeypatch, ProbeFailed("the probe did not answer"))
    assert unavailable_reason("kvikio") == "the probe did not answer; or use Options(files='auto') or 'posix'"


def test_the_machine_is_asked_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the reasons are."""
    asked: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(gds, "ask_child", lambda script, **_: asked.append(script) or WORKING)
    for kind in ("gds", "kvikio", "gds"):
        assert unavailable_reason(kind) is None
    assert [os.path.basename(script) for script in asked] == ["gds_child.py"]


# --- the child -------------------------------------------------------------------------------------------------------


def script(directory: Path, text: str) -> str:
    """A script for the child."""
    path = directory / "child_script.py"
    path.write_text(text)
    return str(path)


def test_the_last_line_is_the_answer_whatever_stands_before_it(tmp_path: Path) -> None:
    """Libraries talk while they load."""
    assert ask_child(script(tmp_path, 'print("hello")\nprint(\'{"a": [1]}\')'), time_limit_s=30) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit('no such luck')", r"ended with status 1 \(no such luck\)"),
        ("import os; os.abort()", "ended with status -6"),
        ("print('well')", "nothing that can be read"),
        ("print('[1]')", "nothing that can be read"),
        ("", "nothing that can be read"),
    ],
)
def test_a_child_that_crashes_or_talks_nonsense_is_a_failed_probe(tmp_path: Path, text: str, said: str) -> None:
    """This process lives on."""
    with pytest.raises(ProbeFailed, match=said):
        ask_child(script(tmp_path, text), time_limit_s=30)


def test_a_child_that_hangs_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    """Asked to end it would not."""
    text = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(__file__ + ".pid", "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""
    path = script(tmp_path, text)
    with pytest.raises(ProbeFailed, match="did not answer within 1 s"):
        ask_child(path, time_limit_s=1)
    if os.path.exists(path + ".pid"):  # not yet written where the machine is very busy
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(path + ".pid").read_text()), 0)


def test_the_child_imports_from_where_this_process_does_and_not_from_beside_the_script(tmp_path: Path) -> None:
    """Beside our script lies a kvikio.py that is no kvikio."""
    (tmp_path / "kvikio.py").write_text("where = 'beside the script'")
    path = script(tmp_path, "import json, sys; print(json.dumps({'path': sys.path}))")
    assert ask_child(path, time_limit_s=30) == {"path": sys.path}


def test_the_real_child_answers_with_every_fact() -> None:
    """On any machine; what it says is the machine's own business."""
    found = ask_child(gds_child.__file__, time_limit_s=60)
    assert set(found) == set(WORKING)
    for name, value in WORKING.items():
        if isinstance(value, dict):
            assert set(found[name]) == set(value)
    assert isinstance(kvikio_obstacles(found) + gds_obstacles(found), list)


def test_the_child_makes_no_cuda_context(tmp_path: Path) -> None:
    """It calls two functions of a driver's library that has no others: neither makes a context."""
    if (gcc := shutil.which("gcc")) is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(
        "int cuInit(unsigned flags) { return flags; } int cuDeviceGetCount(int *count) { *count = 3; return 0; }"
    )
    subprocess.run([gcc, "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", gds._RUN_FILE, json.dumps([each for each in sys.path if each]), gds_child.__file__],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["cuda"] == {"error": None, "init": 0, "ndevices": 3}


@pytest.mark.parametrize(
    ("text", "variable", "is_set"),
    [
        ('{"properties": {"use_pci_p2pdma" : true}}', None, True),
        ('{"properties": {"use_pci_p2pdma" : false}}', None, False),
        ('{"properties": {\n// "use_pci_p2pdma": true\n}}', None, False),
        ('{"properties": {"use_pci_p2pdma" : true}}', "false", False),
        ("{}", "true", True),
        ("{}", None, False),
    ],
)
def test_cufiles_settings_are_read_as_cufile_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, variable: str | None, is_set: bool
) -> None:
    """The environment goes before the file; the file has comments."""
    (tmp_path / "cufile.json").write_text(text)
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "cufile.json"))
    monkeypatch.delenv("CUFILE_USE_PCIP2PDMA", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUFILE_USE_PCIP2PDMA", variable)
    assert gds_child._p2pdma()["cufile"] is is_set
