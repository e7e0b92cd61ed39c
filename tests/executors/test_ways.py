"""The way to the files: KvikIO only where a trial shows that it works, and figures of the memory that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors import ways
from gpudcp.executors.ways import choose_files
from gpudcp.files.figures import Direction, Figure, Way, place_of, write_figures
from gpudcp.files.trial import DeviceIO
from gpudcp.options import Options

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ways, "figures_name", lambda gpu: "cpu" if gpu is None else "some GPU")
    monkeypatch.setattr(ways, "allocate", lambda nbytes, _: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(ways, "supports_direct_io", lambda _: True)
    ways._trial_memory.cache_clear()


def with_kvikio(monkeypatch: pytest.MonkeyPatch, trial: DeviceIO | str) -> None:
    """KvikIO is installed, and a trial transfer goes so, or fails so."""

    def tried(*_: Any, **__: Any) -> DeviceIO:
        if isinstance(trial, str):
            raise BackendUnavailableError(trial)
        return trial

    monkeypatch.setattr(ways.gds, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(ways, "try_device_io", tried)


def measured(directory: Path, device: str, direction: Direction = "write", **gb_per_s: float) -> None:
    """What `gpudcp.tune` found there."""
    figures = [
        Figure(direction=direction, way=way, threads=4, request_nbytes=1 << 20, gb_per_s=speed, ntransfers=1)  # type: ignore[arg-type]
        for way, speed in gb_per_s.items()
    ]
    assert write_figures(place_of(str(directory), device), "tuned", figures)


def way_of(directory: Path, direction: Any = "write", gpu: torch.device | None = GPU, **options: Any) -> Way:
    return choose_files(Options(**options), str(directory), direction, *([] if gpu is None else [gpu])).way


def test_auto_asks_for_no_trial_that_would_leave_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has had KvikIO measured there; whoever names a backend asks for it."""
    asked: list[bool] = []

    def tried(*_: Any, is_asked_for: bool) -> DeviceIO:
        asked.append(is_asked_for)
        return DeviceIO(False, "a trial")

    with_kvikio(monkeypatch, "")
    monkeypatch.setattr(ways, "try_device_io", tried)
    measured(tmp_path, "some GPU", direct=1.0)
    way_of(tmp_path)
    way_of(tmp_path, files="kvikio")
    measured(tmp_path, "some GPU", direct=1.0, compat=1.0)
    way_of(tmp_path)
    assert asked == [False, True, True]


