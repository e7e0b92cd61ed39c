"""What the coordinator does for one save of many ranks, beside torch's planner and storage with the collector paused.

All of it on one process: unpickle the plans, find replicas and share them out, number and validate the chunks, pickle
what goes back; then unpickle the write results, make the metadata and write it. What the ranks do is not timed: see
`bench_planning_ranks`.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.measure import Contender, Rounds, compare
from bench.places import empty_directory
from bench.planning_jobs import Job, coordinated, coordinated_by_torch, directory_of, our_messages, torchs_messages
from bench.results import Suite, Table
from gpudcp.collector import collector_paused

GPUDCP, TORCH = "gpudcp", "torch, collector paused"


@pytest.mark.parametrize(("ranks", "tensors", "kind", "target"), [(512, 1500, "mixed", 100), (1024, 400, "good", 40)])
def test_coordinating_beside_torch(
    benchmark: BenchmarkFixture, suite: Suite, tmpfs: Path, ranks: int, tensors: int, kind: str, target: int
) -> None:
    """Three turns each; the first one also touches memory that the process never had."""
    job = Job(ranks, tensors, kind) if suite.is_full else Job(8, 20, kind)
    ours, theirs = our_messages(job), torchs_messages(job)
    found: dict[str, Any] = {}

    def run_ours() -> None:
        found[GPUDCP] = coordinated(ours, tmpfs / "ours")

    def run_theirs() -> None:
        found[TORCH] = coordinated_by_torch(theirs, tmpfs / "torch")

    def check() -> None:
        if found[GPUDCP].state_dict_metadata != found[TORCH].state_dict_metadata:
            raise ValueError("the metadata differ")

    contenders = [
        Contender(
            name=GPUDCP,
            prepare=lambda: directory_of(job, tmpfs / "ours"),
            run=collector_paused()(run_ours),
            check=check,
        ),
        Contender(name=TORCH, prepare=lambda: empty_directory(tmpfs / "torch"), run=collector_paused()(run_theirs)),
    ]
    timings = compare(benchmark, contenders, Rounds(measured=3 if suite.is_full else 1, warm_up=0))
    suite.add_timings(str(job), timings, nbytes=sum(map(len, ours.plans)))
    suite.notes.append(f"{job}: GB/s are of gpudcp's pickled plans, and mean nothing else")
    suite.expect_speed(f"coordinate {job}", timings, GPUDCP, [TORCH], target)
    suite.expect(f"coordinate {job}: {GPUDCP}", timings[GPUDCP].median_s, "at most", 2, " s")
    suite.expect(f"{job}: bytes an item", sum(map(len, ours.plans)) / ours.nitems, "at most", 16, " B")


@pytest.mark.parametrize("kind", ["mixed", "replicated", "own", "stages", "grid"])
@pytest.mark.parametrize("ranks", [256, 2048, 8192])
def test_scaling(benchmark: BenchmarkFixture, suite: Suite, tmpfs: Path, kind: str, ranks: int) -> None:
    """gpudcp alone, on a curve."""
    tensors = 1000 if kind == "mixed" else 250
    job = Job(ranks, tensors, kind) if suite.is_full else Job(16, 10, kind)
    messages = our_messages(job)

    contender = Contender(
        name=GPUDCP,
        prepare=lambda: directory_of(job, tmpfs / "ours"),
        run=lambda: coordinated(messages, tmpfs / "ours"),
    )
    timings = compare(benchmark, [contender], Rounds(measured=1, warm_up=0))
    seconds = timings[GPUDCP].median_s
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    columns = ("", "items", "s", "us an item", "bytes an item", "peak GiB of the process so far")
    per_item = sum(map(len, messages.plans)) / messages.nitems
    row = (str(job), messages.nitems, seconds, seconds / messages.nitems * 1e6, per_item, peak_gib)
    table = next((each for each in suite.tables if each.columns == columns), None)
    rows, turns = ((), {}) if table is None else (table.rows, table.seconds)
    if table is not None:
        suite.tables.remove(table)
    suite.tables.append(
        Table(title="scaling", columns=columns, rows=(*rows, row), seconds={**turns, str(job): (seconds,)})
    )
    if (ranks, kind) == (8192, "mixed"):
        suite.expect(f"coordinate {job}", seconds, "at most", 40, " s")
        suite.expect(f"coordinate {job}: peak of the process", peak_gib, "at most", 6, " GiB")
    if kind == "own":
        suite.expect(f"{job}: bytes an item", per_item, "at most", 64, " B")
