"""Peak extra memory of one save and one load, each in a process of its own: it must not grow with the model."""

from __future__ import annotations

from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from bench.peak_memory import peak_extra_nbytes
from bench.peers import GPUDCP, PEERS, STOCK, Peer
from bench.places import empty_directory, need_room
from bench.results import Suite, Table, in_words
from bench.sizes import Sizes

TARGET_MIB = 300


def test_peak_extra_memory(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, disk: Path) -> None:
    """Save into an empty directory, then load into tensors that are there. The seconds are those of the processes."""
    need_room(disk, max(sizes.memory_nbytes))
    benchmark.pedantic(lambda: [_measure(suite, sizes, disk, nbytes) for nbytes in sizes.memory_nbytes])
    suite.notes.append("peak extra memory: VmHWM less VmRSS before; safetensors maps its file to load, which counts")


def _measure(suite: Suite, sizes: Sizes, disk: Path, nbytes: int) -> None:
    peers = PEERS if nbytes <= sizes.memory_peers else (STOCK,)
    peaks = {peer.name: _peaks_mib(peer, disk / "memory", nbytes, sizes.memory_hidden) for peer in (GPUDCP, *peers)}
    what = in_words(nbytes)
    suite.tables.append(
        Table(
            title=f"peak extra memory, {what}",
            columns=("", "save MiB", "load MiB"),
            rows=tuple((name, *both) for name, both in peaks.items()),
        )
    )
    for direction, peak_mib in zip(("save", "load"), peaks[GPUDCP.name], strict=True):
        suite.expect(f"{direction} of {what}: peak extra memory", peak_mib, "at most", TARGET_MIB, " MiB")


def _peaks_mib(peer: Peer, directory: Path, nbytes: int, hidden: int) -> tuple[float, float]:
    empty_directory(directory)
    peaks = [
        peak_extra_nbytes(peer, direction, directory, nbytes=nbytes, hidden=hidden) / 2**20
        for direction in ("save", "load")
    ]
    empty_directory(directory)
    return peaks[0], peaks[1]
