"""The cpu executor: the reference for every other one, and their fallback. Host slabs, a thread pool, no device code.

The calling thread packs and checksums (or unpacks), pool threads write (or read and checksum): they overlap, and memory
is the slabs, whatever the model's size. Tensors on a device are copied piece by piece, synchronously.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from gpudcp.boxes import boxes_of_run
from gpudcp.chunkplan.load import (
    NO_DESTINATION,
    STRAIGHT_NBYTES,
    ChunkRead,
    LoadChunkPlan,
    PayloadCheck,
    Segment,
    SlabRead,
)
from gpudcp.chunkplan.save import LiteralWrite, SaveChunkPlan, SaveFilePlan
from gpudcp.errors import CorruptCheckpointError
from gpudcp.executors.base import FileReceipt, LoadTarget, SaveSource
from gpudcp.executors.slabs import HostSlab
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.formats.checksum import crc32, crc32_combine
from gpudcp.formats.envelope import Envelope
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.report import Stopwatch

# Copied, then checksummed, while it is still in the core's cache.
_CACHED_NBYTES = 256 << 10

# Same-dtype copies move bits: as integers, so that dtypes without kernels of their own (float4, complex32) move too.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class CpuExecutor:
    """Packs into and unpacks from a ring of ``lanes`` host slabs."""

    name = "cpu"

    def __init__(self, *, lanes: int, threads: int, has_checksum: bool) -> None:
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
        # A call for each file, so that the slabs of one are gone before the next one's are made.
        return [self._save_file(file, source, open_file, stopwatch) for file in plan.files]

    def _save_file(
        self,
        file: SaveFilePlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> FileReceipt:
        with open_file(file) as writer:
            with ThreadPoolExecutor(self._threads, "gpudcp-write") as pool:
                packer = _Packer(file, writer, pool, lanes=self._lanes, stopwatch=stopwatch)
                with stopwatch.phase("pack"):
                    crcs = self._pack(file, source, packer)
                with stopwatch.phase("write"):
                    packer.drain()
            with stopwatch.phase("fsync"):
                writer.finish(file.nbytes)
        return FileReceipt(file.nbytes, crcs)

    def _pack(self, file: SaveFilePlan, source: SaveSource, packer: _Packer) -> list[int | None]:
        crcs: list[int | None] = []
        for write in file.writes:
            packer.skip_to(write.byte_offset)
            if isinstance(write, LiteralWrite):
                packer.put_bytes(write.data)
                crcs.append(crc32(write.data) if self._has_checksum else None)
                continue
            position, _, nbytes, _, envelope, dtype, _ = write
            tensor = source.resolve(position)
            if not _is_plain_memory(tensor, dtype):
                packer.put_bytes(envelope.prefix)
                crc = packer.put_tensor(tensor.detach(), dtype, 0 if self._has_checksum else None)
                packer.put_bytes(envelope.suffix_with(crc or 0))
            elif nbytes <= packer.room:
                crc = packer.put_small(envelope, tensor.data_ptr(), has_checksum=self._has_checksum)
            else:
                packer.put_bytes(envelope.prefix)
                crc = 0 if self._has_checksum else None
                crc = (packer.put_straight if source.keeps_memory else packer.put_memory)(tensor, crc)
                packer.put_bytes(envelope.suffix_with(crc or 0))
            crcs.append(crc)
        packer.skip_to(file.nbytes)
        return crcs

    def load(
        self,
        plan: LoadChunkPlan,
        target: LoadTarget,
        open_file: Callable[[str], FileReader],
        stopwatch: Stopwatch,
    ) -> None:
        destinations = _Destinations(plan, target)
        checksums = _Checksums(plan.checks)
        slabs = [HostSlab(plan.slab_nbytes) for _ in range(min(self._lanes, len(plan.reads)))]
        in_flight: deque[_ReadInFlight] = deque()
        with ThreadPoolExecutor(self._threads, "gpudcp-read") as pool:

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
                    slab = None
                    if address is not None:
                        # Destinations may share memory, as tied weights do: the read that comes last is to win.
                        while any(earlier.overlaps(address, read.nbytes) for earlier in in_flight):
                            finish_oldest()
                        into = _memory_at(address, read.nbytes)
                    else:
                        slab = slabs.pop()
                        into = slab.view[: read.nbytes]
                    future = pool.submit(_read_and_checksum, open_file(read.path), read, into)
                    in_flight.append(_ReadInFlight(read, slab, address, future))
                while in_flight:
                    finish_oldest()
            finally:
                # After an error: nothing may still be writing into a destination when the caller hears of it.
                for left in in_flight:
                    left.future.cancel()
        with stopwatch.phase("unpack"):
            destinations.commit_empty(plan.empty_positions)


class _Packer:
    """A cursor over one file: what is put goes into slabs, full slabs go to the pool.

    Where the file takes writes of any alignment, large runs of memory go to the pool as they are, past the slabs.
    """

    def __init__(
        self, file: SaveFilePlan, writer: FileWriter, pool: ThreadPoolExecutor, *, lanes: int, stopwatch: Stopwatch
    ) -> None:
        self._writer = writer
        self._pool = pool
        self._stopwatch = stopwatch
        self._lanes = lanes
        self._slab_nbytes = file.slab_nbytes
        nslabs = max(1, min(lanes, -(-file.nbytes // file.slab_nbytes)))
        self._free = [HostSlab(file.slab_nbytes) for _ in range(nslabs)]
        self._in_flight: deque[_WriteInFlight] = deque()
        self._slab = self._free.pop()
        self._start = 0  # of the slab, in the file: always on a block
        self._packed_from = 0  # bytes of the slab before this are not this slab's to write
        self._fill = 0  # bytes of the slab up to this are packed

    @property
    def room(self) -> int:
        """Bytes left in the slab at hand."""
        return self._slab_nbytes - self._fill

    def skip_to(self, byte_offset: int) -> None:
        """Zeros up to ``byte_offset``."""
        if gap := byte_offset - self._start - self._fill:
            self.put_bytes(bytes(gap))

    def put_small(self, envelope: Envelope, address: int, *, has_checksum: bool) -> int | None:
        """A whole item that fits into the slab at hand, its payload from an address; returns the payload's CRC-32."""
        view, start = self._slab.view, self._fill
        payload = start + len(envelope.prefix)
        suffix = payload + envelope.payload_nbytes
        self._fill = suffix + len(envelope.suffix)
        view[start:payload] = envelope.prefix
        ctypes.memmove(self._slab.address + payload, address, envelope.payload_nbytes)
        crc = crc32(view[payload:suffix]) if has_checksum else None
        view[suffix : self._fill] = envelope.suffix_with(crc or 0)
        return crc

    def put_bytes(self, data: bytes) -> None:
        nbytes, taken = len(data), 0
        while taken < nbytes:
            count = min(nbytes - taken, self._usable())
            self._slab.view[self._fill : self._fill + count] = data[taken : taken + count]
            self._fill += count
            taken += count

    def put_memory(self, tensor: torch.Tensor, crc: int | None) -> int | None:
        """The bytes of a plain tensor; returns their CRC-32 appended to what gave ``crc``."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        while nbytes:
            count = min(nbytes, self._usable(), _CACHED_NBYTES)
            ctypes.memmove(self._slab.address + self._fill, address, count)
            if crc is not None:
                crc = crc32(self._slab.view[self._fill : self._fill + count], crc)
            self._fill += count
            address += count
            nbytes -= count
        return crc

    def put_straight(self, tensor: torch.Tensor, crc: int | None) -> int | None:
        """As `put_memory`, for memory that stays as it is: past the slabs, where it is large and the file allows it."""
        if self._writer.alignment_nbytes > 1 or tensor.nbytes < STRAIGHT_NBYTES:
            return self.put_memory(tensor, crc)
        memory = _memory_at(tensor.data_ptr(), tensor.nbytes)
        cursor = self._start + self._fill
        if self._fill > self._packed_from:
            self._send()
            self._slab = self._next_slab()
        for begin in range(0, len(memory), self._slab_nbytes):
            part = memory[begin : begin + self._slab_nbytes]
            if crc is not None:
                crc = crc32(part, crc)
            if len(self._in_flight) >= self._lanes:
                self._finish_oldest()
            self._in_flight.append(_WriteInFlight(self._pool.submit(self._writer.write, part, cursor), None, tensor))
            cursor += len(part)
        # The slab goes on from the block that the cursor is in, so that elements stay aligned in it.
        self._packed_from = self._fill = cursor % SLAB_ALIGNMENT_NBYTES
        self._start = cursor - self._fill
        return crc

    def put_tensor(self, tensor: torch.Tensor, dtype: torch.dtype, crc: int | None) -> int | None:
        """The elements of a tensor of any strides, dtype and device, row-major, cast to ``dtype``."""
        done, numel = 0, tensor.numel()
        if tensor.dtype == dtype and not (tensor.is_conj() or tensor.is_neg()):
            dtype = _CARRIERS[dtype.itemsize]
            tensor = tensor.view(dtype)
        while done < numel:
            # Payloads and slabs are aligned, so a slab ends between two elements.
            count = min(numel - done, self._usable() // dtype.itemsize)
            nbytes = count * dtype.itemsize
            packed = self._slab.tensor[self._fill : self._fill + nbytes].view(dtype)
            taken = 0
            for offsets, lengths in boxes_of_run(tuple(tensor.shape), done, done + count):
                box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
                packed[taken : taken + box.numel()].view(box.shape).copy_(box)
                taken += box.numel()
            if crc is not None:
                crc = crc32(self._slab.view[self._fill : self._fill + nbytes], crc)
            self._fill += nbytes
            done += count
        return crc

    def drain(self) -> None:
        """Send off the last slab and wait for every write."""
        if self._fill > self._packed_from:
            self._send()
        while self._in_flight:
            self._in_flight.popleft().future.result()

    def _usable(self) -> int:
        """The room in the slab at hand, which is a new one if the last is full."""
        if self._fill == self._slab_nbytes:
            self._send()
            self._slab = self._next_slab()
            self._start += self._slab_nbytes
            self._packed_from = self._fill = 0
        return self.room

    def _send(self) -> None:
        end = self._fill
        if self._writer.alignment_nbytes > 1:
            # Whole blocks; what the last one of the file has too much is cut off by `finish`.
            end = -(-end // SLAB_ALIGNMENT_NBYTES) * SLAB_ALIGNMENT_NBYTES
        part, byte_offset = self._slab.view[self._packed_from : end], self._start + self._packed_from
        self._in_flight.append(
            _WriteInFlight(self._pool.submit(self._writer.write, part, byte_offset), self._slab, None)
        )

    def _next_slab(self) -> HostSlab:
        while not self._free:
            self._finish_oldest()
        return self._free.pop()

    def _finish_oldest(self) -> None:
        with self._stopwatch.phase("wait for write"):
            oldest = self._in_flight.popleft()
            oldest.future.result()
        if oldest.slab is not None:
            self._free.append(oldest.slab)


class _WriteInFlight(NamedTuple):
    future: Future[None]
    slab: HostSlab | None
    tensor: torch.Tensor | None
    """Kept alive while its memory is being written."""


def _is_plain_memory(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's bytes, from its address on, are what a file of this dtype holds."""
    return (
        tensor.dtype == dtype
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _memory_at(address: int, nbytes: int) -> memoryview:
    """The memory of a tensor that somebody else keeps alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class _ReadInFlight(NamedTuple):
    read: SlabRead
    slab: HostSlab | None
    address: int | None
    """Where it goes, if that is the destination itself."""
    future: Future[list[int]]

    def overlaps(self, address: int, nbytes: int) -> bool:
        """Whether it goes straight to some of these bytes of memory."""
        return (
            self.address is not None and self.address < address + nbytes and address < self.address + self.read.nbytes
        )


def _read_and_checksum(file: FileReader, read: SlabRead, into: memoryview) -> list[int]:
    """Fill ``into`` and return the CRC-32 of each segment, taken while the bytes are still in the cache."""
    if len(read.segments) == 1 and read.segments[0].nbytes == read.nbytes:
        crc = 0
        for start in range(0, read.nbytes, _CACHED_NBYTES):
            block = into[start : start + _CACHED_NBYTES]
            file.read(block, read.byte_offset + start)
            crc = crc32(block, crc)
        return [crc]
    file.read(into, read.byte_offset)
    return [crc32(into[s.slab_offset : s.slab_offset + s.nbytes]) for s in read.segments]


class _Checksums:
    """Combines the segments of each payload, in file order, and compares when the last one is there."""

    def __init__(self, checks: tuple[PayloadCheck, ...]) -> None:
        self._checks = checks
        self._found: dict[int, tuple[int, int]] = {}

    @property
    def are_settled(self) -> bool:
        """Whether no payload lacks segments of which others are there."""
        return not self._found

    def add(self, segments: tuple[Segment, ...], crcs: list[int]) -> None:
        for segment, crc in zip(segments, crcs, strict=True):
            check = self._checks[segment.check]
            nbytes = segment.nbytes
            if segment.nbytes != check.payload_nbytes:
                before, before_nbytes = self._found.pop(segment.check, (0, 0))
                crc = crc32_combine(before, crc, segment.nbytes)
                nbytes += before_nbytes
                if nbytes != check.payload_nbytes:
                    self._found[segment.check] = (crc, nbytes)
                    continue
            if crc != check.crc32:
                raise CorruptCheckpointError(
                    f"{check.path}: {check.fqn}: the {check.payload_nbytes} bytes at {check.payload_offset} "
                    f"have CRC-32 {crc:#010x}, {check.crc32:#010x} was saved",
                    path=check.path,
                    fqn=check.fqn,
                    expected_crc32=check.crc32,
                    found_crc32=crc,
                )


class _Destinations:
    """Resolves each destination before its first byte and commits it after its last."""

    def __init__(self, plan: LoadChunkPlan, target: LoadTarget) -> None:
        self._target = target
        self._resolved: dict[int, torch.Tensor] = {}
        self._missing = Counter([chunk.position for read in plan.reads for chunk in read.chunks])
        self._filled: list[int] = []

    def straight_address(self, read: SlabRead) -> int | None:
        """The address of the destination's own memory, if the read's bytes can go there as they are."""
        chunk = read.chunks[0]
        if chunk.position == NO_DESTINATION:
            return None
        box = _box(self._tensor(chunk.position), chunk)
        if not _is_plain_memory(box, chunk.dtype):
            return None
        return box.data_ptr()

    def fill(self, read: SlabRead, slab: HostSlab | None) -> None:
        """The read is done: unpack it if it went into a slab."""
        for chunk in read.chunks:
            position = chunk.position
            if position == NO_DESTINATION:
                continue
            if slab is not None:
                _unpack(slab, chunk.byte_offset - read.byte_offset, chunk, self._tensor(position))
            self._missing[position] -= 1
            if not self._missing[position]:
                self._filled.append(position)

    def commit_filled(self) -> None:
        """Commit what has every byte. The caller knows that their checksums were right."""
        for position in self._filled:
            self._target.commit(position, self._resolved.pop(position))
        self._filled.clear()

    def commit_empty(self, positions: tuple[int, ...]) -> None:
        for position in positions:
            self._target.commit(position, self._target.resolve(position))

    def _tensor(self, position: int) -> torch.Tensor:
        tensor = self._resolved.get(position)
        if tensor is None:
            tensor = self._resolved[position] = self._target.resolve(position)
        return tensor


def _box(tensor: torch.Tensor, chunk: ChunkRead) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.lengths, strict=True))]


def _unpack(slab: HostSlab, slab_offset: int, chunk: ChunkRead, tensor: torch.Tensor) -> None:
    dtype = chunk.dtype
    box = tensor if tensor.shape == chunk.lengths else _box(tensor, chunk)
    if chunk.is_dense and _is_plain_memory(box, dtype):
        ctypes.memmove(box.data_ptr(), slab.address + slab_offset, chunk.nbytes)
        return
    packed = slab.tensor[slab_offset : slab_offset + chunk.nbytes]
    if slab_offset % dtype.itemsize:
        packed = packed.clone()  # stock files hold payloads at any byte; a typed view must start on an element
    if box.dtype == dtype and not (box.is_conj() or box.is_neg()):
        dtype = _CARRIERS[dtype.itemsize]
        box = box.view(dtype)
    box.copy_(packed.view(dtype).as_strided(chunk.lengths, chunk.strides))
