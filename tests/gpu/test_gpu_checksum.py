"""CRC-32 and patches on a GPU, against zlib and the references."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, need_device_memory, needs_gpu_itself, on_device, random_bytes
from gpudcp_kernels.checksum import (
    SMALL_NBYTES,
    add_parts,
    crc32_ranges,
    finished,
    new_slots,
    write_patches,
    write_patches_reference,
)
from gpudcp_kernels.chunks import Parts
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES, Int64s

pytestmark = [pytest.mark.gpu, pytest.mark.ptx]


def check(nbytes: int, byte_offsets: Int64s, lengths: Int64s) -> None:
    """CRCs of ranges of a random slab, by the kernel and by zlib; the slab stays as it was."""
    host = random_bytes(nbytes + SLAB_PADDING_NBYTES, seed=nbytes)
    memory = on_device(host)
    found = finished(crc32_ranges(memory[:nbytes], byte_offsets, lengths))
    data = host.numpy().data
    expected = [zlib.crc32(data[start : start + n]) for start, n in zip(byte_offsets, lengths, strict=True)]
    wrong = np.flatnonzero(found != np.array(expected, np.uint32))
    assert [(int(byte_offsets[row]), int(lengths[row])) for row in wrong[:5]] == []
    assert torch.equal(memory.cpu(), host)


def test_every_length_up_to_two_thousand_bytes_has_zlibs_crc() -> None:
    """From zero bytes on, each at another alignment."""
    lengths = np.arange(2001)
    check(1 << 14, lengths * 7 % 8192, lengths)


def test_every_alignment_has_zlibs_crc() -> None:
    """At all sixteen, of lengths around a word, a lane's stride and a block; and at the end of the slab."""
    lengths = np.array([0, 1, 3, 4, 5, 31, 32, 33, 255, 1023, 1024, 1025, 4096, 5001])
    starts = np.repeat(np.arange(16), len(lengths))
    check(1 << 14, starts, np.tile(lengths, 16))
    check(1 << 14, (1 << 14) - lengths, lengths)


def test_ranges_of_mebibytes_have_zlibs_crc() -> None:
    """Around the small ranges' end, one chunk, several chunks; odd starts and odd ends."""
    mebibyte = 1 << 20
    lengths = np.array(
        [
            *(SMALL_NBYTES - 1, SMALL_NBYTES, SMALL_NBYTES + 1, SMALL_NBYTES + 5, 1 << 18, (1 << 18) + 1),
            *((1 << 18) + 3, mebibyte - 1, mebibyte, mebibyte + 7, 5 * mebibyte + 2, 64 * mebibyte + 3),
        ]
    )
    starts = np.arange(len(lengths)) * 5 % 17
    check(66 * mebibyte, starts, lengths)


def test_twenty_thousand_ranges_have_zlibs_crc() -> None:
    """Small and large ones in one call."""
    lengths = np.random.default_rng(3).integers(0, 8192, 20_000)
    lengths[::2500] = 300_007
    check(int(lengths.sum()) + 3, 3 + np.cumsum(lengths) - lengths, lengths)


def test_ranges_beyond_four_gigabytes_have_zlibs_crc() -> None:
    """Where a 32-bit count of bytes or words would turn over; and one range of more than 2^31 bytes."""
    nbytes = (1 << 32) + (1 << 20)
    if (why := need_device_memory(2 * nbytes)) is not None:
        pytest.skip(why)
    memory = torch.empty(nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device=DEVICE).random_()
    starts = np.array([(1 << 32) - 5, (1 << 31) - 3, (1 << 32) + 9, 1])
    lengths = np.array([1000, 70_001, 500_000, (1 << 31) + 12_345])
    found = finished(crc32_ranges(memory[:nbytes], starts, lengths)).tolist()
    assert found == [
        zlib.crc32(memory[a : a + n].cpu().numpy().data) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


@needs_gpu_itself
def test_a_payload_over_many_slabs_has_zlibs_crc() -> None:
    """Its parts in slabs of their own, added in any order, on two streams."""
    payload = random_bytes(3_000_017, seed=5)
    edges = [0, 7, 7, 1_000_003, 1_000_004, 2_500_000, 3_000_017]
    slots = new_slots(3, DEVICE)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for number in (4, 0, 5, 2, 1, 3):
        begin, end = edges[number], edges[number + 1]
        with torch.cuda.stream(streams[number % 2]):
            memory = torch.empty(end - begin + 64 + SLAB_PADDING_NBYTES, dtype=torch.uint8, device=DEVICE).random_()
            memory[number : number + end - begin] = payload[begin:end].to(DEVICE)
            parts = Parts(
                byte_offsets=np.array([number]),
                nbytes=np.array([end - begin]),
                slots=np.array([1]),
                are_first=np.array([number == 0]),
                nbytes_after=np.array([len(payload) - end]),
            )
            add_parts(slots, memory[: end - begin + 64], parts)
    torch.cuda.synchronize()
    assert finished(slots).tolist()[1] == zlib.crc32(payload.numpy().data)


def test_patches_are_written_at_any_byte_and_nowhere_else() -> None:
    """Thousands of them, at all alignments, out of slots that were just filled on the same stream."""
    host = random_bytes(100_000 + SLAB_PADDING_NBYTES, seed=9)
    memory, slab_nbytes = on_device(host), 100_000
    lengths = np.arange(3000) % 700
    slots = crc32_ranges(memory[:slab_nbytes], np.arange(3000), lengths)
    places = np.arange(3000) * 33 + np.arange(3000) % 16
    write_patches(memory[:slab_nbytes], slots, patch_slots=np.arange(3000)[::-1].copy(), byte_offsets=places)
    expected = host.clone()
    write_patches_reference(
        expected[:slab_nbytes], slots.cpu(), patch_slots=np.arange(3000)[::-1].copy(), byte_offsets=places
    )
    assert torch.equal(memory.cpu(), expected)
