"""What one rank of many does to plan a save or a load, beside torch with the collector paused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pytest_benchmark.fixture import BenchmarkFixture
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharding

import gpudcp
from bench.measure import Contender, Rounds, compare
from bench.places import empty_directory
from bench.planning_jobs import (
    Job,
    coordinated,
    coordinated_by_torch,
    directory_of,
    our_messages,
    ranks,
    shapes_of,
    torchs_messages,
)
from bench.results import Suite
from bench.sizes import Sizes
from gpudcp.collector import collector_paused

GPUDCP, TORCH = "gpudcp", "torch, collector paused"


def test_opening_a_checkpoint_and_planning_one_ranks_load(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, tmpfs: Path
) -> None:
    """Each its own checkpoint of the same job, loaded by a rank of the same sharding; the collector is paused."""
    job = Job(1024, 400, "good") if suite.is_full else Job(8, 20, "good")
    directories = {GPUDCP: directory_of(job, tmpfs / "ours"), TORCH: empty_directory(tmpfs / "torch")}
    coordinated(our_messages(job), directories[GPUDCP])
    coordinated_by_torch(torchs_messages(job), directories[TORCH])
    rank = job.ranks // 2
    wanted: dict[str, DTensor] = {}
    nitems: dict[str, int] = {}

    def opened(name: str, reader: Any, planner: Any) -> Contender:
        def run() -> None:
            own = reader(directories[name])
            metadata = own.read_metadata()
            used = planner()
            used.set_up_planner(dict(wanted), metadata, is_coordinator=False)
            own.set_up_storage_reader(metadata, is_coordinator=False)
            nitems[name] = len(used.create_local_plan().items)

        def check() -> None:
            if nitems[name] != job.tensors:
                raise ValueError(f"{nitems[name]} read items for {job.tensors} tensors")

        return Contender(name=name, run=collector_paused()(run), check=check)

    contenders = [
        opened(GPUDCP, gpudcp.GpuStorageReader, gpudcp.DefaultLoadPlanner),
        opened(TORCH, dcp.FileSystemReader, dcp.DefaultLoadPlanner),
    ]
    with ranks(job.ranks, rank) as mesh:
        for name, _, _, _, lengths in shapes_of(job, rank):
            local = torch.empty(lengths, dtype=torch.bfloat16)
            wanted[name] = DTensor.from_local(local, mesh, [Sharding(0)])
        timings = compare(benchmark, contenders, Rounds(measured=min(sizes.rounds.measured, 3), warm_up=0))
    suite.add_timings(f"open {job}, and plan one rank's load", timings, nbytes=0)
    suite.expect_speed(f"open {job}, and plan one rank's load", timings, GPUDCP, [TORCH], 30)


def test_local_plans_of_dtensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes) -> None:
    """The second and later saves of a rank of 64, of tensors in nine shapes; planners are used again."""
    count = 2000 if suite.is_full else 50
    with ranks(64, 5) as mesh:
        state = {
            f"layers.{n // 9}.{n % 9}.weight": DTensor.from_local(torch.zeros(2, 8 * (1 + n % 9)), mesh, [Sharding(0)])
            for n in range(count)
        }
        ours, cached = gpudcp.DefaultSavePlanner(), gpudcp.DefaultSavePlanner(enable_plan_caching=True)
        theirs = dcp.DefaultSavePlanner()

        def local(planner: Any) -> Any:
            planner.set_up_planner(dict(state), is_coordinator=False)
            return planner.create_local_plan()

        def unchanged() -> None:
            if local(cached).usable:
                raise ValueError("the plan was sent again")
            cached.finish_plan(SavePlan([], usable=False))

        local(ours)
        cached.finish_plan(local(cached))
        contenders = [
            Contender(name=GPUDCP, run=collector_paused()(lambda: local(ours))),
            Contender(name="gpudcp, cached, to finish_plan", run=collector_paused()(unchanged)),
            Contender(name=TORCH, run=collector_paused()(lambda: local(theirs))),
        ]
        timings = compare(benchmark, contenders, sizes.rounds)
    suite.add_timings(f"set_up_planner and create_local_plan, {count:,} DTensors", timings, nbytes=0)
    per_tensor_us = timings[GPUDCP].median_s / count * 1e6
    suite.expect("local plan of cached DTensors, a tensor", per_tensor_us, "at most", 5, " us")
    cached_ms = timings["gpudcp, cached, to finish_plan"].median_s * 1e3
    suite.expect(f"second save of {count:,} unchanged items, a rank", cached_ms, "at most", 5, " ms")
