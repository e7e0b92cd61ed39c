"""gpudcp.verify beside its ceilings: the same files only read, and their bytes only checksummed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import gpudcp
from bench import cache
from bench.measure import Contender, compare
from bench.peers import GPUDCP, STOCK, DcpPeer
from bench.places import empty_directory, need_cold_reads, need_room
from bench.raw import RawMemory
from bench.results import Suite, in_words
from bench.sizes import Sizes
from bench.tensors import count_nbytes, llama_like, places_for, small_tensors, spoil
from gpudcp.formats.checksum import LIBRARY, crc32

VERIFY = "gpudcp.verify"
RAW_READ = "raw read"
CHECKSUM = f"CRC-32 alone ({LIBRARY}, one core)"
TARGET = 0.9
_CALL_NBYTES = 8 << 20


@pytest.mark.parametrize("temperature", ["cold", "warm"])
def test_verifying_a_model(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path, temperature: str
) -> None:
    """From the disk, and from the page cache; of our own checkpoint and of stock's."""
    model = llama_like(sizes.llm_nbytes, hidden=sizes.llm_hidden)
    nbytes = count_nbytes(model)
    need_room(disk, 2 * nbytes)
    if temperature == "cold":
        need_cold_reads(disk)
    own, stock = (empty_directory(disk / f"verify-{number}") for number in range(2))
    GPUDCP.save(model, own)
    STOCK.save(model, stock)
    del model
    _check_damage_is_found(own)
    _check_damage_is_found(stock)
    files = _data_files(own)
    block, content = RawMemory(_CALL_NBYTES), RawMemory(sum(path.stat().st_size for path in files))
    content.read(files)
    bring_files = {"cold": cache.drop, "warm": cache.warm}[temperature]

    def prepare_files(directory: Path) -> None:
        bring_files(cache.files_of(directory))

    timings = compare(
        benchmark,
        [
            Contender(name=VERIFY, prepare=lambda: prepare_files(own), run=lambda: _verify(own)),
            Contender(
                name=f"{VERIFY}, stock's files", prepare=lambda: prepare_files(stock), run=lambda: _verify(stock)
            ),
            Contender(name=RAW_READ, prepare=lambda: prepare_files(own), run=lambda: _read_through(files, block)),
            Contender(name=CHECKSUM, run=lambda: _checksum(content)),
        ],
        sizes.rounds,
    )
    for directory in (own, stock):
        shutil.rmtree(directory)
    what = f"{temperature} verification of {in_words(nbytes)}"
    suite.add_timings(what, timings, nbytes=nbytes)
    slower = max((RAW_READ, CHECKSUM), key=lambda name: timings[name].median_s)
    suite.expect_speed(what, timings, VERIFY, [slower], TARGET)


def test_verifying_small_tensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path) -> None:
    """Where the time goes into items, not bytes: beside loading them, which stock does without checking any."""
    tensors = small_tensors(sizes.small_tensors)
    nbytes = count_nbytes(tensors)
    places = places_for(tensors)
    directory = empty_directory(disk / "verify-small")
    GPUDCP.save(tensors, directory)
    _check_damage_is_found(directory)

    def load(peer: DcpPeer) -> Contender:
        return Contender(
            name=f"load, {peer.name}", prepare=lambda: spoil(places), run=lambda: peer.load(places, directory)
        )

    timings = compare(
        benchmark, [Contender(name=VERIFY, run=lambda: _verify(directory)), load(GPUDCP), load(STOCK)], sizes.rounds
    )
    shutil.rmtree(directory)
    suite.add_timings(f"warm verification of {sizes.small_tensors:,} tensors of 4 KiB", timings, nbytes=nbytes)


def _verify(directory: Path) -> None:
    report = gpudcp.verify(directory)
    if not report.ok or report.unverified:
        raise ValueError(str(report))


def _check_damage_is_found(directory: Path) -> None:
    """Flip a bit of the middle of a file for a moment: a verification that misses it is not worth timing."""
    path = _data_files(directory)[0]
    middle = path.stat().st_size // 2
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, middle)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), middle)
        is_found = not gpudcp.verify(directory).ok
        os.pwrite(file.fileno(), byte, middle)
    if not is_found:
        raise ValueError(f"{path}: a flipped bit at byte {middle} was not found")


def _data_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.distcp"))


def _read_through(files: Sequence[Path], block: RawMemory) -> None:
    """Read the files, in calls of 8 MiB, all into the same memory: as verify does, which keeps nothing."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            nbytes = path.stat().st_size
            for start in range(0, nbytes, _CALL_NBYTES):
                wanted = min(_CALL_NBYTES, nbytes - start)
                if os.preadv(fd, [block.padded[:wanted]], start) != wanted:
                    raise OSError(f"{path}: short read at byte {start}")
        finally:
            os.close(fd)


def _checksum(content: RawMemory) -> None:
    crc = 0
    for start in range(0, content.nbytes, _CALL_NBYTES):
        crc = crc32(content.padded[start : min(start + _CALL_NBYTES, content.nbytes)], crc)
