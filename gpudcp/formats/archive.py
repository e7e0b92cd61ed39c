"""Find the payload inside a torch-save zip archive, without unpacking it and without running its pickle.

What a single strided payload cannot describe (quantized and sparse tensors, tensor subclasses, other byte orders) is
left to torch.load by the caller.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gpudcp.boxes import extent_of_box
from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import DTYPES_BY_STORAGE_NAME, QUANTIZED_DTYPES, is_savable
from gpudcp.formats.opcodes import check_opcodes

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DIRECTORY_ENTRY = struct.Struct("<4s6xH4xIIIHHH8xI")
_END = struct.Struct("<4s6xHIIH")
_END_ZIP64 = struct.Struct("<4s28xQQQ")
_END_ZIP64_LOCATOR = struct.Struct("<4s4xQ4x")
_MARKER_32 = 0xFFFFFFFF
# The largest tail that is read at once to find the directory: seven records, as torch writes, take under 700 bytes.
_TAIL_NBYTES = 1024
# One tensor's description takes some hundred bytes, with 64 dimensions a thousand. Parsed ones are kept by their bytes.
_MOST_DESCRIPTION_NBYTES = 16 << 10
MOST_INFLATION = 64
"""How many times their archive's length compressed records may have in all. torch.save compresses none; what others
have compressed is read, a bomb is not."""

ReadAt = Callable[[int, int], "bytes | memoryview"]
"""``read_at(byte_offset, nbytes)``: exactly these bytes of the file."""


class StoredTensor(NamedTuple):
    """A tensor as it lies in its file; strides and the storage offset are elements, counted in the payload."""

    payload_offset: int
    payload_nbytes: int
    crc32: int | None
    """None: written without checksums."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int
    is_conj: bool
    is_neg: bool


class _Record(NamedTuple):
    crc32: int
    nbytes: int
    entry_offset: int
    is_stored: bool


def read_stored_tensor(read_at: ReadAt, *, byte_offset: int, nbytes: int, path: str, fqn: str) -> StoredTensor | None:
    """Where the payload of the item at ``[byte_offset, byte_offset + nbytes)`` lies, and what its pickle says of it.

    Returns None for a valid archive that holds something else than one strided tensor.

    Raises:
        CorruptCheckpointError: these bytes are no torch-save archive, or contradict each other.
    """
    try:
        return _read_stored_tensor(read_at, byte_offset, nbytes)
    except (_Malformed, struct.error, UnicodeDecodeError) as err:
        raise CorruptCheckpointError(
            f"{path}: {fqn}: no torch-save archive at byte {byte_offset}, length {nbytes}: {err}", path=path, fqn=fqn
        ) from None


class ArchiveRecord(NamedTuple):
    """One record of a torch-save archive: where its bytes lie in the file, and what they should be."""

    name: str
    byte_offset: int
    nbytes: int
    """0 for a compressed one: it is not looked into."""
    crc32: int | None
    """None: written without checksums, or compressed."""


def read_records(
    read_at: ReadAt, *, byte_offset: int, nbytes: int, path: str, fqn: str
) -> tuple[ArchiveRecord, ...] | None:
    """Every record of the item at ``[byte_offset, byte_offset + nbytes)``, as the archive's directory lists them.

    Returns None for bytes that neither begin nor end as an archive does.

    Raises:
        CorruptCheckpointError: the archive contradicts itself.
    """
    try:
        records = _read_directory(read_at, byte_offset, nbytes)
        return tuple(
            ArchiveRecord(
                name,
                _data_offset(read_at, byte_offset, nbytes, record),
                record.nbytes,
                record.crc32 if record.crc32 or not record.nbytes else None,
            )
            if record.is_stored
            else ArchiveRecord(name, byte_offset + record.entry_offset, 0, None)
            for name, record in records.items()
        )
    except (_Malformed, struct.error, UnicodeDecodeError) as err:
        if not _looks_like_an_archive(read_at, byte_offset, nbytes):
            return None
        raise CorruptCheckpointError(
            f"{path}: {fqn}: no torch-save archive at byte {byte_offset}, length {nbytes}: {err}", path=path, fqn=fqn
        ) from None


def _looks_like_an_archive(read_at: ReadAt, byte_offset: int, nbytes: int) -> bool:
    if nbytes < _END.size:
        return False
    end = byte_offset + nbytes - _END.size
    return bytes(read_at(byte_offset, 4)) == b"PK\x03\x04" or bytes(read_at(end, 4)) == b"PK\x05\x06"


def check_records(read_at: ReadAt, *, byte_offset: int, nbytes: int, path: str, fqn: str) -> None:
    """Check every record of a torch-save archive that has a checksum: torch.load checks none.

    Bytes that are no archive are left to who reads them.

    Raises:
        CorruptCheckpointError: a record's CRC-32 is not the one in the archive's directory.
    """
    try:
        records = read_records(read_at, byte_offset=byte_offset, nbytes=nbytes, path=path, fqn=fqn)
    except CorruptCheckpointError:
        return
    for name, start, record_nbytes, expected in records or ():
        if expected is not None and (found := crc32(read_at(start, record_nbytes))) != expected:
            raise CorruptCheckpointError(
                f"{path}: {fqn}: the {record_nbytes} bytes of {name} at {start} have CRC-32 {found:#010x}, "
                f"{expected:#010x} was saved",
                path=path,
                fqn=fqn,
                expected_crc32=expected,
                found_crc32=found,
            )


