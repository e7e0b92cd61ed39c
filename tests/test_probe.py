"""`probe` says what works here and why the rest does not, and does nothing else."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

import gpudcp
from gpudcp.files import filesystems, gds
from gpudcp.formats import checksum


def test_the_cpu_executor_and_posix_files_work_everywhere(tmp_path: Path) -> None:
    """What every fallback ends in."""
    found = gpudcp.probe(tmp_path)
    assert found["cpu"].is_available
    assert found["posix"].is_available
    assert found.torch == torch.__version__


def test_what_does_not_work_has_a_reason_that_ends_with_the_remedy() -> None:
    """The same text that asking for it by name raises."""
    found = gpudcp.probe()
    for field, name in (("executor", "cuda"), ("executor", "interpret"), ("files", "gds"), ("files", "kvikio")):
        if not found[name].is_available:
            assert f"Options({field}='auto')" in found[name].reason


def test_every_backend_that_options_can_name_is_listed() -> None:
    """And nothing that is not known."""
    names = [capability.name for capability in gpudcp.probe().capabilities]
    assert set(names) == {"cpu", "cuda", "interpret", "gds", "kvikio", "posix", "direct", "isal"}
    assert len(names) == 8
    with pytest.raises(KeyError):
        gpudcp.probe()["floppy"]


@pytest.mark.parametrize(
    ("gds_reason", "kvikio_reason", "said"),
    [
        ("gds: no; or do", "kvikio: no; or do", ("gds: no; or do", "kvikio: no; or do")),
        ("gds: no; or do", None, ("gds: no; or do", "device memory in compat mode: POSIX calls through pinned memory")),
        (None, None, ("GPUDirect Storage over nvidia-fs", "device memory")),
    ],
)
def test_gds_and_kvikio_are_what_the_machine_says(
    monkeypatch: pytest.MonkeyPatch, gds_reason: str | None, kvikio_reason: str | None, said: tuple[str, str]
) -> None:
    """KvikIO without GPUDirect Storage is its compat mode, and is called so."""
    reasons = {"gds": gds_reason, "kvikio": kvikio_reason}
    monkeypatch.setattr(gds, "unavailable_reason", reasons.__getitem__)
    monkeypatch.setattr(gds, "transport", lambda: "nvidia-fs")
    found = gpudcp.probe()
    for name, start in zip(reasons, said, strict=True):
        assert found[name].is_available == (reasons[name] is None)
        assert found[name].reason.startswith(start)


def test_direct_io_is_tried_where_the_checkpoint_would_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the directory's, and its file system is named."""
    assert gpudcp.probe(tmp_path)["direct"].is_available == filesystems.supports_direct_io(str(tmp_path))
    monkeypatch.setattr(importlib.import_module("gpudcp.probe"), "supports_direct_io", lambda _: False)
    refused = gpudcp.probe(tmp_path)["direct"]
    assert not refused.is_available
    assert str(tmp_path) in refused.reason
    assert filesystems.file_system_type(str(tmp_path)) in refused.reason


def test_a_directory_that_will_be_made_is_judged_by_where_it_will_be(tmp_path: Path) -> None:
    """As a checkpoint's is before the first save; the default is the current one."""
    there = gpudcp.probe(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "absent" / "step-10"):
        assert gpudcp.probe(path)["direct"] == there["direct"]
        assert gpudcp.probe(path)["posix"].is_available
    assert gpudcp.probe("")["posix"].is_available


def test_what_is_no_directory_takes_no_checkpoint(tmp_path: Path) -> None:
    """Neither way; the reason names it."""
    path = tmp_path / "file"
    path.touch()
    for name in ("posix", "direct"):
        for asked in (path, path / "below"):
            found = gpudcp.probe(asked)[name]
            assert not found.is_available
            assert found.reason.startswith(f"{path} is no directory: ")


def test_everything_has_a_reason() -> None:
    """What it is used for, or why it is not there."""
    assert all(capability.reason for capability in gpudcp.probe().capabilities)


def test_the_checksum_library_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """With zlib the reason says what to install."""
    assert gpudcp.probe()["isal"].is_available == (checksum.LIBRARY == "isal")
    monkeypatch.setattr(checksum, "LIBRARY", "zlib")
    assert gpudcp.probe()["isal"].reason.endswith("pip install isal")
    monkeypatch.setattr(checksum, "LIBRARY", "isal")
    assert gpudcp.probe()["isal"].is_available


def test_the_text_has_one_line_for_each(tmp_path: Path) -> None:
    """For people."""
    found = gpudcp.probe(tmp_path)
    lines = str(found).splitlines()
    assert lines[0] == f"Python {found.python}, torch {torch.__version__}"
    assert len(lines) == 1 + len(found.capabilities)
    for line, capability in zip(lines[1:], found.capabilities, strict=True):
        assert line.startswith("yes" if capability.is_available else "no")
        assert capability.name in line
        assert capability.reason in line


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    """No file, and no open one."""
    before = len(os.listdir("/proc/self/fd"))
    gpudcp.probe(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
