"""Open files in the way that was chosen for them."""

from __future__ import annotations

from gpudcp.files.base import FileReader, FileWriter
from gpudcp.files.figures import KVIKIO_WAYS, Way
from gpudcp.files.posix import PosixReader, PosixWriter

_DESCRIPTIONS: dict[Way, str] = {
    "gds": "KvikIO, GPUDirect Storage",
    "compat": "KvikIO, compat mode",
    "direct": "posix direct",
    "buffered": "posix buffered",
}


def described(way: Way) -> str:
    """The way in words, for reports."""
    return _DESCRIPTIONS[way]


def open_writer(path: str, way: Way, *, nbytes: int, fsync: bool) -> FileWriter:
    """A new file of so many bytes."""
    if way in KVIKIO_WAYS:
        from gpudcp.files.kvikio import KvikioWriter

        return KvikioWriter(path, nbytes=nbytes, is_direct=False, fsync=fsync)
    return PosixWriter(path, nbytes=nbytes, is_direct=way == "direct", fsync=fsync)


def open_reader(path: str, way: Way) -> FileReader:
    """An open file."""
    return read_by(PosixReader(path), way)


def read_by(file: PosixReader, way: Way) -> FileReader:
    """An open file, read by this way from now on, whatever has become of its name; closing it closes ``file``."""
    if way in KVIKIO_WAYS:
        from gpudcp.files.kvikio import KvikioReader

        return KvikioReader(file.path, file=file)
    if way == "direct":
        file.read_directly()
    return file
