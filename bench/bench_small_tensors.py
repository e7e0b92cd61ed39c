"""20,000 tensors of 4 KiB: what each tensor costs, its bytes aside. Whole saves and loads, and the storage's part."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cache
from bench.measure import Contender, PartClock, Timings, compare
from bench.peers import GPUDCP, GPUDCP_UNDER_TORCH, PEERS, STOCKS, DcpPeer, Peer
from bench.places import empty_directory
from bench.results import Suite
from bench.sizes import Sizes
from bench.tensors import Tensors, check_equal, count_nbytes, places_for, small_tensors, spoil

CONTENDERS: tuple[Peer, ...] = (GPUDCP, GPUDCP_UNDER_TORCH, *PEERS)
STOCK_NAMES = [peer.name for peer in STOCKS]
STORAGE_TARGET = 12
WHOLE_TARGET = 4


@pytest.fixture(scope="module")
def tensors(sizes: Sizes) -> Tensors:
    return small_tensors(sizes.small_tensors)


@pytest.fixture(scope="module")
def places(tensors: Tensors) -> Tensors:
    return places_for(tensors)


def test_saving_small_tensors(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path, tensors: Tensors, places: Tensors
) -> None:
    """Into an empty directory on the disk, with fsync."""
    clocks = _clocks()

    def contender(peer: Peer) -> Contender:
        target = disk / "save"

        def check() -> None:
            spoil(places)
            # gpudcp's reader reads all three DCP directories, and is the quickest to check with.
            (GPUDCP if isinstance(peer, DcpPeer) else peer).load(places, target)
            check_equal(tensors, places)

        save = partial(peer.save, clock=clocks[peer.name]) if isinstance(peer, DcpPeer) else peer.save
        return Contender(
            name=peer.name, prepare=lambda: empty_directory(target), run=lambda: save(tensors, target), check=check
        )

    whole = compare(benchmark, [contender(peer) for peer in CONTENDERS], sizes.rounds)
    _add(suite, "save", "write_data + finish", whole, clocks, sizes, tensors)


def test_loading_small_tensors(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path, tensors: Tensors, places: Tensors
) -> None:
    """Out of the page cache, each library what it has saved itself, into the same tensors."""
    clocks = _clocks()

    def contender(peer: Peer) -> Contender:
        source = empty_directory(disk / peer.name)
        peer.save(tensors, source)

        def prepare() -> None:
            cache.warm(cache.files_of(source))
            spoil(places)

        load = partial(peer.load, clock=clocks[peer.name]) if isinstance(peer, DcpPeer) else peer.load
        return Contender(
            name=peer.name,
            prepare=prepare,
            run=lambda: load(places, source),
            check=lambda: check_equal(tensors, places),
        )

    whole = compare(benchmark, [contender(peer) for peer in CONTENDERS], sizes.rounds)
    for peer in CONTENDERS:
        shutil.rmtree(disk / peer.name)
    _add(suite, "load", "read_data", whole, clocks, sizes, tensors)


def _clocks() -> dict[str, PartClock]:
    return {peer.name: PartClock() for peer in CONTENDERS if isinstance(peer, DcpPeer)}


def _add(
    suite: Suite,
    direction: str,
    methods: str,
    whole: Timings,
    clocks: dict[str, PartClock],
    sizes: Sizes,
    tensors: Tensors,
) -> None:
    storage = {name: sizes.rounds.timing(clock.seconds) for name, clock in clocks.items()}
    what, nbytes = f"{direction} {len(tensors):,} tensors of 4 KiB", count_nbytes(tensors)
    suite.add_timings(what, whole, nbytes=nbytes)
    suite.add_timings(f"{what}: the storage's part, {methods}", storage, nbytes=nbytes)
    suite.expect_speed(what, whole, GPUDCP.name, STOCK_NAMES, WHOLE_TARGET)
    for subject in (GPUDCP, GPUDCP_UNDER_TORCH):
        suite.expect_speed(f"{what}, {methods}", storage, subject.name, STOCK_NAMES, STORAGE_TARGET)
