"""Turn what a load needs into a load chunk plan: the fewest bytes, in file order, in few calls. Pure.

Cost model. A read of its own costs about as much as reading `READ_GAP_NBYTES` more, so a gap up to that length is read
and thrown away, and a longer one is skipped by a second read. The constant is an estimate: what a cold read of
one local disk, at 3 GB/s (bench/results), moves in 20 us, a system call with its share of Python and of latency.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter, mul
from typing import NamedTuple

import torch

from gpudcp.boxes import extent_of_box, is_dense_run, longest_gap
from gpudcp.errors import PlanError

READ_GAP_NBYTES = 64 << 10
NO_DESTINATION = -1
"""The position of a request that is read only to be checked."""
STRAIGHT_NBYTES = 256 << 10
"""A gapless chunk of this size or more gets a read of its own, which may go straight into the destination."""


class ReadRequest(NamedTuple):
    """A box of one stored tensor that one read item asks for; offsets and lengths are elements per dimension."""

    position: int
    """Of its read item in the LoadPlan."""
    path: str
    payload_offset: int
    """First byte of the stored tensor's storage in the file."""
    dtype: torch.dtype
    strides: tuple[int, ...]
    storage_offset: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


class PayloadCheck(NamedTuple):
    """A payload whose CRC-32 can be checked, if the plan reads it whole."""

    path: str
    payload_offset: int
    payload_nbytes: int
    crc32: int
    fqn: str


class ChunkRead(NamedTuple):
    """A strided box in a file, and the box of its read item's destination that it fills."""

    position: int
    byte_offset: int
    nbytes: int
    """From the first to the last byte of the box, both included."""
    dtype: torch.dtype
    strides: tuple[int, ...]
    offsets: tuple[int, ...]
    """Into the read item's destination box."""
    lengths: tuple[int, ...]
    is_dense: bool
    """Row-major without a gap."""


class Segment(NamedTuple):
    """The part of a checked payload that lies in one read; a payload's segments stand in file order."""

    check: int
    """Into ``LoadChunkPlan.checks``."""
    slab_offset: int
    nbytes: int


