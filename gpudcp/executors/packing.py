"""From the tensors of a save to the writes of one file: through host slabs, or straight from their memory."""

from __future__ import annotations

import ctypes
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import torch

from gpudcp.boxes import boxes_of_run
from gpudcp.chunkplan.load import STRAIGHT_NBYTES
from gpudcp.chunkplan.save import ChunkWrite, LiteralWrite, SaveFilePlan
from gpudcp.executors.base import SaveSource
from gpudcp.executors.casting import copy_cast
from gpudcp.executors.memory import CACHED_NBYTES, as_bits, is_plain_memory, memory_at
from gpudcp.executors.slabs import HostSlab
from gpudcp.files.base import FileWriter
from gpudcp.formats.checksum import crc32
from gpudcp.formats.envelope import Envelope
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.report import Stopwatch
from gpudcp.workers import Workers

# A straight write checksums as much and writes it while it is in the last cache; fewer bytes are more system calls.
_STRAIGHT_WRITE_NBYTES = 1 << 20


class Packer:
    """A cursor over one file: what is put goes into slabs, full slabs go to the pool.

    Where the file takes writes of any alignment, large runs of memory go to the pool as they are, past the slabs.
    """

    crcs: list[int | None]
    """CRC-32 of each write that was put, in their order; complete after `finish`. None: not computed."""

    def __init__(
        self,
        file: SaveFilePlan,
        writer: FileWriter,
        pool: Workers,
        *,
        lanes: int,
        has_checksum: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self._file_nbytes = file.nbytes
        self._writer = writer
        self._pool = pool
        self._stopwatch = stopwatch
        self._lanes = lanes
        self._first_crc = 0 if has_checksum else None
        self._slab_nbytes = file.slab_nbytes
        nslabs = max(1, min(lanes, -(-file.nbytes // file.slab_nbytes)))
        self._free = [HostSlab(file.slab_nbytes) for _ in range(nslabs)]
        self._in_flight: deque[_WriteInFlight | _TensorInFlight] = deque()
        self.crcs = []
        self._slab = self._free.pop()
        self._start = 0  # of the slab, in the file: always on a block
        self._packed_from = 0  # bytes of the slab before this are not this slab's to write
        self._fill = 0  # bytes of the slab up to this are packed

    def put(self, write: ChunkWrite | LiteralWrite, source: SaveSource) -> None:
        """One write of the file's plan, in their order."""
        if gap := write.byte_offset - self._start - self._fill:
            self._put_bytes(bytes(gap))
        if isinstance(write, LiteralWrite):
            self._put_bytes(write.data)
            self.crcs.append(None if self._first_crc is None else crc32(write.data))
            return
        position, _, nbytes, _, envelope, dtype, _ = write
        tensor = source.resolve(position)
        is_plain = is_plain_memory(tensor, dtype)
        if is_plain and nbytes <= self._slab_nbytes - self._fill:
            self.crcs.append(self._put_small(envelope, tensor.data_ptr()))
            return
        self._put_bytes(envelope.prefix)
        if is_plain and source.keeps_memory and self._goes_straight(tensor):
            self._put_straight(envelope, tensor)
            return
        crc = self._put_memory(tensor) if is_plain else self._put_tensor(tensor.detach(), dtype)
        self._put_bytes(envelope.suffix_with(crc or 0))
        self.crcs.append(crc)

    def finish(self) -> None:
        """Put the zeros after the last write, send off the last slab, and wait for every write."""
        if gap := self._file_nbytes - self._start - self._fill:
            self._put_bytes(bytes(gap))
        if self._fill > self._packed_from:
            self._send()
        while self._in_flight:
            self._finish_oldest()

    def _put_small(self, envelope: Envelope, address: int) -> int | None:
        """A whole item that fits into the slab at hand, its payload from an address; returns the payload's CRC-32."""
        view, start = self._slab.view, self._fill
        payload = start + len(envelope.prefix)
        suffix = payload + envelope.payload_nbytes
        self._fill = suffix + len(envelope.suffix)
        view[start:payload] = envelope.prefix
        ctypes.memmove(self._slab.address + payload, address, envelope.payload_nbytes)
        crc = None if self._first_crc is None else crc32(view[payload:suffix])
        view[suffix : self._fill] = envelope.suffix_with(crc or 0)
        return crc

    def _put_bytes(self, data: bytes) -> None:
        nbytes, taken = len(data), 0
        while taken < nbytes:
            count = min(nbytes - taken, self._usable())
            self._slab.view[self._fill : self._fill + count] = data[taken : taken + count]
            self._fill += count
            taken += count

    def _put_memory(self, tensor: torch.Tensor) -> int | None:
        """The bytes of a plain tensor; returns their CRC-32."""
        address, nbytes, crc = tensor.data_ptr(), tensor.nbytes, self._first_crc
        while nbytes:
            count = min(nbytes, self._usable(), CACHED_NBYTES)
            ctypes.memmove(self._slab.address + self._fill, address, count)
            if crc is not None:
                crc = crc32(self._slab.view[self._fill : self._fill + count], crc)
            self._fill += count
            address += count
            nbytes -= count
        return crc

    def _goes_straight(self, tensor: torch.Tensor) -> bool:
        return self._writer.alignment_nbytes == 1 and tensor.nbytes >= STRAIGHT_NBYTES

    def _put_straight(self, envelope: Envelope, tensor: torch.Tensor) -> None:
        """Memory that stays as it is, past the slabs, and the suffix: a pool thread knows the CRC-32 first."""
        cursor = self._start + self._fill
        if self._fill > self._packed_from:
            self._send()
            self._slab = self._next_slab()
        while len(self._in_flight) >= self._lanes:
            self._finish_oldest()
        future = self._pool.submit(self._write_straight, envelope, memory_at(tensor.data_ptr(), tensor.nbytes), cursor)
        self._in_flight.append(_TensorInFlight(future, tensor, len(self.crcs)))
        self.crcs.append(None)
        # The slab goes on from the block that the cursor is in, so that elements stay aligned in it.
        cursor += envelope.payload_nbytes + len(envelope.suffix)
        self._packed_from = self._fill = cursor % SLAB_ALIGNMENT_NBYTES
        self._start = cursor - self._fill

    def _write_straight(self, envelope: Envelope, memory: memoryview, byte_offset: int) -> int | None:
        crc = self._first_crc
        step = min(self._slab_nbytes, _STRAIGHT_WRITE_NBYTES)
        for begin in range(0, len(memory), step):
            part = memory[begin : begin + step]
            if crc is not None:
                crc = crc32(part, crc)
            self._writer.write(part, byte_offset + begin)
        self._writer.write(memoryview(envelope.suffix_with(crc or 0)), byte_offset + len(memory))
        return crc

    def _put_tensor(self, tensor: torch.Tensor, dtype: torch.dtype) -> int | None:
        """The elements of a tensor of any strides, dtype and device, row-major, cast to ``dtype``."""
        done, numel, crc = 0, tensor.numel(), self._first_crc
        tensor, dtype = as_bits(tensor, dtype)
        while done < numel:
            # Payloads and slabs are aligned, so a slab ends between two elements.
            count = min(numel - done, self._usable() // dtype.itemsize)
            nbytes = count * dtype.itemsize
            packed = self._slab.tensor[self._fill : self._fill + nbytes].view(dtype)
            taken = 0
            for offsets, lengths in boxes_of_run(tuple(tensor.shape), done, done + count):
                box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
                copy_cast(packed[taken : taken + box.numel()].view(box.shape), box)
                taken += box.numel()
            if crc is not None:
                crc = crc32(self._slab.view[self._fill : self._fill + nbytes], crc)
            self._fill += nbytes
            done += count
        return crc

    def _usable(self) -> int:
        """The room in the slab at hand, which is a new one if the last is full."""
        if self._fill == self._slab_nbytes:
            self._send()
            self._slab = self._next_slab()
            self._start += self._slab_nbytes
            self._packed_from = self._fill = 0
        return self._slab_nbytes - self._fill

    def _send(self) -> None:
        end = self._fill
        if self._writer.alignment_nbytes > 1:
            # Whole blocks; what the last one of the file has too much is cut off by the writer's `finish`.
            end = -(-end // SLAB_ALIGNMENT_NBYTES) * SLAB_ALIGNMENT_NBYTES
        part, byte_offset = self._slab.view[self._packed_from : end], self._start + self._packed_from
        future = self._pool.submit(self._writer.write, part, byte_offset)
        self._in_flight.append(_WriteInFlight(future, self._slab))

    def _next_slab(self) -> HostSlab:
        while not self._free:
            self._finish_oldest()
        return self._free.pop()

    def _finish_oldest(self) -> None:
        with self._stopwatch.phase("write"):
            oldest = self._in_flight.popleft()
            crc = oldest.future.result()
        if isinstance(oldest, _WriteInFlight):
            self._free.append(oldest.slab)
        else:
            self.crcs[oldest.row] = crc


class _WriteInFlight(NamedTuple):
    future: Future[None]
    slab: HostSlab


class _TensorInFlight(NamedTuple):
    future: Future[int | None]
    tensor: torch.Tensor
    """Kept alive while its memory is being written."""
    row: int
    """Of its CRC-32."""
