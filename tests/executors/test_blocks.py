"""Files that are read by whole blocks, as past the page cache: every read of a slab, whatever it begins and ends at."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from executor_fakes import BlockFiles, DeviceFiles, Files, MemoryBackend, PosixBackend, Target, random_tensor
from executor_rings import Ring

from gpudcp.chunkplan.load import LoadChunkPlan, PayloadCheck, ReadRequest, plan_load
from gpudcp.errors import CorruptCheckpointError, TransferError
from gpudcp.files.filesystems import supports_direct_io
from gpudcp.files.posix import PosixReader
from gpudcp.report import Stopwatch

EXECUTORS = ["cpu", "interpret"]
SLAB_NBYTES = 8192


@pytest.fixture(params=EXECUTORS)
def ring(request: pytest.FixtureRequest) -> Ring:
    """An executor with a few small slabs."""
    return Ring(request.param, lanes=2, threads=2, slab_nbytes=SLAB_NBYTES)


def laid_out(
    payloads: Sequence[torch.Tensor], *, alignment_nbytes: int, before: int = 0, after: int = 0
) -> tuple[bytes, list[ReadRequest], list[PayloadCheck]]:
    """A file with each payload on such an alignment, as stock's have them, and what reads and checks it whole."""
    data, requests, checks = bytearray(b"\xee" * before), [], []
    for position, payload in enumerate(payloads):
        data += b"\xee" * (-len(data) % alignment_nbytes)
        start, nbytes = len(data), payload.nbytes
        data += payload.numpy().tobytes()
        requests.append(ReadRequest(position, "file", start, torch.uint8, (1,), 0, (0,), (nbytes,)))
        if nbytes:
            checks.append(PayloadCheck("file", start, nbytes, zlib.crc32(data[start:]), f"tensor.{position}"))
    return bytes(data + b"\xee" * after), requests, checks


def payload_of(nbytes: int) -> torch.Tensor:
    return random_tensor(nbytes, dtype=torch.uint8)


def loaded(ring: Ring, files: MemoryBackend | PosixBackend | Files, plan: LoadChunkPlan, npayloads: int) -> list[bytes]:
    """What one load gives each destination, which is committed."""
    nbytes = [0] * npayloads
    for read in plan.reads:
        for chunk in read.chunks:
            nbytes[chunk.position] = max(nbytes[chunk.position], chunk.offsets[0] + chunk.lengths[0])
    target = Target({number: payload_of(count).zero_() for number, count in enumerate(nbytes)})
    open_file = files.open_reader if isinstance(files, Files) else files.open
    ring.make().load(plan, target, open_file, Stopwatch())
    assert sorted(target.committed) == list(range(npayloads))
    return [target.committed[number] for number in range(npayloads)]


PAYLOADS = [100, 3 * SLAB_NBYTES, 1, 5000, 64, SLAB_NBYTES, 4096]


@pytest.mark.parametrize("backend", [BlockFiles, DeviceFiles])
@pytest.mark.parametrize("before", [0, 64, 4095])
def test_a_plan_for_payloads_anywhere_asks_for_whole_blocks(
    ring: Ring, backend: type[BlockFiles | DeviceFiles], before: int
) -> None:
    """And for no more than one block's worth of bytes more at either end of a read; never for any beyond the file."""
    payloads = [payload_of(nbytes) for nbytes in PAYLOADS]
    data, requests, checks = laid_out(payloads, alignment_nbytes=64, before=before, after=1234)
    files = backend()
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=100)
    assert any(read.byte_offset % 4096 for read in plan.reads)
    assert max(read.nbytes for read in plan.reads) == SLAB_NBYTES
    assert loaded(ring, files, plan, len(payloads)) == [payload.numpy().tobytes() for payload in payloads]
    if isinstance(files, DeviceFiles) and ring.executor == "cpu":
        return  # takes host memory, and so not what is counted
    assert len(files.moved) == len(plan.reads)
    for call, read in zip(sorted(files.moved, key=lambda call: call.byte_offset), plan.reads, strict=True):
        end, read_end = call.byte_offset + call.nbytes, read.byte_offset + read.nbytes
        assert read.byte_offset - 4096 < call.byte_offset <= read.byte_offset
        assert read_end <= end < read_end + 4096
        assert end <= len(data)
        assert call.address % 4096 == call.byte_offset % 4096 == 0
        assert end % 4096 == 0 or end == len(data)


