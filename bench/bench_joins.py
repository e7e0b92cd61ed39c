"""Which saved chunks overlap which local ones: beside torch's read items for one tensor, and for many tensors at once.

The garbage collector is paused for both: it would be half of torch's time, and none of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bench.measure import Contender, Timings, compare
from bench.results import Suite, Table
from bench.sizes import Sizes
from gpudcp.collector import collector_paused
from gpudcp.planners.joins import Int64, Overlaps, overlaps, overlaps_batch

SUBJECT, PEER = "gpudcp", "torch"
SAVED_CHUNKS = {True: 2048, False: 32}
"""Of one tensor, in a full and in a small run."""
TENSORS = {True: 2000, False: 20}
ROWS_A_CHUNK = 6
NARROW, WIDE = 16, 1 << 40
"""Columns: fewer and more than the rows, along which the tensor is sharded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The same boxes as torch's objects and as columns, neither of which is timed."""

    chunks: list[ChunkStorageMetadata]
    offsets: Int64
    lengths: Int64

    @classmethod
    def of_rows(cls, cuts: Int64, columns: int) -> Side:
        """Whole rows of a matrix, cut at these."""
        starts, counts = cuts[:-1], np.diff(cuts)
        offsets = np.stack([starts, np.zeros_like(starts)], axis=1)
        lengths = np.stack([counts, np.full_like(counts, columns)], axis=1)
        boxes = zip(offsets.tolist(), lengths.tolist(), strict=True)
        return cls(
            chunks=[ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes],
            offsets=offsets,
            lengths=lengths,
        )

    @property
    def metadata(self) -> TensorStorageMetadata:
        return TensorStorageMetadata(TensorProperties(), torch.Size([]), self.chunks)


@pytest.mark.parametrize("local_chunks", [1, 64, 2048])
@pytest.mark.parametrize("orientation", ["good", "bad"])
def test_joining_many_saved_chunks(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, orientation: str, local_chunks: int
) -> None:
    """Sharded on the longest dimension, along which torch sweeps, and on another one."""
    count = SAVED_CHUNKS[suite.is_full]
    # At least 100x is promised from 64 local chunks on in the bad orientation, 10x for one, and nothing slower.
    target = 1.0 if orientation == "good" else 10.0 if local_chunks == 1 else 100.0
    _measure(benchmark, suite, sizes, count, min(local_chunks, count), orientation, target)


@pytest.mark.parametrize(("saved_chunks", "local_chunks"), [(1, 1), (2, 2), (8, 1), (1, 8), (8, 8), (32, 1), (32, 32)])
def test_joining_few_chunks(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, saved_chunks: int, local_chunks: int
) -> None:
    """Where NumPy's calls cost more than the work; in torch's good orientation."""
    _measure(benchmark, suite, sizes, saved_chunks, local_chunks, "good", 1.0)


