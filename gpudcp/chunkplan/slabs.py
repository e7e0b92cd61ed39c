"""Cut the plan of a file into slabs: what each holds, and at which of its bytes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gpudcp.chunkplan.save import LiteralWrite, SaveFilePlan

NO_ROW = -1


class Literal(NamedTuple):
    """Known bytes in a slab, but for the places of a payload's CRC-32."""

    slab_offset: int
    data: memoryview
    row: int
    """The write whose payload's CRC-32 goes into this literal; `NO_ROW`: none does."""
    crc_offsets: tuple[int, ...]
    """Where its 4 bytes begin, from the literal's first byte on: below 0 or near the end where slabs divide them."""


class PayloadPart(NamedTuple):
    """Elements of one payload, row-major, that lie in one slab."""

    row: int
    """Of its write in the file's plan."""
    start: int
    """Element of the payload."""
    stop: int
    slab_offset: int


class SlabContents(NamedTuple):
    """One slab of a file. What neither literals nor parts cover is zeros."""

    byte_offset: int
    """In the file."""
    nbytes: int
    literals: tuple[Literal, ...]
    parts: tuple[PayloadPart, ...]


class _Extent(NamedTuple):
    """Bytes of the file that are a literal (``itemsize`` 0) or a payload."""

    start: int
    stop: int
    row: int
    data: bytes
    crc_offsets: tuple[int, ...]
    itemsize: int


def cut_into_slabs(file: SaveFilePlan, *, slab_nbytes: int) -> Iterator[SlabContents]:
    """The file's slabs, in order, each of ``slab_nbytes`` but for the last one.

    A payload is divided between two elements: payloads and slabs are aligned to more than an element.
    """
    extents = _extents(file)
    extent = next(extents, None)
    for begin in range(0, file.nbytes, slab_nbytes):
        end = min(begin + slab_nbytes, file.nbytes)
        literals: list[Literal] = []
        parts: list[PayloadPart] = []
        while extent is not None and extent.start < end:
            start, stop = max(extent.start, begin), min(extent.stop, end)
            from_start = start - extent.start
            if extent.itemsize:
                numels = from_start // extent.itemsize, (stop - extent.start) // extent.itemsize
                parts.append(PayloadPart(extent.row, *numels, start - begin))
            else:
                data = memoryview(extent.data)[from_start : stop - extent.start]
                places = extent.crc_offsets
                if len(data) < len(extent.data):
                    places = tuple(offset - from_start for offset in places if -4 < offset - from_start < len(data))
                literals.append(Literal(start - begin, data, extent.row if places else NO_ROW, places))
            if extent.stop > end:
                break
            extent = next(extents, None)
        yield SlabContents(begin, end - begin, tuple(literals), tuple(parts))


def _extents(file: SaveFilePlan) -> Iterator[_Extent]:
    """All bytes of a file that a write gives, in order; none of them empty."""
    for row, write in enumerate(file.writes):
        cursor = write.byte_offset
        if isinstance(write, LiteralWrite):
            if write.nbytes:
                yield _Extent(cursor, cursor + write.nbytes, row, write.data, (), 0)
            continue
        envelope, payload = write.envelope, write.payload_offset
        yield _Extent(cursor, payload, row, envelope.prefix, (), 0)
        end = payload + envelope.payload_nbytes
        if end > payload:
            yield _Extent(payload, end, row, b"", (), write.dtype.itemsize)
        yield _Extent(end, end + len(envelope.suffix), row, envelope.suffix, envelope.crc_offsets, 0)
