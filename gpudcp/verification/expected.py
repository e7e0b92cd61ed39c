"""What the bytes of a data file should be: each item's parts, and what stands between the items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from gpudcp.arrays import Int64
from gpudcp.errors import CorruptCheckpointError, TransferError
from gpudcp.formats.archive import read_records
from gpudcp.formats.dtypes import QUANTIZED_DTYPES
from gpudcp.formats.envelope import envelope_at
from gpudcp.storage.stored import Window, stored_tensor
from gpudcp.verification.claims import Claim, Sizes
from gpudcp.verification.report import Problem, ProblemKind


class Part(NamedTuple):
    """A range of the file, in bytes. One of ``data``, ``crc32`` and ``is_zero`` says what it holds, or none does."""

    start: int
    stop: int
    what: str
    data: bytes | None = None
    crc32: int | None = None
    is_zero: bool = False


class Expected(NamedTuple):
    """An item of a file, or what stands between two."""

    fqn: str | None
    start: int
    stop: int
    parts: Callable[[], tuple[Part, ...]]
    """Made for who asks, and again for who asks again: literal bytes of all items at once would take memory."""
    is_verified: bool = True
    """False: some of its bytes carry no checksum."""


class ExpectedFile:
    """The items of one file, in file order, none inside another."""

    def __init__(self, path: str, items: list[Expected], nbytes: int) -> None:
        self.path = path
        self.items = items
        self.nbytes = nbytes
        """To be read, from the file's start."""
        self._starts: Int64 = np.array([item.start for item in items], dtype=np.int64)
        self._stops: Int64 = np.array([item.stop for item in items], dtype=np.int64)

    def between(self, start: int, stop: int) -> range:
        """Numbers of the items that may have bytes in ``[start, stop)``."""
        first = int(np.searchsorted(self._stops, start, side="right"))
        return range(first, int(np.searchsorted(self._starts, stop)))


def expected_file(
    claims: list[Claim], window: Window, path: str, *, is_ours: bool
) -> tuple[ExpectedFile, list[Problem]]:
    """What a file should hold.

    Args:
        claims: its items, in file order.
        window: on the open file, to read the directories of items that the metadata does not describe.
        path: of the file, relative to the checkpoint's directory.
        is_ours: whether this package wrote it: then nothing else is in it.
    """
    file_nbytes = window.file.nbytes
    problems: list[Problem] = []
    items: list[Expected] = []
    end, end_fqn = 0, ""
    for claim in claims:
        item = claim.item
        start, stop = item.byte_offset, item.byte_offset + item.nbytes
        is_overlapping = start < end
        if is_overlapping:
            expected, found = f"an item that starts at byte {end} or later", f"{start}, inside {end_fqn:.200}"
            problems.append(_problem("overlap", claim, path, expected, found))
        elif is_ours and end < min(start, file_nbytes):
            items.append(_zeros(end, min(start, file_nbytes)))
        if stop > end:
            end, end_fqn = stop, item.fqn
        if stop > file_nbytes:
            problems.append(_problem("length", claim, path, f"bytes {start} to {stop}", f"a file of {file_nbytes}"))
            continue
        if is_overlapping:
            continue  # it is wrong already; thousands of claims on the same bytes would each have them checked
        try:
            items.append(_expected(claim, window))
        except TransferError as err:
            problems.append(_problem("read", claim, path, f"{item.nbytes} readable bytes", str(err)))
        except CorruptCheckpointError as err:
            described = "an item as the metadata describes it"
            problems.append(_problem("archive", claim, path, described, str(err)))
    if is_ours and file_nbytes > end:
        found = f"{file_nbytes} bytes"
        problems.append(
            Problem(kind="length", file=path, byte_offset=end, expected=f"a file of {end} bytes", found=found)
        )
    return ExpectedFile(path, items, min(end, file_nbytes)), problems


def _problem(kind: ProblemKind, claim: Claim, path: str, expected: str, found: str) -> Problem:
    return Problem(
        kind=kind,
        fqn=claim.item.fqn,
        file=path,
        byte_offset=claim.item.byte_offset,
        expected=expected,
        found=found,
    )


def _zeros(start: int, stop: int) -> Expected:
    return Expected(None, start, stop, lambda: (Part(start, stop, "gap", is_zero=True),))


