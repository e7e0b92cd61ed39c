"""CRC-32 by the kernels, under the interpreter: zlib's, for ranges of any length and alignment, whole or in parts."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from gpudcp_kernels import checksum
from gpudcp_kernels.checksum import SMALL_NBYTES, add_parts, crc32_ranges, finished, new_slots, write_patches
from gpudcp_kernels.chunks import Parts
from gpudcp_kernels.polynomials import Int64s
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")


def random_slab(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Random bytes, and random ones in its padding."""
    padded = np.random.default_rng(seed).integers(0, 256, nbytes + SLAB_PADDING_NBYTES, dtype=np.uint8)
    return torch.from_numpy(padded)[:nbytes]


def int64s(*values: int) -> Int64s:
    return np.array(values, np.int64)


def check(slab: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
    """The kernel's CRCs of (byte offset, bytes) are zlib's."""
    byte_offsets, nbytes = np.array(ranges, np.int64).T
    expected = [zlib.crc32(slab[start : start + n].numpy().tobytes()) for start, n in ranges]
    assert finished(crc32_ranges(slab, byte_offsets, nbytes)).tolist() == expected
    assert finished(checksum.crc32_ranges_reference(slab, byte_offsets, nbytes)).tolist() == expected


def test_short_ranges_at_every_alignment_have_zlibs_crc() -> None:
    """Down to no byte at all, and up to the slab's last byte; what lies around them changes nothing."""
    slab = random_slab(4096)
    check(slab, [(8 * start + start % 4, n) for start in range(16) for n in range(9)])
    check(slab, [(4096 - n, n) for n in range(9)])


def test_small_ranges_of_different_lengths_share_a_launch() -> None:
    """Around the borders of a block of eight lanes, 1024 bytes, and up to the longest small range."""
    slab = random_slab(1 << 16)
    lengths = [1020, 1023, 1024, 1025, 1028, 2047, 2051, 4096, 5000, SMALL_NBYTES - 1, SMALL_NBYTES]
    check(slab, [(5 * row + row % 7, n) for row, n in enumerate(lengths)])


def test_large_ranges_are_cut_into_chunks() -> None:
    """Just above small, around one block and one chunk, and where the initial ones span two chunks."""
    slab = random_slab((1 << 18) + 4096)
    check(slab, [(0, SMALL_NBYTES + 1), (3, 1 << 15), (2, (1 << 16) + 3)])
    check(slab, [(4, 1 << 18), (1, (1 << 18) + 1), (3, (1 << 18) + 3), (16, (1 << 18) + 4)])


@given(
    payload=st.binary(max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    starts=st.lists(st.integers(0, 40), min_size=5, max_size=5),
    order=st.permutations(range(5)),
)
@settings(max_examples=20, deadline=None)
def test_a_payload_in_parts_over_slabs_has_zlibs_crc_in_any_order(
    payload: bytes, cuts: list[int], starts: list[int], order: list[int]
) -> None:
    """Every part lies in a slab of its own, anywhere; parts may be empty."""
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    slots = new_slots(1, CPU)
    for part in (part for part in order if part < len(edges) - 1):
        begin, end = edges[part], edges[part + 1]
        slab = random_slab(256, seed=part)
        slab[starts[part] : starts[part] + end - begin] = torch.tensor(list(payload[begin:end]), dtype=torch.uint8)
        parts = Parts(
            byte_offsets=int64s(starts[part]),
            nbytes=int64s(end - begin),
            slots=int64s(0),
            are_first=np.array([part == 0]),
            nbytes_after=int64s(len(payload) - end),
        )
        add_parts(slots, slab, parts)
    assert finished(slots).tolist() == [zlib.crc32(payload)]


def test_parts_of_many_payloads_go_to_their_own_slots() -> None:
    """Slots in any order, small and large parts together, a payload that goes on in a second slab."""
    slab = random_slab(1 << 17)
    whole = slab.numpy().tobytes()
    slots = new_slots(4, CPU)
    first = Parts(
        byte_offsets=int64s(90_001, 7, 0),
        nbytes=int64s((1 << 17) - 90_001, 50_000, 3),
        slots=int64s(2, 0, 3),
        are_first=np.array([True, True, True]),
        nbytes_after=int64s(1000, 0, 0),
    )
    add_parts(slots, slab, first)
    second = Parts(
        byte_offsets=int64s(0, 1000),
        nbytes=int64s(1000, 0),
        slots=int64s(2, 1),
        are_first=np.array([False, True]),
        nbytes_after=int64s(0, 0),
    )
    add_parts(slots, slab, second)
    expected = [whole[7:50_007], b"", whole[90_001:] + whole[:1000], whole[:3]]
    assert finished(slots).tolist() == [zlib.crc32(payload) for payload in expected]


def test_patches_are_written_at_any_byte_and_nowhere_else() -> None:
    """At all 16 alignments, several for one slot; every other byte stays."""
    slab = random_slab(800)
    slots = torch.from_numpy(np.random.default_rng(1).integers(-(2**31), 2**31, 5).astype(np.int32))
    where = np.arange(300, dtype=np.int64) % 30 * 17
    where = np.unique(where)
    patch_slots = np.arange(len(where), dtype=np.int64) % 5
    expected = slab.clone()
    for slot, start in zip(patch_slots, where, strict=True):
        expected[start : start + 4] = torch.tensor(list(int(slots[slot]).to_bytes(4, "little", signed=True)))
    by_reference = slab.clone()
    checksum.write_patches_reference(by_reference, slots, patch_slots=patch_slots, byte_offsets=where)
    write_patches(slab, slots, patch_slots=patch_slots, byte_offsets=where)
    assert torch.equal(slab, expected)
    assert torch.equal(by_reference, expected)


def test_more_patches_than_a_program_takes_are_all_written() -> None:
    """A second program takes the rest, and no more than the rest."""
    slab = torch.zeros(4 * 300, dtype=torch.uint8)
    slots = torch.arange(1, 302, dtype=torch.int32)
    write_patches(slab, slots, patch_slots=np.arange(299), byte_offsets=4 * np.arange(298, -1, -1))
    assert slab.view(torch.int32).tolist() == [*range(299, 0, -1), 0]


class RecordingKernel:
    """Notes its launches and does nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **options: self.launches.append((grid, options))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordingKernel:
    kernel = RecordingKernel()
    monkeypatch.setattr(checksum, "_crc_kernel", kernel)
    monkeypatch.setattr(checksum, "_patch_kernel", kernel)
    return kernel


def test_however_many_ranges_are_two_launches_of_listed_specialisations(recorded: RecordingKernel) -> None:
    """One for small ranges and one for the others; patches are one more."""
    slab = torch.empty((1 << 20) + SLAB_PADDING_NBYTES, dtype=torch.uint8)[: 1 << 20]
    nbytes = np.arange(3000, dtype=np.int64) * 30
    slots = crc32_ranges(slab, np.zeros(3000, np.int64), nbytes)
    write_patches(slab, slots, patch_slots=np.arange(3000), byte_offsets=4 * np.arange(3000))
    listed = [{**each.constexprs, "num_warps": each.num_warps} for each in checksum.SPECIALISATIONS]
    assert [options for _, options in recorded.launches] == listed
    (small,), (_,), (patches,) = (grid for grid, _ in recorded.launches)
    assert small == -(-int((nbytes <= SMALL_NBYTES).sum()) // 16)
    assert patches == 12


def test_nothing_to_do_launches_nothing(recorded: RecordingKernel) -> None:
    """No range, no patch."""
    slab = random_slab(16)
    assert len(crc32_ranges(slab, int64s(), int64s())) == 0
    write_patches(slab, new_slots(1, CPU), patch_slots=int64s(), byte_offsets=int64s())
    assert recorded.launches == []


def test_what_lies_outside_is_refused_by_row(recorded: RecordingKernel) -> None:
    """Ranges, patches and slots; the message has both numbers."""
    slab, slots = random_slab(100), new_slots(2, CPU)
    with pytest.raises(ValueError, match="row 1: 41 bytes at 60, the slab has 100"):
        crc32_ranges(slab, int64s(0, 60), int64s(100, 41))
    with pytest.raises(ValueError, match="row 0: 4 bytes at -1, the slab has 100"):
        crc32_ranges(slab, int64s(-1), int64s(4))
    with pytest.raises(ValueError, match="row 0: -4 bytes at 8, the slab has 100"):
        crc32_ranges(slab, int64s(8), int64s(-4))
    with pytest.raises(ValueError, match="row 1: 4 bytes at 97, the slab has 100"):
        write_patches(slab, slots, patch_slots=int64s(0, 1), byte_offsets=int64s(96, 97))
    with pytest.raises(ValueError, match="row 0: slot 2, there are 2"):
        write_patches(slab, slots, patch_slots=int64s(2), byte_offsets=int64s(0))
    part = Parts(
        byte_offsets=int64s(0),
        nbytes=int64s(1),
        slots=int64s(-1),
        are_first=np.array([True]),
        nbytes_after=int64s(0),
    )
    with pytest.raises(ValueError, match="row 0: slot -1, there are 2"):
        add_parts(slots, slab, part)
    assert recorded.launches == []


def test_slabs_and_slots_of_another_make_are_refused(recorded: RecordingKernel) -> None:
    """Not aligned, without padding, of another type, or two sizes that do not fit."""
    slab, slots = random_slab(100), new_slots(2, CPU)
    with pytest.raises(ValueError, match=r"slab at address .*, not a multiple of 16"):
        crc32_ranges(slab[4:], int64s(0), int64s(4))
    with pytest.raises(ValueError, match="reads up to byte 100, the slab has 98 with its padding"):
        crc32_ranges(torch.zeros(98, dtype=torch.uint8), int64s(0), int64s(98))
    with pytest.raises(ValueError, match=r"slots are torch\.int64"):
        write_patches(slab, slots.long(), patch_slots=int64s(0), byte_offsets=int64s(0))
    with pytest.raises(ValueError, match=r"1 patch slots, byte offsets of shape \(2,\)"):
        write_patches(slab, slots, patch_slots=int64s(0), byte_offsets=int64s(0, 4))
    assert recorded.launches == []