def test_a_gpu_without_room_for_a_trial_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """POSIX files take over, and the report says why; by name it is an error of ours."""

    def no_room(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("cuda:0: cuMemAlloc of 2097152 bytes: CUDA driver error 2")

    with_kvikio(monkeypatch, DeviceIO(True, "a trial"))
    monkeypatch.setattr(ways, "allocate", no_room)
    choice = choose_files(Options(), str(tmp_path), "write", GPU)
    assert choice.way in ("direct", "buffered")
    assert "KvikIO failed: no room for a trial: cuda:0: cuMemAlloc of 2097152 bytes" in choice.reason
    with pytest.raises(BackendUnavailableError, match="no room for a trial"):
        way_of(tmp_path, files="kvikio")


def test_gpudirect_storage_is_taken_where_a_trial_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU's memory, both ways."""
    with_kvikio(monkeypatch, DeviceIO(True, "a trial"))
    assert [way_of(tmp_path, direction) for direction in ("write", "read")] == ["gds", "gds"]
    assert choose_files(Options(), str(tmp_path), "write", GPU).reason.endswith("; a trial"), "the evidence"
    assert way_of(tmp_path, gpu=None) in ("direct", "buffered")
    assert way_of(tmp_path, files="posix") in ("direct", "buffered")


def test_compat_mode_is_taken_only_where_it_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own ring of pinned slabs overlaps what KvikIO does one after the other."""
    with_kvikio(monkeypatch, DeviceIO(False, "compat mode"))
    assert way_of(tmp_path) in ("direct", "buffered")
    measured(tmp_path, "some GPU", direct=1.0, buffered=1.0, compat=5.0)
    assert way_of(tmp_path) == "compat"
    assert way_of(tmp_path, files="kvikio") == "compat"


def test_a_trial_that_fails_leaves_posix_files_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name it is an error."""
    with_kvikio(monkeypatch, "no transfer today")
    choice = choose_files(Options(), str(tmp_path), "write", GPU)
    assert choice.way in ("direct", "buffered")
    assert choice.reason.endswith("KvikIO failed: no transfer today")
    with pytest.raises(BackendUnavailableError, match="no transfer today"):
        way_of(tmp_path, files="kvikio")


def test_every_gpu_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no GPUDirect Storage speaks for all, and so does one that fails."""
    other = torch.device("cuda", 1)
    found: dict[torch.device, DeviceIO | None] = {GPU: DeviceIO(True, "first"), other: DeviceIO(False, "second")}
    monkeypatch.setattr(ways.gds, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(ways, "_trial_memory", lambda gpu: gpu)

    def tried(_: str, gpu: Any, **__: bool) -> DeviceIO:
        if (trial := found[gpu]) is None:
            raise BackendUnavailableError(f"{gpu} fails")
        return trial

    monkeypatch.setattr(ways, "try_device_io", tried)
    with pytest.raises(BackendUnavailableError, match="second"):
        choose_files(Options(files="gds"), str(tmp_path), "write", GPU, other)
    assert choose_files(Options(files="kvikio"), str(tmp_path), "write", GPU, other).way == "compat"
    assert choose_files(Options(files="gds"), str(tmp_path), "write", GPU).way == "gds"
    found[other] = None
    assert choose_files(Options(), str(tmp_path), "write", GPU, other).reason.endswith("KvikIO failed: cuda:1 fails")
    found[other] = DeviceIO(True, "second")
    assert choose_files(Options(), str(tmp_path), "write", GPU, other).way == "gds"


def test_compat_mode_is_never_called_gpudirect_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for it by name hears why it is not."""
    with_kvikio(monkeypatch, DeviceIO(False, "KvikIO in compat mode"))
    with pytest.raises(BackendUnavailableError, match=r"^Options\(files='gds'\): KvikIO in compat mode; use "):
        way_of(tmp_path, files="gds")


def test_pinned_memory_has_figures_of_its_own(tmp_path: Path) -> None:
    """What was measured from host memory says nothing of it, and threads and request come with the figure."""
    measured(tmp_path, "cpu", direct=9.0, buffered=1.0)
    measured(tmp_path, "some GPU", direct=1.0, buffered=9.0)
    choice = choose_files(Options(), str(tmp_path), "write", GPU)
    assert (choice.way, choice.threads, choice.request_nbytes) == ("buffered", 4, 1 << 20)
    assert way_of(tmp_path, direct_io="off") == "buffered"


def test_reads_are_direct_only_where_that_was_measured_to_be_faster(tmp_path: Path) -> None:
    """Into pinned slabs; what the host reads goes to any address."""
    assert way_of(tmp_path, "read") == "buffered"
    for device in ("some GPU", "cpu"):
        measured(tmp_path, device, "read", direct=9.0, buffered=1.0)
    assert way_of(tmp_path, "read") == "direct"
    assert way_of(tmp_path, "read", gpu=None) == "buffered"
    assert way_of(tmp_path, "read", direct_io="off") == "buffered"
    measured(tmp_path, "some GPU", "read", direct=1.0, buffered=1.0)
    assert way_of(tmp_path, "read") == "buffered"


@pytest.mark.parametrize("direction", ["write", "read"])
def test_the_host_takes_threads_and_request_from_the_figures_too(tmp_path: Path, direction: Direction) -> None:
    """As a GPU's memory does."""
    assert choose_files(Options(), str(tmp_path), direction)[1:3] == (None, None)
    measured(tmp_path, "cpu", direction, direct=1.0, buffered=1.0)
    assert choose_files(Options(), str(tmp_path), direction)[1:3] == (4, 1 << 20)