class SlabRead(NamedTuple):
    """One contiguous byte range of one file, and the chunks it holds."""

    path: str
    byte_offset: int
    nbytes: int
    chunks: tuple[ChunkRead, ...]
    is_straight: bool
    """A single gapless chunk: an executor may read it straight into a contiguous destination of the same dtype."""
    segments: tuple[Segment, ...] = ()

    def in_blocks(self, *, block_nbytes: int, file_nbytes: int) -> SlabRead:
        """The same read from the beginning of a block to the end of one, or of the file.

        Up to one block longer than the slabs of the plan, where those are whole blocks.
        """
        end = self.byte_offset + self.nbytes
        before = self.byte_offset % block_nbytes
        after = max(0, min(-end % block_nbytes, file_nbytes - end))
        if not before and not after:
            return self
        start, nbytes = self.byte_offset - before, before + self.nbytes + after
        segments = tuple([Segment(check, before + at, length) for check, at, length in self.segments])
        return SlabRead(self.path, start, nbytes, self.chunks, False, segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadChunkPlan:
    """Everything that one rank reads, in file order."""

    reads: tuple[SlabRead, ...]
    empty_positions: tuple[int, ...]
    """Read items that ask for no element: resolved and committed, nothing read."""
    checks: tuple[PayloadCheck, ...]
    """The payloads that the reads cover whole, in file order."""
    slab_nbytes: int

    def __post_init__(self) -> None:
        for read in self.reads:
            if read.nbytes > self.slab_nbytes:
                raise PlanError(
                    f"{read.path}: a read of {read.nbytes} bytes at {read.byte_offset}, a slab has {self.slab_nbytes}"
                )

    @property
    def nbytes(self) -> int:
        return sum(read.nbytes for read in self.reads)


def plan_load(
    requests: Iterable[ReadRequest],
    checks: Sequence[PayloadCheck],
    *,
    slab_nbytes: int,
    gap_nbytes: int,
    large_apart: bool = True,
) -> LoadChunkPlan:
    """Sort the boxes by file and byte, cut those larger than a slab, coalesce neighbours.

    Args:
        requests: the boxes to read.
        checks: payloads with a known CRC-32; those that the reads do not cover whole are left out of the plan.
        slab_nbytes: the longest read.
        gap_nbytes: the longest gap that is cheaper to read than to skip.
        large_apart: give a large chunk a read of its own, which can go straight to its destination.
    """
    by_path: dict[str, list[ChunkRead]] = {}
    empty: list[int] = []
    for request in requests:
        position, path, payload_offset, dtype, strides, storage_offset, offsets, lengths = request
        numel, is_dense = _extent(strides, lengths)
        nbytes = numel * dtype.itemsize
        if numel == 0:
            empty.append(position)
            continue
        chunks = by_path.get(path)
        if chunks is None:
            chunks = by_path[path] = []
        if is_dense and nbytes <= slab_nbytes:  # most requests
            first = storage_offset + sum(map(mul, offsets, strides)) if any(offsets) else storage_offset
            start = payload_offset + first * dtype.itemsize
            origin = (0,) * len(lengths)
            chunks.append(ChunkRead(position, start, nbytes, dtype, strides, origin, lengths, True))
        else:
            chunks.extend(_chunks(request, slab_nbytes, gap_nbytes))
    reads = [
        read
        for path in sorted(by_path)
        for read in _coalesced(
            path, sorted(by_path[path], key=_BYTE_OFFSET), slab_nbytes, gap_nbytes, large_apart=large_apart
        )
    ]
    with_segments, covered = _with_segments(reads, checks)
    return LoadChunkPlan(reads=with_segments, empty_positions=tuple(empty), checks=covered, slab_nbytes=slab_nbytes)


_BYTE_OFFSET = attrgetter("byte_offset")


def _chunks(request: ReadRequest, slab_nbytes: int, gap_nbytes: int) -> Iterable[ChunkRead]:
    """The boxes that a request is cut into."""
    position, _, payload_offset, dtype, strides, storage_offset, offsets, lengths = request
    itemsize = dtype.itemsize
    first = storage_offset + sum(map(mul, offsets, strides))
    origin = (0,) * len(lengths)
    return [
        ChunkRead(
            position,
            payload_offset + start * itemsize,
            _extent(strides, box_lengths)[0] * itemsize,
            dtype,
            strides,
            box_offsets,
            box_lengths,
            _extent(strides, box_lengths)[1],
        )
        for start, box_offsets, box_lengths in _cut(
            first, origin, strides, lengths, slab_nbytes // itemsize, gap_nbytes // itemsize
        )
    ]


@lru_cache(maxsize=4096)
def _extent(strides: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, bool]:
    """Elements from the first to the last of a box, and whether it is one gapless run in row-major order."""
    return extent_of_box(strides, lengths), is_dense_run(strides, lengths)


def _cut(
    start: int,
    offsets: tuple[int, ...],
    strides: tuple[int, ...],
    lengths: tuple[int, ...],
    slab_numel: int,
    gap_numel: int,
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """First element, offsets and lengths of boxes that tile this one, each within a slab and without costly gaps."""
    if extent_of_box(strides, lengths) <= slab_numel and is_dense_run(strides, lengths):
        yield start, offsets, lengths
        return
    longer = [dim for dim, length in enumerate(lengths) if length > 1]
    if not longer:
        yield start, offsets, lengths
        return
    # The outermost dimension in memory, which need not be the first: saved tensors may be transposed.
    dim = max(longer, key=lambda d: strides[d])
    stride = strides[dim]
    inner_lengths = (*lengths[:dim], 1, *lengths[dim + 1 :])
    inner_extent = extent_of_box(strides, inner_lengths)
    rows = 1
    if longest_gap(strides, lengths) <= gap_numel and inner_extent <= slab_numel:
        rows = lengths[dim] if stride == 0 else min(lengths[dim], 1 + (slab_numel - inner_extent) // stride)
    for row in range(0, lengths[dim], rows):
        taken = min(rows, lengths[dim] - row)
        box_start = start + row * stride
        box_offsets = (*offsets[:dim], offsets[dim] + row, *offsets[dim + 1 :])
        box_lengths = (*lengths[:dim], taken, *lengths[dim + 1 :])
        if rows == 1:
            yield from _cut(box_start, box_offsets, strides, box_lengths, slab_numel, gap_numel)
        else:
            yield box_start, box_offsets, box_lengths


def _coalesced(
    path: str, chunks: Sequence[ChunkRead], slab_nbytes: int, gap_nbytes: int, *, large_apart: bool
) -> Iterator[SlabRead]:
    """Reads of one file for its chunks, sorted by byte: as many chunks as a slab holds, where the gaps are short."""
    group: list[ChunkRead] = []
    start = end = 0
    for chunk in chunks:
        chunk_start, nbytes = chunk.byte_offset, chunk.nbytes
        chunk_end = chunk_start + nbytes
        is_straight = large_apart and nbytes >= STRAIGHT_NBYTES and chunk.is_dense
        if group and (is_straight or chunk_end - start > slab_nbytes or chunk_start - end > gap_nbytes):
            yield SlabRead(path, start, end - start, tuple(group), False)
            group = []
        if is_straight:
            yield SlabRead(path, chunk_start, nbytes, (chunk,), True)
            continue
        if not group:
            start, end = chunk_start, chunk_end
        group.append(chunk)
        end = max(end, chunk_end)
    if group:
        yield SlabRead(path, start, end - start, tuple(group), False)


def _with_segments(
    reads: Sequence[SlabRead], checks: Sequence[PayloadCheck]
) -> tuple[tuple[SlabRead, ...], tuple[PayloadCheck, ...]]:
    """Give each read its segments, for those checks whose payload lies within the union of the reads."""
    covered: list[PayloadCheck] = []
    segments: list[list[Segment]] = [[] for _ in reads]
    ends = [(read.path, read.byte_offset + read.nbytes) for read in reads]
    first = 0
    for check in sorted(checks):
        path, cursor, nbytes, _, _ = check
        first = bisect_right(ends, (path, cursor), lo=first)
        end = cursor + nbytes
        if (
            first < len(reads)
            and cursor >= (at := reads[first]).byte_offset
            and end <= ends[first][1]
            and at.path == path
        ):
            segments[first].append(Segment(len(covered), cursor - at.byte_offset, nbytes))  # nearly always
            covered.append(check)
            continue
        found: list[tuple[int, Segment]] = []
        for number in range(first, len(reads)):
            read_path, read_start, read_nbytes, _, _, _ = reads[number]
            if read_path != path or read_start > cursor:
                break
            stop = min(end, read_start + read_nbytes)
            if stop > cursor:
                found.append((number, Segment(len(covered), cursor - read_start, stop - cursor)))
                cursor = stop
            if cursor == end:
                break
        if cursor == end:
            covered.append(check)
            for number, segment in found:
                segments[number].append(segment)
    with_segments = (read._replace(segments=tuple(own)) for read, own in zip(reads, segments, strict=True))
    return tuple(with_segments), tuple(covered)


def whole_payload_request(check: PayloadCheck) -> ReadRequest:
    """A request for every byte of a payload, for no destination: what ``verify="full"`` adds where a part is read."""
    return ReadRequest(
        NO_DESTINATION, check.path, check.payload_offset, torch.uint8, (1,), 0, (0,), (check.payload_nbytes,)
    )
