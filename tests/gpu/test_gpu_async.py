"""Background saves of tensors on a GPU: what is written is what the call saw, whatever training does meanwhile."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from gpu_cases import DEVICE
from gpu_states import State, bits, blank, differences, load, mixed_state

import gpudcp
from gpudcp import staging
from gpudcp.errors import PlanError
from gpudcp.executors.devicememory import allocate
from gpudcp.planners import DefaultSavePlanner
from gpudcp.ranks import Ranks

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")]

by_both = pytest.mark.parametrize("mode", ["thread", "process"])


def begin(state: State, directory: Path, mode: str, planner: object = None) -> Any:
    """A save in the background; its upload."""
    options = gpudcp.Options(async_mode=mode)  # type: ignore[arg-type]
    saved: Any = gpudcp.async_save(dict(state), directory, planner=planner, options=options)  # type: ignore[arg-type]
    return saved.upload_completion


def overwrite(state: State) -> None:
    """As the next step of an optimizer does, in place and at once: their whole memory."""
    for tensor in state.values():
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        whole.set_(tensor.untyped_storage(), 0, (tensor.untyped_storage().nbytes(),), (1,)).zero_()


@by_both
def test_a_snapshot_is_what_the_call_saw(tmp_path: Path, mode: str) -> None:
    """Every dtype and layout, overwritten right after; stock reads it. The second one uses the first one's memory."""
    for turn in range(2):
        state = mixed_state(steps=200)
        expected = {name: tensor.detach().clone() for name, tensor in state.items()}
        directory = tmp_path / str(turn)
        upload = begin(state, directory, mode)
        overwrite(state)
        upload.result()
        loaded, by_stock = blank(expected), blank(expected)
        load(loaded, directory)
        dcp.load(by_stock, checkpoint_id=directory)
        assert differences(expected, loaded) == differences(expected, by_stock) == []


@by_both
@pytest.mark.parametrize("stream", ["default", "own"])
def test_tensors_still_being_computed_are_saved_as_they_will_be(tmp_path: Path, mode: str, stream: str) -> None:
    """The snapshot comes after what the caller has queued, and before what it queues next."""
    matrix = torch.randn(4096, 4096, device=DEVICE)
    tensor = torch.zeros(1 << 24, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()):
        for _ in range(20):
            torch.mm(matrix, matrix)
        tensor += 1
        upload = begin({"tensor": tensor}, tmp_path, mode)
        for _ in range(50):
            tensor += 1
        upload.result()
    loaded = {"tensor": torch.zeros(1 << 24)}
    load(loaded, tmp_path)
    assert bool((loaded["tensor"] == 1).all())


