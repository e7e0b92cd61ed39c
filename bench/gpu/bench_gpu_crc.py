"""CRC-32 on a GPU: alone, for ranges of many sizes, and after a pack, slab by slab as the executor does it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu.device_time import add_device_timings, compare_on_device
from bench.gpu.hardware import need_device_memory
from bench.measure import Contender, Timings
from bench.results import Suite, in_words
from bench.sizes import Sizes

COPY = "device-to-device copy"
SLAB_NBYTES = 32 << 20
HASHED_NBYTES = 1 << 26
"""Of the ranges that zlib hashes too, at most: three of each kind."""


def memory_of(nbytes: int) -> torch.Tensor:
    """Random bytes, with the padding that kernels may read."""
    from gpudcp_kernels.tables import SLAB_PADDING_NBYTES

    return torch.empty(nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device="cuda").random_()[:nbytes]


def hashing(name: str, slab: torch.Tensor, range_nbytes: int, count: int) -> Contender:
    """One call for so many ranges, one after the other; some of them are compared with zlib's."""
    from gpudcp_kernels.checksum import crc32_ranges, finished

    starts = np.arange(count) * range_nbytes
    lengths = np.full(count, range_nbytes)
    checked = sorted({0, count // 2, count - 1}) if range_nbytes <= HASHED_NBYTES else []
    expected = [zlib.crc32(slab[starts[n] : starts[n] + range_nbytes].cpu().numpy().data) for n in checked]
    found: list[torch.Tensor] = []

    def run() -> None:
        found[:] = [crc32_ranges(slab, starts, lengths)]

    def check() -> None:
        if finished(found[0])[checked].tolist() != expected:
            raise ValueError(f"{name}: other checksums than zlib's")

    return Contender(name=name, run=run, check=check)


def test_ranges_of_many_sizes(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes) -> None:
    """From one range to 20,000 of 4 KiB, out of cold memory; bytes are read once, so a copy moves twice as many."""
    need_device_memory(3 * sizes.gpu_nbytes)
    slab = memory_of(sizes.gpu_nbytes)
    into = torch.empty_like(slab)
    shapes = {"ranges of 4 KiB": (4096, min(sizes.small_tensors, sizes.gpu_nbytes // 4096))}
    for mebibytes in (1, 16, 256):
        if (range_nbytes := mebibytes << 20) <= sizes.gpu_nbytes:
            shapes[f"ranges of {mebibytes} MiB"] = (range_nbytes, sizes.gpu_nbytes // range_nbytes)
    shapes["one range"] = (sizes.gpu_nbytes, 1)
    moved = {COPY: 2 * slab.nbytes} | {name: nbytes * count for name, (nbytes, count) in shapes.items()}
    contenders = [
        Contender(name=COPY, run=lambda: into.copy_(slab)),
        *(hashing(name, slab, nbytes, count) for name, (nbytes, count) in shapes.items()),
    ]
    timings = compare_on_device(benchmark, contenders, sizes.device_rounds)
    add_device_timings(suite, f"CRC-32 of up to {in_words(slab.nbytes)}", timings, moved, COPY)
    for name, (nbytes, _) in shapes.items():
        target = 2000 if nbytes >= 1 << 20 else 300
        suite.expect(f"CRC-32, {name}", moved[name] / timings[name].median_s / 1e9, "at least", target, " GB/s")


def test_packing_and_hashing_slab_by_slab(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes) -> None:
    """Each slab of a ring packed out of cold memory and then hashed, beside both done alone."""
    need_device_memory(3 * sizes.gpu_nbytes)
    count = max(1, sizes.gpu_nbytes // SLAB_NBYTES)
    nbytes = min(SLAB_NBYTES, sizes.gpu_nbytes)
    source = memory_of(count * nbytes)
    slabs = [memory_of(nbytes) for _ in range(4)]
    parts, boxes = _parts(nbytes), [_boxes(source[n * nbytes : (n + 1) * nbytes]) for n in range(count)]
    acts = {"pack": (True, False), "CRC-32": (False, True), "pack + CRC-32": (True, True)}
    into = torch.empty_like(source)
    moved = {COPY: 2 * source.nbytes, "pack": 2 * source.nbytes}
    moved |= {"CRC-32": source.nbytes, "pack + CRC-32": 2 * source.nbytes}
    contenders = [Contender(name=COPY, run=lambda: into.copy_(source))]
    for name, (does_pack, does_hash) in acts.items():
        contenders.append(_ring(name, source, slabs, boxes, parts, does_pack=does_pack, does_hash=does_hash))
    timings = compare_on_device(benchmark, contenders, sizes.device_rounds)
    add_device_timings(suite, f"{count} slabs of {in_words(nbytes)}, four tensors each", timings, moved, COPY)
    _expect_pack_and_crc(suite, timings)


def _expect_pack_and_crc(suite: Suite, timings: Timings) -> None:
    both = timings["pack + CRC-32"].median_s
    apart = timings["pack"].median_s + timings["CRC-32"].median_s
    suite.expect("pack + CRC-32 beside the two one after the other", apart / both, "at least", 1, "x")
    suite.expect("pack + CRC-32 beside pack", timings["pack"].median_s / both, "at least", 0.6, "x")


def _ring(
    name: str,
    source: torch.Tensor,
    slabs: list[torch.Tensor],
    boxes: list[Any],
    parts: Any,
    *,
    does_pack: bool,
    does_hash: bool,
) -> Contender:
    from gpudcp_kernels.checksum import add_parts, finished, new_slots
    from gpudcp_kernels.pack import pack_cast

    crcs: list[torch.Tensor] = []

    def run() -> None:
        crcs.clear()
        for number, of_slab in enumerate(boxes):
            slab = slabs[number % len(slabs)]
            if does_pack:
                pack_cast(of_slab, slab, memory_dtype=torch.uint8, file_dtype=torch.uint8)
            if does_hash:
                crcs.append(new_slots(len(parts), slab.device))
                add_parts(crcs[-1], slab, parts)

    def check() -> None:
        nbytes = slabs[0].nbytes
        last = source[(len(boxes) - 1) * nbytes :]
        slab = slabs[(len(boxes) - 1) % len(slabs)]
        if does_pack and not torch.equal(slab, last):
            raise ValueError(f"{name}: packed wrong")
        if does_hash:
            length = int(parts.nbytes[0])
            if finished(crcs[-1])[0] != zlib.crc32(slab[:length].cpu().numpy().data):
                raise ValueError(f"{name}: another checksum than zlib's")

    def prepare() -> None:
        for slab in slabs:
            slab.fill_(0xA5)

    return Contender(name=name, prepare=prepare, run=run, check=check)


def _boxes(memory: torch.Tensor) -> Any:
    """Four tensors, side by side."""
    from gpudcp.executors.boxtables import BoxTable

    numel = memory.numel() // 4
    starts = np.arange(4) * numel
    return BoxTable.of_runs(memory.data_ptr() + starts, starts, np.full(4, numel))


def _parts(nbytes: int) -> Any:
    from gpudcp_kernels.chunks import Parts

    lengths = np.full(4, nbytes // 4)
    return Parts(
        byte_offsets=np.arange(4) * lengths,
        nbytes=lengths,
        slots=np.arange(4),
        are_first=np.ones(4, np.bool_),
        nbytes_after=np.zeros(4, np.int64),
    )
