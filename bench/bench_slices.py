"""A sixteenth of the rows of one large tensor: which bytes are read for it, and how long it takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pytest_benchmark.fixture import BenchmarkFixture
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from bench import cache
from bench.measure import Contender, compare
from bench.peers import GPUDCP, SAFETENSORS, STOCK, STOCK_2_THREADS, DcpPeer, Peer
from bench.places import empty_directory, need_cold_reads, need_room
from bench.results import Suite, Table, in_words
from bench.sizes import Sizes
from bench.tensors import check_equal, matrix, spoil

NAME = "weight"
PART = 16
READ_TARGET = 1.02
SPEED_TARGET = 8
STOCKS = (STOCK, STOCK_2_THREADS)
CONTENDERS: tuple[Peer, ...] = (GPUDCP, *STOCKS, SAFETENSORS)


class RowsPlanner(dcp.DefaultLoadPlanner):
    """Asks for the rows of a saved matrix from ``first_row`` on, as many as the state dict's tensor has.

    A rank of a resharded model asks like this; a planner does not need the ranks. torch's own, for all alike.
    """

    def __init__(self, first_row: int) -> None:
        super().__init__()
        self.first_row = first_row

    def create_local_plan(self) -> LoadPlan:
        index = MetadataIndex(NAME, torch.Size([0, 0]))
        rows = ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=index,
            dest_offsets=torch.Size([0, 0]),
            storage_index=index,
            storage_offsets=torch.Size([self.first_row, 0]),
            lengths=self.state_dict[NAME].shape,
        )
        return LoadPlan([rows])


@pytest.mark.parametrize("temperature", ["cold", "warm"])
def test_loading_a_slice(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path, temperature: str) -> None:
    """From the disk, and from the page cache."""
    tensor = matrix(sizes.sliced_rows, sizes.sliced_columns)
    need_room(disk, len(CONTENDERS) * tensor.nbytes)
    if temperature == "cold":
        need_cold_reads(disk)
    count = sizes.sliced_rows // PART
    first_row = 5 * count
    expected, place = tensor[first_row : first_row + count], torch.empty(count, sizes.sliced_columns)
    bring_files = {"cold": cache.drop, "warm": cache.warm}[temperature]
    read_nbytes: dict[str, int] = {}

    def loads(peer: Peer, directory: Path) -> Callable[[], None]:
        if isinstance(peer, DcpPeer):
            return lambda: peer.load({NAME: place}, directory, planner=RowsPlanner(first_row))
        return partial(SAFETENSORS.load_rows, place, NAME, first_row, directory)

    def contender(peer: Peer) -> Contender:
        directory = empty_directory(disk / peer.name)
        peer.save({NAME: tensor}, directory)
        load = loads(peer, directory)

        def prepare() -> None:
            spoil({NAME: place})
            bring_files(cache.files_of(directory))

        def check() -> None:
            check_equal({NAME: expected}, {NAME: place})

        prepare()
        if isinstance(peer, DcpPeer):
            load()  # once before, so that what is imported or read once does not count
            prepare()
            before = _nbytes_read_so_far()
            load()
            read_nbytes[peer.name] = _nbytes_read_so_far() - before
            check()
        return Contender(name=peer.name, prepare=prepare, run=load, check=check)

    timings = compare(benchmark, [contender(peer) for peer in CONTENDERS], sizes.rounds)
    for peer in CONTENDERS:
        shutil.rmtree(disk / peer.name)
    what = f"{temperature} load of {in_words(expected.nbytes)} of rows out of {in_words(tensor.nbytes)}"
    suite.add_timings(what, timings, nbytes=expected.nbytes)
    suite.expect_speed(what, timings, GPUDCP.name, [peer.name for peer in STOCKS], SPEED_TARGET)
    suite.tables.append(
        Table(
            title=f"{what}: bytes asked of the kernel (rchar of /proc/self/io; safetensors maps its file)",
            columns=("", "bytes", "of the slice"),
            rows=tuple((name, nbytes, f"{nbytes / expected.nbytes:.4f}x") for name, nbytes in read_nbytes.items()),
        )
    )
    found = read_nbytes[GPUDCP.name] / expected.nbytes
    suite.expect(f"{what}: bytes read of the slice's own", found, "at most", READ_TARGET, "x")


def _nbytes_read_so_far() -> int:
    """By this process, all threads, through read calls of any kind; the little that this reading adds is counted."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(file.readline().removeprefix("rchar:"))
