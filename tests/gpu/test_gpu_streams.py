"""Saves and loads beside other work of the GPU: the caller's streams, other threads, training that goes on."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch
from gpu_cases import DEVICE
from gpu_states import EXECUTOR, blank, differences, load, save

from gpudcp.cudadriver import driver
from gpudcp.executors.devicememory import allocate
from gpudcp.files.kvikio import copy_and_wait

pytestmark = pytest.mark.gpu

SMALL_SLABS = {"executor": EXECUTOR, "slab_nbytes": 1 << 20}


def keep_busy(matrix: torch.Tensor, *, turns: int) -> None:
    """Queue some tens of milliseconds of work on the current stream."""
    for _ in range(turns):
        torch.mm(matrix, matrix)


def test_tensors_still_being_computed_are_saved_as_they_will_be(tmp_path: Path) -> None:
    """The save waits for what the caller has queued on its stream, default or not."""
    for number, stream in enumerate([torch.cuda.default_stream(), torch.cuda.Stream()]):
        matrix = torch.randn(4096, 4096, device=DEVICE)
        tensor = torch.zeros(1 << 24, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            keep_busy(matrix, turns=20)
            for _ in range(100):
                tensor += 1
            save({"tensor": tensor}, tmp_path / str(number), **SMALL_SLABS)
        loaded = {"tensor": torch.zeros(1 << 24)}
        load(loaded, tmp_path / str(number))
        assert bool((loaded["tensor"] == 100).all())


def test_a_load_does_not_overtake_what_still_reads_its_destinations(tmp_path: Path) -> None:
    """And what the caller queues after the load sees what was loaded."""
    saved = {"tensor": torch.full((1 << 24,), 2.0, device=DEVICE)}
    save(saved, tmp_path, **SMALL_SLABS)
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        matrix = torch.randn(4096, 4096, device=DEVICE)
        place = torch.ones(1 << 24, device=DEVICE)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            keep_busy(matrix, turns=20)
            before = place.clone()
            load({"tensor": place}, tmp_path, **SMALL_SLABS)
            after = place.clone()
        stream.synchronize()
        assert bool((before == 1).all())
        assert bool((after == 2).all())


def test_the_copies_of_a_trial_wait_for_nobody_else() -> None:
    """In both directions, while the default stream has a second of work before it."""
    memory, found = allocate(1 << 18, DEVICE), torch.zeros(1 << 18, dtype=torch.uint8)
    matrix, given = torch.randn(4096, 4096, device=DEVICE), torch.randint(0, 256, (1 << 18,), dtype=torch.uint8)
    copy_and_wait(given, memory)  # the stream is made now
    keep_busy(matrix, turns=1)
    torch.cuda.synchronize()
    keep_busy(matrix, turns=400)
    is_done = torch.cuda.default_stream().record_event()
    copy_and_wait(given, memory)
    copy_and_wait(memory, found)
    assert not is_done.query()
    assert torch.equal(found, given)


def test_training_goes_on_beside_a_save_and_a_load(tmp_path: Path) -> None:
    """Another thread's stream keeps writing other tensors, allocates and frees; neither disturbs the other."""
    state = {f"layer.{n}": torch.randn(1 << 20, device=DEVICE) for n in range(64)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    weight, steps = torch.zeros(1 << 22, device=DEVICE), 0
    torch.cuda.synchronize()
    is_over = threading.Event()

    def train() -> None:
        nonlocal steps
        with torch.cuda.stream(torch.cuda.Stream()):
            while not is_over.is_set():
                gradient = torch.ones_like(weight)
                weight.add_(gradient)
                steps += 1
                if steps % 50 == 0:
                    torch.cuda.current_stream().synchronize()
            torch.cuda.current_stream().synchronize()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for turn in range(3):
            save(state, tmp_path / str(turn), **SMALL_SLABS)
            places = blank(state)
            load(places, tmp_path / str(turn), **SMALL_SLABS)
            assert differences(expected, places) == []
    finally:
        is_over.set()
        trainer.join()
    assert steps > 0
    assert bool((weight == steps).all())
    assert differences(expected, state) == []


def test_two_threads_save_and_load_at_once(tmp_path: Path) -> None:
    """Each with lanes of its own."""
    states = [{f"{n}": torch.randn(3_000_000 + n, device=DEVICE) for n in range(8)} for _ in range(2)]
    found: list[list[str]] = []

    def go(number: int) -> None:
        for turn in range(2):
            save(states[number], tmp_path / f"{number}.{turn}", **SMALL_SLABS)
            places = blank(states[number])
            load(places, tmp_path / f"{number}.{turn}", **SMALL_SLABS)
            found.append(differences(states[number], places))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[]] * 4


def test_memory_freed_after_a_save_is_reused_without_harm(tmp_path: Path) -> None:
    """The tensors of a save are let go, and others take their memory, as soon as it returns."""
    for turn in range(4):
        tensor = torch.full((1 << 23,), float(turn), device=DEVICE)
        save({"tensor": tensor}, tmp_path / str(turn), **SMALL_SLABS)
        del tensor
        torch.full((1 << 23,), -1.0, device=DEVICE)
    for turn in range(4):
        place = {"tensor": torch.zeros(1 << 23, device=DEVICE)}
        load(place, tmp_path / str(turn), **SMALL_SLABS)
        assert bool((place["tensor"] == turn).all())


def test_without_threads_the_callers_keeps_its_device_and_its_capture_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does the writing and reading itself, bound to the device of the tensors for just so long."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    other = torch.cuda.device_count() - 1
    state = {"tensor": torch.randn(1 << 20, device=DEVICE)}
    loaded = blank(state)
    with torch.cuda.device(other), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        save(state, tmp_path, **SMALL_SLABS)
        load(loaded, tmp_path, **SMALL_SLABS)
        assert torch.cuda.current_device() == other
    mode = ctypes.c_int(0)  # CU_STREAM_CAPTURE_MODE_GLOBAL
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0
    assert differences(state, loaded) == []