@by_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
def test_casts_on_the_way_are_the_rules(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    """The snapshot is cast on the device; its file holds what a save in the foreground holds."""
    values = torch.randn(1000, 301, device=DEVICE) * 300
    values.view(-1)[::77] = torch.nan
    state = {"weight": values, "count": torch.arange(7, device=DEVICE), "columns": values[:, 3:50]}
    begin(state, tmp_path / "background", mode, DefaultSavePlanner(dtype=dtype)).result()
    gpudcp.save(dict(state), tmp_path / "foreground", planner=DefaultSavePlanner(dtype=dtype))
    found: list[State] = []
    for name in ("background", "foreground"):
        places = {
            name: torch.zeros(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in state.items()
        }
        load(places, tmp_path / name)
        found.append(places)
    assert differences(*found) == []
    assert bool((bits(found[0]["weight"]) != 0).any())


@by_both
def test_a_gpu_without_room_for_a_snapshot_is_copied_to_the_host_at_once(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training waits longer then; the bytes are the same."""
    monkeypatch.setattr(staging.Stager, "_device_memory", lambda *_: None)
    monkeypatch.setattr(gpudcp.api, "_stager", staging.Stager())
    state = mixed_state(steps=10)
    expected = {name: tensor.detach().clone() for name, tensor in state.items()}
    upload = begin(state, tmp_path, mode)
    overwrite(state)
    upload.result()
    loaded = blank(expected)
    load(loaded, tmp_path)
    assert differences(expected, loaded) == []


def test_views_that_the_host_would_conjugate_or_negate_are_copied_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """So large that the call returns before their bytes have come, which torch would conjugate on the host by then."""
    monkeypatch.setattr(staging.Stager, "_device_memory", lambda *_: None)
    values = torch.randn(3000, 5000, dtype=torch.complex64, device=DEVICE)
    state = {"conjugate": values.conj(), "negative": values.conj().imag, "transposed": values.t().conj()}
    taken = staging.Stager().stage(state, None, nested=True, is_shared=False).state_dict
    assert differences(state, taken) == []


def test_a_full_gpu_needs_little_for_tensors_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces of one at most, whatever its size."""
    monkeypatch.setattr(staging.Stager, "_device_memory", lambda *_: None)
    matrix, images = torch.randn(8000, 8001, device=DEVICE), torch.randn(64, 3, 512, 512, device=DEVICE)
    state = {"transposed": matrix.t(), "channels_last": images.to(memory_format=torch.channels_last)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = staging.Stager().stage(state, None, nested=True, is_shared=False).state_dict
    assert torch.cuda.max_memory_allocated() - before <= 2 * 4 * (4 << 20)
    assert differences(state, taken) == []


@pytest.mark.parametrize("failing", ["another rank", "the transfer"])
def test_a_background_save_that_fails_frees_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Whoever keeps its error."""

    def fail(*_: object) -> None:
        raise PlanError("not today")

    tensor = torch.randn(1 << 24, device=DEVICE)
    before = torch.cuda.memory_allocated()
    if failing == "another rank":
        monkeypatch.setattr(Ranks, "vote", fail)
    else:
        monkeypatch.setattr(staging, "new_stream", fail)
    error = begin({"tensor": tensor}, tmp_path, "thread").exception()
    assert isinstance(error, PlanError)
    assert torch.cuda.memory_allocated() == before


def test_a_well_filled_gpu_has_room_for_every_snapshot_that_it_had_room_for_once() -> None:
    """torch keeps the memory of the first, which is then no longer free, and lends it to training meanwhile."""
    torch.cuda.empty_cache()
    free_nbytes = torch.cuda.mem_get_info()[0]
    tensor = torch.ones(1 << 26, dtype=torch.uint8, device=DEVICE)
    ballast = allocate(free_nbytes - int(3.5 * tensor.nbytes), torch.device("cuda", 0))
    stager = staging.Stager()
    for turn in range(4):
        tensor.fill_(turn)
        snapshot = stager.stage({"tensor": tensor}, None, nested=True, is_shared=False)
        assert len(snapshot.on_devices) == 1
        snapshot.finish()
        assert bool((snapshot.state_dict["tensor"] == turn).all())
        torch.ones(1 << 25, dtype=torch.uint8, device=DEVICE).sum()
    del ballast


@by_both
def test_a_forked_child_lets_go_of_a_snapshots_memory_and_its_parent_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A worker that loads data: it cannot call the driver, and must not unmap what has been put in that place."""
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    tensor = torch.ones(1 << 22, device=DEVICE)
    begin({"tensor": tensor}, tmp_path / "0", mode).result()
    pid = os.fork()
    if pid == 0:
        gc.collect()
        os._exit(len(ignored))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    begin({"tensor": tensor + 1}, tmp_path / "1", mode).result()
    loaded = {"tensor": torch.zeros(1 << 22)}
    load(loaded, tmp_path / "1")
    assert bool((loaded["tensor"] == 2).all())


@by_both
def test_training_goes_on_beside_background_saves(tmp_path: Path, mode: str) -> None:
    """Steps that allocate, free and copy to the host; each checkpoint holds the step at which it was asked for."""
    weight = torch.zeros(1 << 22, device=DEVICE)
    uploads: dict[int, Any] = {}
    for step in range(60):
        weight += torch.ones_like(weight)
        float(weight[step])
        if step % 15 == 0:
            uploads[step] = begin({"weight": weight}, tmp_path / str(step), mode)
    for step, upload in uploads.items():
        upload.result()
        loaded = {"weight": torch.zeros(1 << 22)}
        load(loaded, tmp_path / str(step))
        assert bool((loaded["weight"] == step + 1).all())


@by_both
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_are_copied_side_by_side(tmp_path: Path, mode: str) -> None:
    """Each behind the work of its own stream."""
    state = {str(n): torch.zeros(1 << 22, device=f"cuda:{n % 2}") for n in range(4)}
    matrices = [torch.randn(4096, 4096, device=f"cuda:{number}") for number in range(2)]
    for matrix in matrices:
        for _ in range(10):
            torch.mm(matrix, matrix)
    for tensor in state.values():
        tensor += 1
    upload = begin(state, tmp_path, mode)
    for tensor in state.values():
        tensor += 1
    upload.result()
    loaded = {name: torch.zeros(1 << 22) for name in state}
    load(loaded, tmp_path)
    assert all(bool((tensor == 1).all()) for tensor in loaded.values())
