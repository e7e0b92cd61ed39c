"""A save of many ranks in one process: what every rank sends to the coordinator, and the coordinator's calls."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import gpudcp
from bench.places import empty_directory
from gpudcp._dcp import StorageInfo
from gpudcp.columns import OBJECT, SHARD, TENSOR, SaveColumns, TemplateTable
from gpudcp.items import WriteItems
from gpudcp.names import Names
from gpudcp.records import ItemRecords
from gpudcp.storage.results import WriteResults
from gpudcp.views import Paths

Size = tuple[int, ...]


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


@contextmanager
def ranks(count: int, rank: int) -> Iterator[Any]:
    """A mesh of as many ranks, of which this process is one, and which never talk to each other."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def shapes_of(job: Job, rank: int) -> Iterator[tuple[str, int, Size, Size, Size]]:
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
    every = list(shapes_of(job, rank))
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


def our_messages(job: Job) -> Messages:
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
        path_ids=np.zeros(len(columns), dtype=np.int32),
        byte_offsets=starts,
        nbytes=nbytes,
        payload_offsets=np.where(is_object, -1, starts + 600),
        dtypes=[torch.bfloat16],
        dtype_ids=np.where(is_object, -1, 0).astype(np.int32),
        crcs=crcs,
    )


def _file_of(rank: int) -> str:
    return f"__{rank}_0_0123456789abcdef.distcp"


def directory_of(job: Job, path: Path) -> Path:
    """With the files that the ranks have written, which a commit looks for; empty ones."""
    empty_directory(path)
    for rank in range(job.ranks):
        (path / _file_of(rank)).touch()
    return path


def torchs_messages(job: Job) -> Messages:
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


def coordinated(messages: Messages, directory: Path) -> Any:
    return _coordinate(messages, gpudcp.GpuStorageWriter(directory), gpudcp.DefaultSavePlanner())


def coordinated_by_torch(messages: Messages, directory: Path) -> Any:
    return _coordinate(messages, dcp.FileSystemWriter(directory), dcp.DefaultSavePlanner())