def test_other_files_are_asked_for_what_is_planned_and_nothing_else(ring: Ring) -> None:
    """Through the page cache, or over a network, nothing is gained by whole blocks."""
    payloads = [payload_of(nbytes) for nbytes in PAYLOADS]
    data, requests, checks = laid_out(payloads, alignment_nbytes=64, before=7, after=1234)
    files = Files(MemoryBackend())
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=100)
    assert loaded(ring, files, plan, len(payloads)) == [payload.numpy().tobytes() for payload in payloads]
    found = sorted((call.byte_offset, call.nbytes) for call in files.calls_of("read"))
    assert found == [(read.byte_offset, read.nbytes) for read in plan.reads]


@pytest.mark.parametrize("file_nbytes", [1, 4095, 4096, 4097, 8193, 12287])
def test_a_single_byte_of_a_file_of_any_length_is_read(ring: Ring, file_nbytes: int) -> None:
    """The first one, the last one, and those at the edges of blocks."""
    files = BlockFiles()
    data = payload_of(file_nbytes).numpy().tobytes()
    files.put("file", data)
    places = sorted({0, file_nbytes - 1} | {place for place in (1, 4095, 4096, 8191, 8192) if place < file_nbytes})
    requests = [
        ReadRequest(number, "file", place, torch.uint8, (1,), 0, (0,), (1,)) for number, place in enumerate(places)
    ]
    checks = [PayloadCheck("file", place, 1, zlib.crc32(data[place : place + 1]), f"byte.{place}") for place in places]
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=0)
    assert loaded(ring, files, plan, len(places)) == [data[place : place + 1] for place in places]


def test_nothing_is_read_of_an_empty_file(ring: Ring) -> None:
    """Its items are resolved and committed all the same."""
    files = BlockFiles()
    data, requests, checks = laid_out([payload_of(0)], alignment_nbytes=64)
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=0)
    assert loaded(ring, files, plan, 1) == [b""]
    assert files.moved == []


@pytest.mark.parametrize("nbytes", [0, 4096, 5000, 3 * SLAB_NBYTES + 63])
def test_a_file_shorter_than_the_plan_is_an_error(ring: Ring, nbytes: int) -> None:
    """By one byte, by whole slabs, or by all of it."""
    files = BlockFiles()
    data, requests, checks = laid_out([payload_of(3 * SLAB_NBYTES)], alignment_nbytes=64, before=64)
    files.put("file", data[:nbytes])
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=0)
    target = Target({0: payload_of(3 * SLAB_NBYTES)})
    with pytest.raises(TransferError):
        ring.make().load(plan, target, files.open, Stopwatch())
    assert target.committed == {}


@pytest.mark.parametrize("place", [64, 64 + SLAB_NBYTES, 63 + 3 * SLAB_NBYTES])
def test_a_flipped_bit_is_found_and_one_beside_the_payload_is_not(ring: Ring, place: int) -> None:
    """What is read around a payload is no part of it."""
    payload = payload_of(3 * SLAB_NBYTES)
    data, requests, checks = laid_out([payload], alignment_nbytes=64, before=64, after=10)
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=0)
    files, damaged = BlockFiles(), bytearray(data)
    damaged[63] ^= 1
    damaged[-10] ^= 1
    files.put("file", bytes(damaged))
    assert loaded(ring, files, plan, 1) == [payload.numpy().tobytes()]
    damaged[place] ^= 1
    files.put("file", bytes(damaged))
    with pytest.raises(CorruptCheckpointError):
        loaded(ring, files, plan, 1)


@pytest.mark.parametrize("after", [0, 1000])
def test_only_the_end_of_a_file_goes_through_the_page_cache(
    ring: Ring, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing, with payloads on multiples of 64 bytes, as stock writes them."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    payloads = [payload_of(nbytes) for nbytes in PAYLOADS]
    data, requests, checks = laid_out(payloads, alignment_nbytes=64, before=64, after=after)
    files = PosixBackend(tmp_path, is_direct=True)
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=SLAB_NBYTES, gap_nbytes=100)
    calls: list[tuple[bool, int, int]] = []
    opened: list[PosixReader] = []
    preadv = os.preadv

    def open_file(path: str) -> PosixReader:
        opened.append(PosixReader(str(tmp_path / path), is_direct=True))
        return opened[-1]

    def recording(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((any(fd == file._direct_fd for file in opened), offset, len(buffers[0])))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(files, "open", open_file)
    monkeypatch.setattr(os, "preadv", recording)
    assert loaded(ring, files, plan, len(payloads)) == [payload.numpy().tobytes() for payload in payloads]
    last = len(data) // 4096 * 4096
    buffered = {(offset, nbytes) for is_direct, offset, nbytes in calls if not is_direct}
    assert buffered <= {(last, len(data) - last)}
    assert sum(nbytes for is_direct, _, nbytes in calls if is_direct) >= plan.nbytes - 4096