def _measure(
    benchmark: BenchmarkFixture,
    suite: Suite,
    sizes: Sizes,
    saved_chunks: int,
    local_chunks: int,
    orientation: str,
    target: float,
) -> None:
    columns = {"good": NARROW, "bad": WIDE}[orientation]
    rows = saved_chunks * ROWS_A_CHUNK
    saved = Side.of_rows(np.linspace(0, rows, saved_chunks + 1, dtype=np.int64), columns)
    if local_chunks == 1:  # a rank's own shard of twice as many ranks, not the whole tensor
        local = Side.of_rows(np.array([rows // 2, rows // 2 + ROWS_A_CHUNK // 2]), columns)
    else:  # off the saved chunks by one row
        cuts = np.linspace(0, rows, local_chunks + 1, dtype=np.int64)
        local = Side.of_rows(np.concatenate([cuts[:1], cuts[1:-1] + 1, cuts[-1:]]), columns)
    # Several calls a turn, as for tensor after tensor of a model, unless torch would take seconds for them.
    calls = min(200, max(1, (1 << 20) // (saved_chunks * local_chunks)))
    metadata = saved.metadata
    timings = _compare(
        benchmark,
        sizes,
        lambda: overlaps(saved.offsets, saved.lengths, local.offsets, local.lengths),
        lambda: [create_read_items_for_chunk_list("weight", metadata, local.chunks)],
        calls,
        saved_chunks=saved_chunks,
        local_chunks=local_chunks,
    )
    what = f"{saved_chunks} saved chunks, {local_chunks} local, {orientation} orientation"
    _report(suite, what, timings, calls, target)


@pytest.mark.parametrize("saved_chunks", [1, 8])
def test_joining_many_tensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, saved_chunks: int) -> None:
    """One local chunk of each, as a rank of a sharded model has."""
    count = TENSORS[suite.is_full]
    rows = saved_chunks * ROWS_A_CHUNK
    saved = Side.of_rows(np.arange(0, rows + 1, ROWS_A_CHUNK), NARROW)
    local = Side.of_rows(np.array([rows // 2, rows // 2 + ROWS_A_CHUNK // 2]), NARROW)
    batch = (
        np.arange(count + 1) * saved_chunks,
        np.tile(saved.offsets, (count, 1)),
        np.tile(saved.lengths, (count, 1)),
        np.arange(count + 1),
        np.tile(local.offsets, (count, 1)),
        np.tile(local.lengths, (count, 1)),
    )
    metadata = saved.metadata

    def run_torch() -> list[list[ReadItem]]:
        return [create_read_items_for_chunk_list("weight", metadata, local.chunks) for _ in range(count)]

    timings = _compare(
        benchmark, sizes, lambda: overlaps_batch(*batch), run_torch, 1, saved_chunks=saved_chunks, local_chunks=1
    )
    _report(suite, f"{count} tensors of {saved_chunks} saved chunks, 1 local", timings, 1, 1.0)


def _compare(
    benchmark: BenchmarkFixture,
    sizes: Sizes,
    run: Callable[[], Overlaps],
    run_torch: Callable[[], list[list[ReadItem]]],
    calls: int,
    *,
    saved_chunks: int,
    local_chunks: int,
) -> Timings:
    found: dict[str, Overlaps] = {}
    items: dict[str, list[list[ReadItem]]] = {}

    def run_ours() -> None:
        with collector_paused():
            for _ in range(calls):
                found["last"] = run()

    def run_theirs() -> None:
        with collector_paused():
            for _ in range(calls):
                items["last"] = run_torch()

    def check() -> None:
        expected = sorted(
            (
                (item.dest_index.index or 0) + tensor * local_chunks,
                (item.storage_index.index or 0) + tensor * saved_chunks,
                *item.storage_offsets,
                *item.dest_offsets,
                *item.lengths,
            )
            for tensor, part in enumerate(items["last"])
            for item in part
        )
        if np.column_stack(found["last"]).tolist() != list(map(list, expected)):
            raise ValueError("the joins differ from torch's read items")

    # Checked after our own turn, which is the last one of each round.
    contenders = [Contender(name=SUBJECT, run=run_ours, check=check), Contender(name=PEER, run=run_theirs)]
    return compare(benchmark, contenders, sizes.rounds)


_COLUMNS = ("", f"{SUBJECT} us", f"{PEER} us", f"{PEER} / {SUBJECT}")
_TITLE = f"us a call, median of all turns; {PEER} makes read items, {SUBJECT} columns, items only when asked for"


def _report(suite: Suite, what: str, timings: Timings, calls: int, target: float) -> None:
    """One more row of the suite's only table."""
    ours, theirs = (timings[name].median_s / calls * 1e6 for name in (SUBJECT, PEER))
    table = suite.tables.pop() if suite.tables else Table(title=_TITLE, columns=_COLUMNS, rows=())
    seconds = {f"{what}: {name}": timing.seconds for name, timing in timings.items()}
    row = (what, ours, theirs, f"{theirs / ours:.2f}x")
    suite.tables.append(replace(table, rows=(*table.rows, row), seconds={**table.seconds, **seconds}))
    suite.expect_speed(what, timings, SUBJECT, [PEER], target)
