"""What the coordinator does for one save of many ranks, beside torch's planner and storage with the collector paused.

All of it on one process: unpickle the plans, find replicas and share them out, number and validate the chunks, pickle
what goes back; then unpickle the write results, make the metadata and write it. What the ranks do is not timed.
"""

from __future__ import annotations

import gc
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from pytest_benchmark.fixture import BenchmarkFixture
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

import gpudcp
from bench.measure import Contender, Rounds, compare
from bench.places import empty_directory
from bench.results import Suite, Table
from gpudcp._dcp import StorageInfo
from gpudcp.columns import OBJECT, SHARD, TENSOR, ItemRecords, Names, SaveColumns, TemplateTable
from gpudcp.storage.results import WriteResults
from gpudcp.views import Paths, WriteItems

Size = tuple[int, ...]
GPUDCP, TORCH = "gpudcp", "torch, collector paused"


class Job(NamedTuple):
    """A model on many ranks.

    ``kind``: good: sharded on the longest dimension; mixed: every second tensor on another one; replicated: one tensor
    in four is; own: every tensor has a shape of its own; stages: every 8 ranks have keys of their own; grid: sharded
    in both dimensions.
    """

    ranks: int
    tensors: int
    kind: str

    def __str__(self) -> str:
        return f"{self.ranks:,} ranks x {self.tensors:,} tensors, {self.kind}"


class Messages(NamedTuple):
    """What every rank sends, pickled, and how many items that is."""

    plans: list[bytes]
    results: list[bytes]
    nitems: int


@pytest.mark.parametrize(("ranks", "tensors", "kind", "target"), [(512, 1500, "mixed", 100), (1024, 400, "good", 40)])
def test_coordinating_beside_torch(
    benchmark: BenchmarkFixture, suite: Suite, tmpfs: Path, ranks: int, tensors: int, kind: str, target: int
) -> None:
    """One turn each: torch takes minutes."""
    job = Job(ranks, tensors, kind) if suite.is_full else Job(8, 20, kind)
    ours, theirs = _ours(job), _torchs(job)
    found: dict[str, Any] = {}

    def run_ours() -> None:
        found[GPUDCP] = _coordinate(ours, empty_directory(tmpfs / "ours"))

    def run_theirs() -> None:
        found[TORCH] = _coordinate_by_torch(theirs, empty_directory(tmpfs / "torch"))

    def check() -> None:
        if found[GPUDCP].state_dict_metadata != found[TORCH].state_dict_metadata:
            raise ValueError("the metadata differ")

    contenders = [
        Contender(name=GPUDCP, run=_with_collector_paused(run_ours), check=check),
        Contender(name=TORCH, run=_with_collector_paused(run_theirs)),
    ]
    timings = compare(benchmark, contenders, Rounds(measured=1, warm_up=0))
    suite.add_timings(str(job), timings, nbytes=sum(map(len, ours.plans)))
    suite.notes.append(f"{job}: GB/s are of gpudcp's pickled plans, and mean nothing else")
    suite.expect_speed(f"coordinate {job}", timings, GPUDCP, [TORCH], target)
    suite.expect(f"coordinate {job}: {GPUDCP}", timings[GPUDCP].median_s, "at most", 2, " s")
    suite.expect(f"{job}: bytes an item", sum(map(len, ours.plans)) / ours.nitems, "at most", 16, " B")


@pytest.mark.parametrize("kind", ["mixed", "replicated", "own", "stages", "grid"])
@pytest.mark.parametrize("ranks", [256, 1024, 4096, 8192])
def test_scaling(benchmark: BenchmarkFixture, suite: Suite, tmpfs: Path, kind: str, ranks: int) -> None:
    """gpudcp alone, on a curve."""
    tensors = 1000 if kind == "mixed" else 250
    job = Job(ranks, tensors, kind) if suite.is_full else Job(16, 10, kind)
    messages = _ours(job)

    def run() -> None:
        _coordinate(messages, empty_directory(tmpfs / "ours"))

    timings = compare(benchmark, [Contender(name=GPUDCP, run=run)], Rounds(measured=1, warm_up=0))
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


