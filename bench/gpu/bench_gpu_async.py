"""async_save of a model on a GPU: how long training waits for it, beside copies of as many bytes and stock's call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pytest_benchmark.fixture import BenchmarkFixture

import gpudcp
from bench.gpu.bench_gpu_files import bf16_model
from bench.gpu.hardware import need_device_memory
from bench.measure import Contender, compare
from bench.places import empty_directory, need_room
from bench.results import Suite, in_words
from bench.sizes import Sizes
from bench.tensors import check_equal, count_nbytes, places_for, spoil

THREAD, PROCESS, STOCK = "gpudcp, thread", "gpudcp, process", "stock DCP"
ON_DEVICE, TO_HOST = "copy on the device", "pinned copy to the host"


def test_the_stall(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, tmpfs: Path) -> None:
    """From the call to its return, when training may go on; memory of earlier turns is used again, on all sides.

    Each checkpoint is waited for and compared before the next turn.
    """
    need_room(tmpfs, 4 * sizes.gpu_nbytes)
    need_device_memory(5 * sizes.gpu_nbytes)
    tensors = bf16_model(sizes.gpu_nbytes, hidden=sizes.gpu_model_hidden)
    places, nbytes = places_for(tensors), count_nbytes(tensors)
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    on_host = {name: torch.empty_like(tensor, device="cpu", pin_memory=True) for name, tensor in tensors.items()}

    def copied_to(destinations: dict[str, torch.Tensor]) -> Callable[[], None]:
        def copy() -> None:
            for name, tensor in tensors.items():
                destinations[name].copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()

        return copy

    def saved_by(name: str, begin: Callable[[Path], Any], *, has_one_turn: bool = False) -> Contender:
        directory = tmpfs / name
        uploads: list[Any] = []

        def check() -> None:
            uploads.pop().result()
            spoil(places)
            gpudcp.load(dict(places), directory)
            check_equal(tensors, places)

        return Contender(
            name=name,
            prepare=lambda: empty_directory(directory),
            run=lambda: uploads.append(begin(directory)),
            check=check,
            has_one_turn=has_one_turn,
        )

    def by_gpudcp(mode: str) -> Callable[[Path], Any]:
        options = gpudcp.Options(async_mode=mode)  # type: ignore[arg-type]
        return lambda directory: gpudcp.async_save(dict(tensors), directory, options=options).upload_completion

    contenders = [
        saved_by(THREAD, by_gpudcp("thread")),
        saved_by(PROCESS, by_gpudcp("process")),
        Contender(name=ON_DEVICE, run=copied_to(copies)),
        Contender(name=TO_HOST, run=copied_to(on_host)),
        saved_by(STOCK, lambda directory: dcp.async_save(dict(tensors), checkpoint_id=directory), has_one_turn=True),
    ]
    timings = compare(benchmark, contenders, sizes.gpu_rounds)
    title = f"stall of async_save: {in_words(nbytes)} of bf16 in {len(tensors)} tensors"
    suite.add_timings(title, timings, nbytes=nbytes)
    for name in (THREAD, PROCESS):
        found = timings[TO_HOST].median_s / timings[name].median_s
        suite.expect(f"{name}: stall beside one pinned copy to the host", found, "at least", 1.0, "x")
