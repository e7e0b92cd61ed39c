"""Time contenders in turns, A B C A B C ..., so that what else the machine does meanwhile hits all of them alike.

Ratios are of two medians of one such run. Measures only; what is a good figure is for `bench.results`.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row of a table. Only ``run`` is timed; ``prepare`` goes before it and ``check`` after it, every time."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    check: Callable[[], object] = _nothing
    """Raises when ``run`` did not do its work: a figure for wrong bytes is none."""
    has_one_turn: bool = False
    """In the first round that counts: for a slow peer, where time is short. Not of the contender under test."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of every turn that counts."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min_s(self) -> float:
        return min(self.seconds)

    @property
    def max_s(self) -> float:
        return max(self.seconds)


Timings = dict[str, Timing]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How often every contender has its turn, and how many of its first turns do not count."""

    measured: int
    warm_up: int

    def timing(self, seconds: Sequence[float]) -> Timing:
        """What counts of the seconds of all turns."""
        return Timing(tuple(seconds[-self.measured :]))


def compare(benchmark: BenchmarkFixture, contenders: Sequence[Contender], rounds: Rounds) -> Timings:
    """Give the contenders their turns. The first is the one under test: pytest-benchmark times it too.

    pytest-benchmark has no notion of peers, so they take their turns in its set-up of each round.
    """
    subject, *peers = contenders
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    numbers = itertools.count()

    def peers_turns() -> None:
        is_first_that_counts = next(numbers) == rounds.warm_up
        for peer in peers:
            if peer.has_one_turn and not is_first_that_counts:
                continue
            _make_ready(peer)
            _run(peer, seconds[peer.name])
            peer.check()
        _make_ready(subject)

    benchmark.pedantic(
        lambda: _run(subject, seconds[subject.name]),
        setup=peers_turns,
        teardown=subject.check,
        rounds=rounds.measured,
        warmup_rounds=rounds.warm_up,
    )
    return {name: rounds.timing(turns) for name, turns in seconds.items()}


def _make_ready(contender: Contender) -> None:
    contender.prepare()
    gc.collect()  # then every turn starts with the same amount of garbage, and the collector is on in all of them


def _run(contender: Contender, seconds: list[float]) -> None:
    start_s = time.perf_counter()
    contender.run()
    seconds.append(time.perf_counter() - start_s)


@dataclass(slots=True)
class PartClock:
    """The seconds that calls of some methods of an object take, within a longer run; one figure for every `watch`."""

    seconds: list[float] = field(default_factory=list)

    def watch(self, subject: Any, *method_names: str) -> None:
        """From here on calls of these methods of ``subject`` count for a new figure."""
        turn = len(self.seconds)
        self.seconds.append(0.0)
        for name in method_names:
            setattr(subject, name, self._timed(getattr(subject, name), turn))

    def _timed(self, method: Callable[..., Any], turn: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[turn] += time.perf_counter() - start_s

        return timed
