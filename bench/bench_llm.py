"""A Llama-like model, bf16 weights and their fp32 master copies: saved and loaded beside the peers and the raw disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cache
from bench.measure import Contender, Timings, compare
from bench.peers import GPUDCP, GPUDCP_UNVERIFIED, PEERS, STOCK, STOCKS, DcpPeer, Peer
from bench.places import empty_directory, need_cold_reads, need_room, touch_free_memory
from bench.raw import RawMemory
from bench.results import Suite, in_words
from bench.sizes import Sizes
from bench.tensors import Tensors, check_equal, count_nbytes, llama_like, places_for, spoil
from gpudcp.files.tune import supports_direct_io

STOCK_NAMES = [peer.name for peer in STOCKS]
RAW_BUFFERED = "raw buffered write + fsync"
RAW_DIRECT = "raw O_DIRECT write + fsync"
RAW_READ = "raw read of gpudcp's files"


@pytest.fixture(scope="module")
def tensors(sizes: Sizes) -> Tensors:
    return llama_like(sizes.llm_nbytes, hidden=sizes.llm_hidden)


@pytest.fixture(scope="module")
def places(tensors: Tensors) -> Tensors:
    return places_for(tensors)


def test_saving_a_model(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, place: Path, tensors: Tensors, places: Tensors
) -> None:
    """Into an empty directory, with fsync."""
    need_room(place, 2 * count_nbytes(tensors))
    memory = RawMemory(count_nbytes(tensors))
    torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors.values()], out=memory.tensor)
    target = place / "save"

    def ready() -> None:
        empty_directory(target)
        touch_free_memory(count_nbytes(tensors) * 5 // 4)

    def raw(name: str, *, is_direct: bool) -> Contender:
        return Contender(
            name=name,
            prepare=ready,
            run=lambda: memory.write(target / "raw", is_direct=is_direct),
            check=lambda: memory.check_holds([target / "raw"]),
        )

    def saved_by(peer: Peer) -> Contender:
        def check() -> None:
            spoil(places)
            # Stock DCP is the judge of what gpudcp wrote; for its own it would be slow, and gpudcp is as strict.
            judge = peer if not isinstance(peer, DcpPeer) else STOCK if peer is GPUDCP else GPUDCP
            judge.load(places, target)
            check_equal(tensors, places)

        return Contender(
            name=peer.name,
            prepare=ready,
            run=lambda: peer.save(tensors, target),
            check=check,
        )

    raws = [raw(RAW_BUFFERED, is_direct=False)]
    if supports_direct_io(str(place)):
        raws.append(raw(RAW_DIRECT, is_direct=True))
    else:
        suite.notes.append(f"{_kind(place)}: no file opens with O_DIRECT, so there is no raw O_DIRECT write")
    timings = compare(benchmark, [saved_by(GPUDCP), *raws, *map(saved_by, PEERS)], sizes.rounds)
    shutil.rmtree(target)
    what = _add(suite, f"save, {_kind(place)}", timings, tensors)
    suite.expect_speed(what, timings, GPUDCP.name, [RAW_BUFFERED, RAW_DIRECT], 0.85)
    suite.expect_speed(what, timings, GPUDCP.name, STOCK_NAMES, 1.5)


def test_loading_a_model_from_a_cold_disk(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path, tensors: Tensors, places: Tensors
) -> None:
    """The files are out of the page cache before every turn, which mincore confirms."""
    need_cold_reads(disk)
    timings = _compare_loads(benchmark, sizes, disk, tensors, places, cache.drop)
    what = _add(suite, "cold load, disk", timings, tensors)
    suite.notes.append(
        "cold: fsync and posix_fadvise(DONTNEED) on exactly these files, then mincore finds no page of them cached; "
        "what the device itself caches stays"
    )
    suite.expect_speed(what, timings, GPUDCP.name, [RAW_READ], 0.9)
    suite.expect_speed(what, timings, GPUDCP.name, STOCK_NAMES, 3)


def test_loading_a_model_from_the_page_cache(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, place: Path, tensors: Tensors, places: Tensors
) -> None:
    """The files have just been read."""
    timings = _compare_loads(benchmark, sizes, place, tensors, places, cache.warm)
    what = _add(suite, f"warm load, {_kind(place)}", timings, tensors)
    suite.expect_speed(what, timings, GPUDCP_UNVERIFIED.name, [RAW_READ], 0.9)
    suite.expect_speed(what, timings, GPUDCP.name, [RAW_READ], 0.6)
    suite.expect_speed(what, timings, GPUDCP.name, STOCK_NAMES, 3)


def _compare_loads(
    benchmark: BenchmarkFixture,
    sizes: Sizes,
    place: Path,
    tensors: Tensors,
    places: Tensors,
    bring_files: Callable[[list[Path]], None],
) -> Timings:
    """Every library loads what it has saved itself, into the same tensors; the raw read is of gpudcp's files."""
    need_room(place, (1 + len(PEERS)) * count_nbytes(tensors))
    directories = {peer.name: empty_directory(place / peer.name) for peer in (GPUDCP, *PEERS)}
    for peer in (GPUDCP, *PEERS):
        peer.save(tensors, directories[peer.name])
    files = cache.files_of(directories[GPUDCP.name])
    memory = RawMemory(sum(path.stat().st_size for path in files))

    def loaded_by(peer: Peer, directory: Path) -> Contender:
        def prepare() -> None:
            spoil(places)
            bring_files(cache.files_of(directory))

        return Contender(
            name=peer.name,
            prepare=prepare,
            run=lambda: peer.load(places, directory),
            check=lambda: check_equal(tensors, places),
        )

    def prepare_raw() -> None:
        memory.tensor.zero_()
        bring_files(files)

    raw = Contender(
        name=RAW_READ,
        prepare=prepare_raw,
        run=lambda: memory.read(files),
        check=lambda: memory.check_holds(files),
    )
    of_gpudcp = [loaded_by(peer, directories[GPUDCP.name]) for peer in (GPUDCP, GPUDCP_UNVERIFIED)]
    of_peers = [loaded_by(peer, directories[peer.name]) for peer in PEERS]
    timings = compare(benchmark, [*of_gpudcp, raw, *of_peers], sizes.rounds)
    for directory in directories.values():
        shutil.rmtree(directory)
    return timings


def _add(suite: Suite, what: str, timings: Timings, tensors: Tensors) -> str:
    nbytes = count_nbytes(tensors)
    suite.add_timings(f"{what}: {in_words(nbytes)} in {len(tensors)} tensors", timings, nbytes=nbytes)
    return what


def _kind(place: Path) -> str:
    return "tmpfs" if place.is_relative_to("/dev/shm") else "disk"
