"""The cpu executor: the reference for every other one, and their fallback. Host slabs, thread pools, no device code.

The calling thread packs and checksums (or unpacks), pool threads write (or read and checksum): they overlap, and memory
is the slabs, whatever the model's size. Tensors on a device are copied piece by piece, synchronously.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import merge

from gpudcp.arrays import Int64
from gpudcp.chunkplan.load import NO_DESTINATION, LoadChunkPlan, SlabRead
from gpudcp.chunkplan.save import ChunkWrite, LiteralWrite, SaveChunkPlan, SaveFilePlan
from gpudcp.executors.base import FileReceipt, LoadTarget, SaveSource
from gpudcp.executors.memory import CACHED_NBYTES, memory_at
from gpudcp.executors.overlaps import extents_of
from gpudcp.executors.packing import Packer
from gpudcp.executors.slabs import HostSlab
from gpudcp.executors.unpacking import Destinations
from gpudcp.executors.verifying import Checksums
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.formats import checksum
from gpudcp.formats.checksum import crc32
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.report import Stopwatch
from gpudcp.workers import Workers


class CpuExecutor:
    """Packs into and unpacks from a ring of ``lanes`` host slabs."""

    name = "cpu"
    checksum = checksum.LIBRARY
    reads_large_apart = True  # straight into the destination

    def __init__(self, *, lanes: int, threads: int, slab_nbytes: int, has_checksum: bool) -> None:
        self.slab_nbytes = slab_nbytes
        self._lanes = lanes
        self._threads = threads
        self._has_checksum = has_checksum

    def save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        # Files of one group are written side by side and share the lanes and the threads.
        width = min(self._lanes, self._threads)
        groups = [plan.files[first : first + width] for first in range(0, len(plan.files), width)]
        return [receipt for files in groups for receipt in self._save_files(files, source, open_file, stopwatch)]

    def _save_files(
        self,
        files: Sequence[SaveFilePlan],
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        with ExitStack() as stack:
            writers = [stack.enter_context(open_file(file)) for file in files]
            packers: list[Packer] = []
            for file, writer in zip(files, writers, strict=True):
                # After an error too, every write has ended before its file is removed.
                pool = stack.enter_context(Workers(self._threads // len(files), "gpudcp-write"))
                lanes = self._lanes // len(files)
                packers.append(
                    Packer(file, writer, pool, lanes=lanes, has_checksum=self._has_checksum, stopwatch=stopwatch)
                )
            with stopwatch.phase("pack"):
                for number, write in _in_turn(files):
                    packers[number].put(write, source)
            for packer in packers:
                packer.finish()
            with stopwatch.phase("fsync"):
                for file, writer in zip(files, writers, strict=True):
                    writer.finish(file.nbytes)
        return [FileReceipt(file.nbytes, packer.crcs) for file, packer in zip(files, packers, strict=True)]

    def load(
        self,
        plan: LoadChunkPlan,
        target: LoadTarget,
        open_file: Callable[[str], FileReader],
        stopwatch: Stopwatch,
    ) -> None:
        destinations = Destinations(plan, target)
        checksums = Checksums(plan.checks)
        # With room for reads of whole blocks.
        slab_nbytes = plan.slab_nbytes + SLAB_ALIGNMENT_NBYTES
        slabs = [HostSlab(slab_nbytes) for _ in range(min(self._lanes, len(plan.reads)))]
        in_flight: deque[_ReadInFlight] = deque()
        with Workers(self._threads, "gpudcp-read") as pool:

            def finish_oldest() -> None:
                done = in_flight.popleft()
                with stopwatch.phase("read"):
                    crcs = done.future.result()
                checksums.add(done.read.segments, crcs)
                with stopwatch.phase("unpack"):
                    destinations.fill(done.read, done.slab)
                    if checksums.are_settled:
                        destinations.commit_filled()
                if done.slab is not None:
                    slabs.append(done.slab)

            try:
                for read in plan.reads:
                    if len(in_flight) == self._lanes:
                        finish_oldest()
                    with stopwatch.phase("resolve"):
                        address = destinations.straight_address(read) if read.is_straight else None
                    slab, file = None, open_file(read.path)
                    if address is not None:
                        # Destinations may share memory, as tied weights do: the read that comes last is to win.
                        while any(earlier.reaches(address, read.nbytes, destinations) for earlier in in_flight):
                            finish_oldest()
                        into = memory_at(address, read.nbytes)
                    else:
                        slab = slabs.pop()
                        read = read.in_blocks(block_nbytes=file.alignment_nbytes, file_nbytes=file.nbytes)
                        into = slab.view[: read.nbytes]
                    future = pool.submit(_read_and_checksum, file, read, into)
                    in_flight.append(_ReadInFlight(read, slab, future))
                while in_flight:
                    finish_oldest()
            finally:
                # After an error: nothing may still be writing into a destination when the caller hears of it.
                for left in in_flight:
                    left.future.cancel()
        with stopwatch.phase("unpack"):
            destinations.commit_empty(plan.empty_positions)


def _in_turn(files: Sequence[SaveFilePlan]) -> Iterator[tuple[int, ChunkWrite | LiteralWrite]]:
    """The writes of all files, with the number of their file, so that all files grow at one pace."""
    if len(files) == 1:
        return ((0, write) for write in files[0].writes)
    numbered = [[(write.byte_offset, number, write) for write in file.writes] for number, file in enumerate(files)]
    return ((number, write) for _, number, write in merge(*numbered, key=lambda each: each[0]))


@dataclass(slots=True)
class _ReadInFlight:
    read: SlabRead
    slab: HostSlab | None
    """None: it goes straight to its destination."""
    future: Future[list[int]]
    extents: Int64 | None = None
    """Of its destinations, where they had to be known."""

    def reaches(self, address: int, nbytes: int, destinations: Destinations) -> bool:
        """Whether it may fill some of these bytes of memory, now or when it is unpacked."""
        if self.extents is None:
            boxes = [destinations.box(chunk) for chunk in self.read.chunks if chunk.position != NO_DESTINATION]
            self.extents = extents_of(boxes)
        starts, ends = self.extents.T
        return bool(((starts < address + nbytes) & (address < ends)).any())


def _read_and_checksum(file: FileReader, read: SlabRead, into: memoryview) -> list[int]:
    """Fill ``into`` and return the CRC-32 of each segment, taken while the bytes are still in the cache."""
    if len(read.segments) == 1 and read.segments[0].nbytes == read.nbytes:
        crc = 0
        for start in range(0, read.nbytes, CACHED_NBYTES):
            block = into[start : start + CACHED_NBYTES]
            file.read(block, read.byte_offset + start)
            crc = crc32(block, crc)
        return [crc]
    file.read(into, read.byte_offset)
    return [crc32(into[s.slab_offset : s.slab_offset + s.nbytes]) for s in read.segments]