def check_record_sizes(data: memoryview) -> None:
    """That the records of an archive are no larger, in all, than an archive of this length can hold.

    Raises:
        ValueError: they are, or this is no archive.
    """
    try:
        _read_directory(lambda start, nbytes: data[start : start + nbytes], 0, len(data))
    except (_Malformed, struct.error, UnicodeDecodeError) as err:
        raise ValueError(f"no torch-save archive of {len(data)} bytes: {err}") from None


class _Malformed(Exception):
    pass


def _data_offset(read_at: ReadAt, byte_offset: int, nbytes: int, record: _Record) -> int:
    """First byte, in the file, of a record of the archive at ``byte_offset``."""
    if record.entry_offset + _LOCAL_HEADER.size > nbytes:
        raise _Malformed(f"a record at byte {record.entry_offset} of {nbytes}")
    header = read_at(byte_offset + record.entry_offset, _LOCAL_HEADER.size)
    magic, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
    start = record.entry_offset + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
    if magic != b"PK\x03\x04" or start + record.nbytes > nbytes:
        raise _Malformed(f"the record at byte {record.entry_offset} of {nbytes} has no valid header")
    return byte_offset + int(start)


def _read_stored_tensor(read_at: ReadAt, byte_offset: int, nbytes: int) -> StoredTensor | None:
    records = _read_directory(read_at, byte_offset, nbytes)
    root = next(iter(records)).partition("/")[0]
    pickled = records.get(f"{root}/data.pkl")
    if pickled is None:
        raise _Malformed("no data.pkl")

    def content(record: _Record) -> bytes:
        return bytes(read_at(_data_offset(read_at, byte_offset, nbytes, record), record.nbytes))

    payload, order = records.get(f"{root}/data/0"), records.get(f"{root}/byteorder")
    if (
        payload is None
        or pickled.nbytes > _MOST_DESCRIPTION_NBYTES
        or not all(record is None or record.is_stored for record in (pickled, payload, order))
    ):
        return None
    if order is not None and content(order) != sys.byteorder.encode():
        return None
    data = content(pickled)
    # A flipped bit here would give other strides, or another dtype, to a payload that is sound.
    if pickled.crc32 not in (0, found := crc32(data)):
        raise _Malformed(f"data.pkl has CRC-32 {found:#010x}, the directory says {pickled.crc32:#010x}")
    described = _unpickle_tensor(data)
    if described is None:
        return None
    last = described.storage_offset + extent_of_box(described.strides, described.sizes)
    if last * described.dtype.itemsize > payload.nbytes:
        raise _Malformed(f"data.pkl needs {last * described.dtype.itemsize} bytes, data/0 has {payload.nbytes}")
    is_checked = payload.crc32 != 0 or payload.nbytes == 0
    return described._replace(
        payload_offset=_data_offset(read_at, byte_offset, nbytes, payload),
        payload_nbytes=payload.nbytes,
        crc32=payload.crc32 if is_checked else None,
    )


def _read_directory(read_at: ReadAt, byte_offset: int, nbytes: int) -> dict[str, _Record]:
    tail_nbytes = min(nbytes, _TAIL_NBYTES)
    tail = bytes(read_at(byte_offset + nbytes - tail_nbytes, tail_nbytes))
    if tail_nbytes < _END.size or not tail.startswith(b"PK\x05\x06", tail_nbytes - _END.size):
        raise _Malformed("no end record")
    _, nrecords, directory_nbytes, directory_offset, _ = _END.unpack_from(tail, tail_nbytes - _END.size)
    if directory_offset == _MARKER_32 or directory_nbytes == _MARKER_32 or nrecords == 0xFFFF:
        locator_start = tail_nbytes - _END.size - _END_ZIP64_LOCATOR.size
        if locator_start < 0:
            raise _Malformed("no zip64 locator")
        magic, end_offset = _END_ZIP64_LOCATOR.unpack_from(tail, locator_start)
        if magic != b"PK\x06\x07" or end_offset + _END_ZIP64.size > nbytes:
            raise _Malformed("no zip64 locator")
        end = read_at(byte_offset + end_offset, _END_ZIP64.size)
        magic, nrecords, directory_nbytes, directory_offset = _END_ZIP64.unpack(end)
        if magic != b"PK\x06\x06":
            raise _Malformed("no zip64 end record")
    if directory_offset + directory_nbytes > nbytes:
        raise _Malformed(f"a directory of {directory_nbytes} bytes at byte {directory_offset} of {nbytes}")
    directory = bytes(read_at(byte_offset + directory_offset, directory_nbytes))
    records = _parse_directory(directory, nrecords)
    # One stretch of bytes under a thousand names would be read a thousand times.
    if (stored_nbytes := sum(record.nbytes for record in records.values() if record.is_stored)) > nbytes:
        raise _Malformed(f"records of {stored_nbytes} bytes in all overlap in an archive of {nbytes}")
    if (total_nbytes := sum(record.nbytes for record in records.values())) > MOST_INFLATION * nbytes:
        raise _Malformed(f"records of {total_nbytes} bytes in all, compressed into an archive of {nbytes}")
    return records