def _expected(claim: Claim, window: Window) -> Expected:
    item = claim.item
    start, stop = item.byte_offset, item.byte_offset + item.nbytes
    payload_offset, dtype, crc = item.extras
    if item.transforms:
        return Expected(item.fqn, start, stop, tuple, is_verified=False)
    if payload_offset is not None and dtype is not None:
        return _own_tensor(claim, dtype, payload_offset)
    if crc is not None:
        return Expected(item.fqn, start, stop, lambda: (Part(start, stop, "bytes", crc32=crc),))
    return _archive(claim, window)


def _own_tensor(claim: Claim, dtype: torch.dtype, payload_offset: int) -> Expected:
    """An item that this package wrote around a payload: every byte of it is known, or has a checksum."""
    item, sizes, crc = claim.item, claim.sizes, claim.item.extras.crc32
    if crc is not None and crc > 0xFFFFFFFF:
        raise CorruptCheckpointError(f"a record with the CRC-32 {crc:#x}")
    if sizes is None or dtype != claim.dtype or dtype in QUANTIZED_DTYPES:
        raise CorruptCheckpointError(
            f"a payload of {dtype} where the metadata has {'an object' if sizes is None else claim.dtype}"
        )
    if (payload_nbytes := prod(sizes) * dtype.itemsize) > item.nbytes:
        raise CorruptCheckpointError(f"a record of {item.nbytes} bytes for a payload of {payload_nbytes}")
    envelope = envelope_at(item.byte_offset, dtype, sizes)
    start = item.byte_offset + len(envelope.prefix)
    nbytes = len(envelope.prefix) + envelope.payload_nbytes + len(envelope.suffix)
    if (start, nbytes) != (payload_offset, item.nbytes):
        raise CorruptCheckpointError(
            f"a record of {item.nbytes} bytes with its payload at byte {payload_offset}, where {dtype} {tuple(sizes)} "
            f"takes {nbytes} bytes with its payload at byte {start}"
        )
    stop = item.byte_offset + item.nbytes
    parts = partial(_own_parts, item.byte_offset, dtype, sizes, crc)
    return Expected(item.fqn, item.byte_offset, stop, parts, crc is not None or payload_nbytes == 0)


def _own_parts(byte_offset: int, dtype: torch.dtype, sizes: Sizes, crc: int | None) -> tuple[Part, ...]:
    envelope = envelope_at(byte_offset, dtype, sizes)
    start = byte_offset + len(envelope.prefix)
    stop = start + envelope.payload_nbytes
    # Without checksums there are zeros in the places of one.
    suffix = envelope.suffix_with(crc or 0)
    return (
        Part(byte_offset, start, "envelope", data=envelope.prefix),
        Part(start, stop, "payload", crc32=crc),
        Part(stop, stop + len(suffix), "envelope", data=suffix),
    )


def _archive(claim: Claim, window: Window) -> Expected:
    """An item without a checksum in the metadata: stock's, whose zip directory has one of each record."""
    item = claim.item
    start, stop = item.byte_offset, item.byte_offset + item.nbytes
    path = window.file.path
    if claim.sizes is not None:
        stored_tensor(item, claim.sizes, window)  # raises where the file holds another shape
    records = read_records(window.read, byte_offset=start, nbytes=item.nbytes, path=path, fqn=item.fqn)
    if records is None:
        if claim.sizes is not None:
            raise CorruptCheckpointError("bytes that are no torch-save archive")
        return Expected(item.fqn, start, stop, tuple, is_verified=item.nbytes == 0)
    parts = tuple(
        Part(record.byte_offset, record.byte_offset + record.nbytes, record.name, crc32=record.crc32)
        for record in records
    )
    return Expected(item.fqn, start, stop, lambda: parts, all(record.crc32 is not None for record in records))


def items_by_file(claims: list[Claim]) -> Iterator[tuple[str, list[Claim]]]:
    """The claims of each file, in file order."""
    by_path: dict[str, list[Claim]] = {}
    for claim in claims:
        by_path.setdefault(claim.item.path, []).append(claim)
    for path in sorted(by_path):
        yield path, sorted(by_path[path], key=lambda claim: (claim.item.byte_offset, claim.item.nbytes))