def _shapes(job: Job, rank: int) -> Iterator[tuple[str, int, Size, Size, Size]]:
    """Name, kind, and the box of each tensor item of a rank."""
    stage = f"stage{rank // 8}." if job.kind == "stages" else ""
    ranks, rank = (8, rank % 8) if job.kind == "stages" else (job.ranks, rank)
    side = int(ranks**0.5)
    for number in range(job.tensors):
        name = f"{stage}model.layers.{number // 9}.block.{number % 9}.weight"
        wide = 64 + number if job.kind == "own" else 64 * (1 + number % 9)
        if job.kind == "mixed" and number % 2:
            yield name, SHARD, (ranks, 8 * ranks + wide), (rank, 0), (1, 8 * ranks + wide)
        elif job.kind == "replicated" and number % 4 == 0:
            yield name, TENSOR, (4096, wide), (0, 0), (4096, wide)
        elif job.kind == "grid":
            columns = ranks // side
            at = (rank // columns * 4, rank % columns * 4)
            if at[0] < side * 4:
                yield name, SHARD, (side * 4, columns * 4), at, (4, 4)
        else:
            yield name, SHARD, (ranks * wide, 64), (rank * wide, 0), (wide, 64)


def _columns(job: Job, rank: int, known: dict[tuple[str, ...], Names]) -> SaveColumns:
    """The local plan of a rank, as our planner makes it."""
    table, properties = TemplateTable(), TensorProperties(dtype=torch.bfloat16)
    every = list(_shapes(job, rank))
    numbers = [table.number(kind, properties, size, at, lengths) for _, kind, size, at, lengths in every]
    fqns = (*(name for name, *_ in every), "step")
    numbers.append(table.number(OBJECT, None, (), (), ()))
    names = known.setdefault(fqns, Names(fqns, {fqn: (fqn,) for fqn in fqns}))
    return SaveColumns(
        names=names,
        name_ids=np.arange(len(fqns), dtype=np.int32),
        template_ids=np.array(numbers, dtype=np.int32),
        templates=table.templates(),
    )


def _planner(planner: Any) -> Any:
    storage_meta = gpudcp.GpuStorageWriter("unused").storage_meta()
    planner.set_up_planner({}, storage_meta=storage_meta, is_coordinator=True)
    return planner


def _ours(job: Job) -> Messages:
    known: dict[tuple[str, ...], Names] = {}
    plans = []
    for rank in range(job.ranks):
        columns = _columns(job, rank, known)
        plans.append(pickle.dumps(SavePlan(WriteItems(columns), planner_data=Paths(columns.names))))  # type: ignore[arg-type]
    final, _ = _planner(gpudcp.DefaultSavePlanner()).create_global_plan([pickle.loads(plan) for plan in plans])
    results = [pickle.dumps(WriteResults(_records(plan.items.columns, rank))) for rank, plan in enumerate(final)]
    return Messages(plans, results, sum(len(pickle.loads(plan).items) for plan in plans))


def _records(columns: SaveColumns, rank: int) -> ItemRecords:
    nbytes = columns.templates.nbytes()[columns.template_ids] + 900
    starts = np.cumsum(nbytes) - nbytes
    is_object = columns.templates.kinds[columns.template_ids] == OBJECT
    crcs = np.random.default_rng(rank).integers(0, 1 << 32, size=len(columns), dtype=np.int64)
    return ItemRecords(
        indices=columns.indices(),
        paths=[f"__{rank}_0_0123456789abcdef.distcp"],
        path_ids=np.zeros(len(columns), dtype=np.int64),
        byte_offsets=starts,
        nbytes=nbytes,
        payload_offsets=np.where(is_object, -1, starts + 600),
        dtypes=[torch.bfloat16],
        dtype_ids=np.where(is_object, -1, 0),
        crcs=crcs,
    )


def _torchs(job: Job) -> Messages:
    known: dict[tuple[str, ...], Names] = {}
    plans, results, nitems = [], [], 0
    for rank in range(job.ranks):
        columns = _columns(job, rank, known)
        items = list(WriteItems(columns))
        nitems += len(items)
        plans.append(pickle.dumps(SavePlan(items, planner_data=dict(columns.names.paths or {}))))
        infos = [
            WriteResult(item.index, 1000, StorageInfo(f"__{rank}_0.distcp", 1000 * number, 1000))
            for number, item in enumerate(items)
            if item.tensor_data is not None or rank == 0
        ]
        results.append(pickle.dumps(infos))
    return Messages(plans, results, nitems)


def _coordinate(messages: Messages, directory: Path) -> Any:
    writer = gpudcp.GpuStorageWriter(directory)
    planner = gpudcp.DefaultSavePlanner()
    planner.set_up_planner({}, storage_meta=writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in messages.plans])
    for plan in writer.prepare_global_plan(plans):
        pickle.dumps(plan)
    writer.finish(metadata, [pickle.loads(results) for results in messages.results])
    return metadata


def _coordinate_by_torch(messages: Messages, directory: Path) -> Any:
    writer = dcp.FileSystemWriter(directory)
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({}, storage_meta=writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in messages.plans])
    for plan in writer.prepare_global_plan(plans):
        pickle.dumps(plan)
    writer.finish(metadata, [pickle.loads(results) for results in messages.results])
    return metadata


def _with_collector_paused(run: Callable[[], None]) -> Callable[[], None]:
    def paused() -> None:
        with _collector_paused():
            run()

    return paused


@contextmanager
def _collector_paused() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
