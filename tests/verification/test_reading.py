"""Comparison: slabs, lanes and the file system's errors. What is compared with what is `tests/test_verify.py`'s."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest

from gpudcp.errors import TransferError
from gpudcp.verification.expected import Expected, ExpectedFile, Part
from gpudcp.verification.reading import Comparison

SLAB_NBYTES = 4096
CONTENT = bytes(number * 7 % 251 for number in range(10 * SLAB_NBYTES + 123))


class MemoryReader:
    """A file that notes what is read of it, with blocks that cannot be."""

    path = "file"

    def __init__(self, content: bytes, *, broken: tuple[int, ...] = ()) -> None:
        self.content = content
        self.nbytes = len(content)
        self.reads: list[tuple[int, int]] = []
        self._broken = broken

    def read(self, into: memoryview, byte_offset: int) -> None:
        self.reads.append((byte_offset, len(into)))
        if byte_offset in self._broken:
            raise TransferError("file: read failed: Input/output error", path="file", byte_offset=byte_offset)
        into[:] = self.content[byte_offset : byte_offset + len(into)]

    @property
    def close(self) -> Callable[[], object]:
        return lambda: None


def item(fqn: str, start: int, stop: int) -> Expected:
    """These bytes of ``CONTENT``, by their checksum."""
    part = Part(start, stop, "bytes", crc32=zlib.crc32(CONTENT[start:stop]))
    return Expected(fqn, start, stop, lambda: (part,))


def whole_file() -> ExpectedFile:
    """A small item, one of several slabs, and one of several more."""
    bounds = [0, 1000, 3 * SLAB_NBYTES + 5, len(CONTENT)]
    items = [item(fqn, *each) for fqn, each in zip("abc", pairwise(bounds), strict=True)]
    return ExpectedFile("file", items, len(CONTENT))


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_byte_is_read_once_in_slabs(lanes: int) -> None:
    """In file order, where there is one lane."""
    reader, comparison = MemoryReader(CONTENT), Comparison(lanes=lanes, slab_nbytes=SLAB_NBYTES)
    comparison.run([(whole_file(), reader)])
    assert comparison.problems == []
    assert comparison.nbytes == len(CONTENT)
    starts = range(0, len(CONTENT), SLAB_NBYTES)
    expected = [(start, min(SLAB_NBYTES, len(CONTENT) - start)) for start in starts]
    assert (reader.reads if lanes == 1 else sorted(reader.reads)) == expected


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_item_that_several_slabs_share_is_checked_as_a_whole(lanes: int) -> None:
    """Whichever of its bytes differs."""
    for position in (1000, 2 * SLAB_NBYTES, 3 * SLAB_NBYTES + 4):
        content = bytearray(CONTENT)
        content[position] ^= 1
        comparison = Comparison(lanes=lanes, slab_nbytes=SLAB_NBYTES)
        comparison.run([(whole_file(), MemoryReader(bytes(content)))])
        assert [(problem.kind, problem.fqn) for problem in comparison.problems] == [("checksum", "b")]


def test_a_slab_that_cannot_be_read_is_a_problem_and_the_others_are_compared() -> None:
    """Of an item that it has a part of nothing is said: it may be sound."""
    content = bytearray(CONTENT)
    content[5], content[2 * SLAB_NBYTES], content[-1] = 1, 1, 1
    reader = MemoryReader(bytes(content), broken=(SLAB_NBYTES,))
    comparison = Comparison(lanes=1, slab_nbytes=SLAB_NBYTES)
    comparison.run([(whole_file(), reader)])
    found = [(problem.kind, problem.fqn, problem.byte_offset) for problem in comparison.problems]
    assert found == [("checksum", "a", 0), ("read", None, SLAB_NBYTES), ("checksum", "c", 3 * SLAB_NBYTES + 5)]
    assert "Input/output error" in comparison.problems[1].found
    assert comparison.nbytes == len(CONTENT) - SLAB_NBYTES


def test_bytes_that_are_known_and_gaps_are_compared_to_the_byte() -> None:
    """Over the border of two slabs; a part without anything to compare is only read."""
    known = Part(SLAB_NBYTES - 3, SLAB_NBYTES + 3, "envelope", data=b"abcdef")
    gap = Part(SLAB_NBYTES + 3, 3 * SLAB_NBYTES, "gap", is_zero=True)
    free = Part(0, SLAB_NBYTES - 3, "bytes")
    items = [
        Expected("a", 0, SLAB_NBYTES + 3, lambda: (free, known)),
        Expected(None, gap.start, gap.stop, lambda: (gap,)),
    ]
    content = bytearray(3 * SLAB_NBYTES)
    content[known.start : known.stop] = b"abcdef"
    content[0] = 9

    def problems_of(data: bytearray) -> list[tuple[str, str | None, int | None]]:
        comparison = Comparison(lanes=1, slab_nbytes=SLAB_NBYTES)
        comparison.run([(ExpectedFile("file", items, len(data)), MemoryReader(bytes(data)))])
        return [(problem.kind, problem.fqn, problem.byte_offset) for problem in comparison.problems]

    assert problems_of(content) == []
    content[SLAB_NBYTES + 1] ^= 1
    content[2 * SLAB_NBYTES + 7] = 1
    assert problems_of(content) == [("envelope", "a", SLAB_NBYTES + 1), ("gap", None, 2 * SLAB_NBYTES + 7)]


def test_an_error_in_a_lane_ends_the_run_and_is_raised() -> None:
    """Not one of the file system: a fault of ours is never a problem of the checkpoint."""

    def broken() -> tuple[Part, ...]:
        raise ZeroDivisionError

    file = ExpectedFile("file", [Expected("a", 0, len(CONTENT), broken)], len(CONTENT))
    with pytest.raises(ZeroDivisionError):
        Comparison(lanes=2, slab_nbytes=SLAB_NBYTES).run([(file, MemoryReader(CONTENT))])
