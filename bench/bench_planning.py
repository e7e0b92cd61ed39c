"""What the coordinator does for one save of many ranks, beside torch's planner and storage with the collector paused.

All of it on one process: unpickle the plans, find replicas and share them out, number and validate the chunks, pickle
what goes back; then unpickle the write results, make the metadata and write it. What the ranks do is not timed.
"""

from __future__ import annotations

import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pytest_benchmark.fixture import BenchmarkFixture
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharding
from torch.testing._internal.distributed.fake_pg import FakeStore

import gpudcp
from bench.measure import Contender, Rounds, compare
from bench.places import empty_directory
from bench.results import Suite, Table
from bench.sizes import Sizes
from gpudcp._dcp import StorageInfo
from gpudcp.collector import collector_paused
from gpudcp.columns import OBJECT, SHARD, TENSOR, SaveColumns, TemplateTable
from gpudcp.items import WriteItems
from gpudcp.names import Names
from gpudcp.records import ItemRecords
from gpudcp.storage.results import WriteResults
from gpudcp.views import Paths

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
    """Three turns each; the first one also touches memory that the process never had."""
    job = Job(ranks, tensors, kind) if suite.is_full else Job(8, 20, kind)
    ours, theirs = _ours(job), _torchs(job)
    found: dict[str, Any] = {}

    def run_ours() -> None:
        found[GPUDCP] = _coordinated(ours, tmpfs / "ours")

    def run_theirs() -> None:
        found[TORCH] = _coordinated_by_torch(theirs, tmpfs / "torch")

    def check() -> None:
        if found[GPUDCP].state_dict_metadata != found[TORCH].state_dict_metadata:
            raise ValueError("the metadata differ")

    contenders = [
        Contender(
            name=GPUDCP,
            prepare=lambda: _directory_of(job, tmpfs / "ours"),
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
    messages = _ours(job)

    contender = Contender(
        name=GPUDCP,
        prepare=lambda: _directory_of(job, tmpfs / "ours"),
        run=lambda: _coordinated(messages, tmpfs / "ours"),
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


def test_opening_a_checkpoint_and_planning_one_ranks_load(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, tmpfs: Path
) -> None:
    """Each its own checkpoint of the same job, loaded by a rank of the same sharding; the collector is paused."""
    job = Job(1024, 400, "good") if suite.is_full else Job(8, 20, "good")
    directories = {GPUDCP: _directory_of(job, tmpfs / "ours"), TORCH: empty_directory(tmpfs / "torch")}
    _coordinated(_ours(job), directories[GPUDCP])
    _coordinated_by_torch(_torchs(job), directories[TORCH])
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
    with _ranks(job.ranks, rank) as mesh:
        for name, _, _, _, lengths in _shapes(job, rank):
            local = torch.empty(lengths, dtype=torch.bfloat16)
            wanted[name] = DTensor.from_local(local, mesh, [Sharding(0)])
        timings = compare(benchmark, contenders, Rounds(measured=min(sizes.rounds.measured, 3), warm_up=0))
    suite.add_timings(f"open {job}, and plan one rank's load", timings, nbytes=0)
    suite.expect_speed(f"open {job}, and plan one rank's load", timings, GPUDCP, [TORCH], 30)


def test_local_plans_of_dtensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes) -> None:
    """The second and later saves of a rank of 64, of tensors in nine shapes; planners are used again."""
    count = 2000 if suite.is_full else 50
    with _ranks(64, 5) as mesh:
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


@contextmanager
def _ranks(count: int, rank: int) -> Iterator[Any]:
    """A mesh of as many ranks, of which this process is one, and which never talk to each other."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


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
        paths=[_file_of(rank)],
        path_ids=np.zeros(len(columns), dtype=np.int64),
        byte_offsets=starts,
        nbytes=nbytes,
        payload_offsets=np.where(is_object, -1, starts + 600),
        dtypes=[torch.bfloat16],
        dtype_ids=np.where(is_object, -1, 0),
        crcs=crcs,
    )


def _file_of(rank: int) -> str:
    return f"__{rank}_0_0123456789abcdef.distcp"


def _directory_of(job: Job, path: Path) -> Path:
    """With the files that the ranks have written, which a commit looks for; empty ones."""
    empty_directory(path)
    for rank in range(job.ranks):
        (path / _file_of(rank)).touch()
    return path


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


def _coordinate(messages: Messages, writer: Any, planner: Any) -> Any:
    """The coordinator's calls of one save, in DCP's order."""
    planner.set_up_planner({}, storage_meta=writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([pickle.loads(plan) for plan in messages.plans])
    for plan in writer.prepare_global_plan(plans):
        pickle.dumps(plan)
    writer.finish(metadata, [pickle.loads(results) for results in messages.results])
    return metadata


def _coordinated(messages: Messages, directory: Path) -> Any:
    return _coordinate(messages, gpudcp.GpuStorageWriter(directory), gpudcp.DefaultSavePlanner())


def _coordinated_by_torch(messages: Messages, directory: Path) -> Any:
    return _coordinate(messages, dcp.FileSystemWriter(directory), dcp.DefaultSavePlanner())
