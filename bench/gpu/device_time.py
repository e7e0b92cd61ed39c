"""Time contenders on a GPU, in turns: the device's own time by events, or whole calls by the host's clock.

Device time: before each turn the device is given some tens of milliseconds of other work, during which the host queues
the turn (a host that launches too slowly, as in a loop over thousands of tensors, still shows). Cold: that work ends
with writes over twice the L2 cache. Warm: the contender itself ran just before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Contender, Rounds, Timings, compare
from bench.results import Suite, Table

_BUSY_TURNS = 800
_BUSY_ROWS = 1024


class Between:
    """What the device does between two turns."""

    def __init__(self, *, is_cold: bool) -> None:
        self.is_cold = is_cold
        self._matrix = torch.randn(_BUSY_ROWS, _BUSY_ROWS, device="cuda")
        self._product = torch.empty_like(self._matrix)
        l2_nbytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.empty(2 * l2_nbytes if is_cold else 0, dtype=torch.uint8, device="cuda")

    def queue(self, again: Callable[[], object]) -> None:
        """Some tens of milliseconds of work; ``again`` is what a warm turn follows."""
        if not self.is_cold:
            again()
        for _ in range(_BUSY_TURNS):
            torch.mm(self._matrix, self._matrix, out=self._product)
        self._other.fill_(1)


def compare_on_device(benchmark: BenchmarkFixture, contenders: Sequence[Contender], rounds: Rounds) -> Timings:
    """`device_timings` with a cold L2; pytest-benchmark's own figure is of whole rounds, and shows that it ran."""
    seconds = _Seconds(contenders, is_cold=True)
    benchmark.pedantic(seconds.add_round, rounds=rounds.measured, warmup_rounds=rounds.warm_up)
    return seconds.timings(rounds)


def device_timings(contenders: Sequence[Contender], rounds: Rounds, *, is_cold: bool) -> Timings:
    """The device's seconds from the first to the last of each contender's work; turns as in `measure.compare`."""
    seconds = _Seconds(contenders, is_cold=is_cold)
    for _ in range(rounds.warm_up + rounds.measured):
        seconds.add_round()
    return seconds.timings(rounds)


class _Seconds:
    def __init__(self, contenders: Sequence[Contender], *, is_cold: bool) -> None:
        self._contenders = contenders
        self._between = Between(is_cold=is_cold)
        self._seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}

    def add_round(self) -> None:
        for contender in self._contenders:
            contender.prepare()
            self._seconds[contender.name].append(_device_seconds(contender, self._between))
            contender.check()

    def timings(self, rounds: Rounds) -> Timings:
        return {name: rounds.timing(turns) for name, turns in self._seconds.items()}


def compare_calls(benchmark: BenchmarkFixture, contenders: Sequence[Contender], rounds: Rounds) -> Timings:
    """Seconds from the call to the end of its work on the device, the host's part included."""
    return compare(benchmark, [_synchronised(contender) for contender in contenders], rounds)


def _device_seconds(contender: Contender, between: Between) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    between.queue(contender.run)
    start.record()
    contender.run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _synchronised(contender: Contender) -> Contender:
    def prepare() -> None:
        contender.prepare()
        torch.cuda.synchronize()

    def run() -> None:
        contender.run()
        torch.cuda.synchronize()

    return replace(contender, prepare=prepare, run=run)


def as_graph(run: Callable[[], object]) -> Any:
    """The same work recorded as a CUDA graph: its replay costs the host one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def add_device_timings(suite: Suite, title: str, timings: Timings, moved_nbytes: dict[str, int], ceiling: str) -> None:
    """A table of microseconds and of bytes moved, read and written, beside those of a ceiling."""
    best = moved_nbytes[ceiling] / timings[ceiling].median_s
    rows = []
    for name, timing in timings.items():
        speed = moved_nbytes[name] / timing.median_s
        times = (timing.median_s * 1e6, timing.min_s * 1e6, timing.max_s * 1e6)
        rows.append((name, *times, speed / 1e9, speed / best))
    suite.tables.append(
        Table(
            title=title,
            columns=("", "median us", "min us", "max us", "GB/s moved", f"of {ceiling}"),
            rows=tuple(rows),
            seconds={name: timing.seconds for name, timing in timings.items()},
        )
    )


def share(timings: Timings, moved_nbytes: dict[str, int], name: str, ceiling: str) -> float:
    """How fast a contender moves bytes, as a part of how fast the ceiling moves its own."""
    of_name, of_ceiling = (moved_nbytes[each] / timings[each].median_s for each in (name, ceiling))
    return of_name / of_ceiling
