"""Checksums of payloads that arrive in segments."""

from __future__ import annotations

from gpudcp.chunkplan.load import PayloadCheck, Segment
from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats.checksum import crc32_combine


class Checksums:
    """Combines the segments of each payload, in file order, and compares when the last one is there."""

    def __init__(self, checks: tuple[PayloadCheck, ...]) -> None:
        self._checks = checks
        self._found: dict[int, tuple[int, int]] = {}

    @property
    def are_settled(self) -> bool:
        """Whether no payload lacks segments of which others are there."""
        return not self._found

    def add(self, segments: tuple[Segment, ...], crcs: list[int]) -> None:
        """The CRC-32 of each segment of a read.

        Raises:
            CorruptCheckpointError: a payload that is whole now has another CRC-32 than was saved.
        """
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
