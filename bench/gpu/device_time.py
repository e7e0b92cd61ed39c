"""Time contenders on a GPU, in turns: the device's own time by events, or whole calls by the host's clock.

Device time: before each turn the device is given other work for twice as long as the host took to queue the turn once,
and meanwhile the host queues it (some thousand launches may wait: a loop over more of them still shows the host). Cold:
that work ends with writes over twice the L2 cache. Warm: the contender itself ran just before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Contender, Rounds, Timings, compare
from bench.results import Suite, Table

_BUSY_ROWS = 4096  # some milliseconds a product: few launches wait before those that are timed
_LEAST_BUSY_S = 0.03


class Between:
    """What the device does between two turns."""

    def __init__(self, *, is_cold: bool) -> None:
        self.is_cold = is_cold
        self._matrix = torch.randn(_BUSY_ROWS, _BUSY_ROWS, device="cuda")
        self._product = torch.empty_like(self._matrix)
        l2_nbytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.empty(2 * l2_nbytes if is_cold else 0, dtype=torch.uint8, device="cuda")
        self._multiply(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._multiply(4)
        torch.cuda.synchronize()
        self._product_s = (time.perf_counter() - start) / 4

    def queue(self, again: Callable[[], object], host_s: float) -> None:
        """Work for twice so long, and for some tens of milliseconds at least; ``again`` is what a warm turn follows."""
        if not self.is_cold:
            again()
        self._multiply(math.ceil(max(2 * host_s, _LEAST_BUSY_S) / self._product_s))
        self._other.fill_(1)

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._matrix, self._matrix, out=self._product)


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
        self._host_s: dict[str, float] = {}

    def add_round(self) -> None:
        for contender in self._contenders:
            if contender.name not in self._host_s:
                _host_seconds(contender)  # what is compiled or allocated at the first call is not counted
                self._host_s[contender.name] = _host_seconds(contender)
            contender.prepare()
            seconds = _device_seconds(contender, self._between, self._host_s[contender.name])
            self._seconds[contender.name].append(seconds)
            contender.check()

    def timings(self, rounds: Rounds) -> Timings:
        return {name: rounds.timing(turns) for name, turns in self._seconds.items()}


def compare_calls(benchmark: BenchmarkFixture, contenders: Sequence[Contender], rounds: Rounds) -> Timings:
    """Seconds from the call to the end of its work on the device, the host's part included."""
    return compare(benchmark, [_synchronised(contender) for contender in contenders], rounds)


def _host_seconds(contender: Contender) -> float:
    """Until its work is queued, on a device that has nothing else to do."""
    contender.prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender.run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def _device_seconds(contender: Contender, between: Between, host_s: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    between.queue(contender.run, host_s)
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