def _parse_directory(directory: bytes, nrecords: int) -> dict[str, _Record]:
    records: dict[str, _Record] = {}
    position = 0
    for _ in range(nrecords):
        magic, method, crc, packed, nbytes, name_nbytes, extra_nbytes, comment_nbytes, entry_offset = (
            _DIRECTORY_ENTRY.unpack_from(directory, position)
        )
        if magic != b"PK\x01\x02":
            raise _Malformed("a directory entry without its signature")
        name_start = position + _DIRECTORY_ENTRY.size
        extra_start = name_start + name_nbytes
        position = extra_start + extra_nbytes + comment_nbytes
        if position > len(directory):
            raise _Malformed("a directory entry beyond the directory")
        if _MARKER_32 in (nbytes, packed, entry_offset):
            extra = directory[extra_start : extra_start + extra_nbytes]
            nbytes, packed, entry_offset = _zip64_values(extra, nbytes, packed, entry_offset)
        name = directory[name_start:extra_start].decode()
        if name in records:  # readers would not agree on which of the two to take
            raise _Malformed(f"two records are called {name!r}")
        records[name] = _Record(crc, nbytes, entry_offset, method == 0 and packed == nbytes)
    if not records:
        raise _Malformed("an empty directory")
    return records


def _zip64_values(extra: bytes, nbytes: int, packed: int, entry_offset: int) -> tuple[int, int, int]:
    """The 64-bit values in place of the markers, in the order that APPNOTE.TXT 4.5.3 gives them."""
    position = 0
    while position + 4 <= len(extra):
        field_id, field_nbytes = struct.unpack_from("<HH", extra, position)
        if field_id == 0x0001:
            values = iter(struct.unpack_from(f"<{field_nbytes // 8}Q", extra, position + 4))
            try:
                nbytes, packed, entry_offset = (
                    next(values) if value == _MARKER_32 else value for value in (nbytes, packed, entry_offset)
                )
            except (StopIteration, RuntimeError):
                raise _Malformed("a zip64 field that is too short") from None
            return nbytes, packed, entry_offset
        position += 4 + field_nbytes
    return nbytes, packed, entry_offset


class _Storage(NamedTuple):
    dtype: torch.dtype | None


def _rebuild_tensor_v2(*args: Any) -> StoredTensor:
    storage, storage_offset, sizes, strides, _requires_grad, _hooks, *rest = args
    return _stored(storage.dtype, storage_offset, sizes, strides, rest[0] if rest else {})


def _rebuild_tensor_v3(*args: Any) -> StoredTensor:
    _storage, storage_offset, sizes, strides, _requires_grad, _hooks, dtype, *rest = args
    return _stored(dtype, storage_offset, sizes, strides, rest[0] if rest else {})


def _stored(dtype: Any, storage_offset: Any, sizes: Any, strides: Any, flags: Any) -> StoredTensor:
    integers = (storage_offset, *sizes, *strides)
    # Without a bound a hostile integer would be too long even for an error message.
    if len(sizes) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 63 for n in integers):
        raise _Malformed("sizes, strides and storage offset of no tensor")
    if not isinstance(dtype, torch.dtype) or dtype in QUANTIZED_DTYPES or not is_savable(dtype):
        raise _NotOneTensor
    is_conj, is_neg = bool(flags.get("conj")), bool(flags.get("neg"))
    return StoredTensor(0, 0, None, dtype, tuple(sizes), tuple(strides), storage_offset, is_conj, is_neg)


class _NotOneTensor(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Builds a StoredTensor out of stand-ins; knows no other global, so it can run nothing."""

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage" or key != "0" or not isinstance(storage, _Storage):
            raise _NotOneTensor
        return storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            # What a pickle names it can give attributes; to this one it cannot.
            maker: Any = _rebuild_tensor_v2 if name.endswith("v2") else _rebuild_tensor_v3
            return maker.__call__
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Storage(None)
        if module == "torch" and name in DTYPES_BY_STORAGE_NAME:
            return _Storage(DTYPES_BY_STORAGE_NAME[name])
        # Not by getattr, which would import what torch loads only on demand.
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise _NotOneTensor


@lru_cache(maxsize=4096)
def _unpickle_tensor(data: bytes) -> StoredTensor | None:
    try:
        check_opcodes(data)
        described = _Unpickler(io.BytesIO(data)).load()
    except _NotOneTensor:
        return None
    except _Malformed:
        raise
    # Arbitrary bytes make the unpickler raise almost anything.
    except Exception as err:
        raise _Malformed(f"data.pkl is no readable pickle: {type(err).__name__}: {err}") from None
    return described if isinstance(described, StoredTensor) else None
