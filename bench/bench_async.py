"""async_save: how long training waits for it, beside one memory copy of the same bytes; and how it slows training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import gpudcp
from bench.measure import Contender, compare
from bench.places import empty_directory, need_room
from bench.results import Suite, Table
from bench.sizes import Sizes
from bench.tensors import check_equal

COPY, THREAD, PROCESS = "one memory copy", "gpudcp, thread", "gpudcp, process"
STALL_TARGET = 1.1
SLOWDOWN_TARGET = 1.1


def _state(suite: Suite) -> dict[str, torch.Tensor]:
    count, numel = (32, 16 << 20) if suite.is_full else (4, 1 << 12)
    return {f"layers.{number}.weight": torch.randn(numel) for number in range(count)}


def _nbytes(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def test_the_stall(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, tmpfs: Path) -> None:
    """From the call to its return, when training may go on; memory of earlier turns is used again, on both sides."""
    state = _state(suite)
    need_room(tmpfs, 3 * _nbytes(state))
    copies = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    uploads: dict[str, object] = {}

    def copy() -> None:
        for name, tensor in state.items():
            copies[name].copy_(tensor)

    def saver(mode: str, directory: Path) -> Callable[[], None]:
        options = gpudcp.Options(async_mode=mode)  # type: ignore[arg-type]

        def save() -> None:
            uploads[mode] = gpudcp.async_save(state, directory, options=options).upload_completion

        return save

    def check(mode: str, directory: Path) -> Callable[[], None]:
        def wait() -> None:
            uploads[mode].result()  # type: ignore[attr-defined]
            found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            gpudcp.load(found, directory)
            check_equal(found, state)

        return wait

    directories = {mode: empty_directory(tmpfs / mode) for mode in ("thread", "process")}
    contenders = [
        Contender(name=name, run=saver(mode, directories[mode]), check=check(mode, directories[mode]))
        for name, mode in ((THREAD, "thread"), (PROCESS, "process"))
    ]
    timings = compare(benchmark, [*contenders, Contender(name=COPY, run=copy)], sizes.rounds)
    suite.add_timings("stall of async_save", timings, nbytes=_nbytes(state))
    for name in (THREAD, PROCESS):
        ratio = timings[name].median_s / timings[COPY].median_s
        suite.expect(f"{name}: stall beside one memory copy", ratio, "at most", STALL_TARGET, "x")


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_training_beside_a_save(benchmark: BenchmarkFixture, suite: Suite, disk: Path, mode: str) -> None:
    """Steps on one core, the save on the other: without and with a save, in turns.

    The target is for the mean: all the time that training takes, with the steps that a save holds up.
    """
    state = _state(suite)
    need_room(disk, 3 * _nbytes(state))
    directory = empty_directory(disk / mode)
    options = gpudcp.Options(async_mode=mode)  # type: ignore[arg-type]
    weights = torch.randn(512, 512)
    threads = torch.get_num_threads()
    steps: dict[bool, list[float]] = {False: [], True: []}

    def step() -> float:
        start = time.perf_counter()
        value = weights
        for _ in range(8 if suite.is_full else 1):
            value = torch.tanh(value @ weights)
        return time.perf_counter() - start

    def turn() -> None:
        quiet = [step() for _ in range(100 if suite.is_full else 2)]
        upload = gpudcp.async_save(state, directory, options=options).upload_completion
        beside = [step()]
        while not upload.done():
            beside.append(step())
        upload.result()
        steps[False] += quiet
        steps[True] += beside

    torch.set_num_threads(1)
    try:
        turn()  # starts the process, and touches the memory
        for each in steps.values():
            each.clear()
        benchmark.pedantic(turn, rounds=3 if suite.is_full else 1)
    finally:
        torch.set_num_threads(threads)
    alone, beside = steps[False], steps[True]
    suite.tables.append(
        Table(
            title=f"training beside a save by a {mode}",
            columns=("", "step, mean ms", "median ms", "max ms", "steps"),
            rows=(("alone", *_in_ms(alone), len(alone)), ("beside a save", *_in_ms(beside), len(beside))),
        )
    )
    ratio = statistics.mean(beside) / statistics.mean(alone)
    suite.expect(f"steps beside a save by a {mode}, all together", ratio, "at most", SLOWDOWN_TARGET, "x")


def _in_ms(seconds: list[float]) -> tuple[float, float, float]:
    return tuple(each(seconds) * 1e3 for each in (statistics.mean, statistics.median, max))  # type: ignore[return-value]
