"""Bring the files of a checkpoint into the page cache, or out of it, and see which of the two holds.

Out: fsync (a dirty page stays), then ``posix_fadvise(DONTNEED)`` on exactly these files; the other files of the machine
keep theirs. Seen: ``mincore`` says of every page of a mapping of the file whether it is cached; mapping reads nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_CALL_NBYTES = 8 << 20
_TRIES = 3  # a page that is in use at that moment, by read-ahead say, stays
_libc = ctypes.CDLL(None, use_errno=True)


class StillCachedError(RuntimeError):
    """The kernel kept pages that it was asked to drop: a cold read cannot be measured here."""


def files_of(directory: Path) -> list[Path]:
    """All files of a checkpoint."""
    return sorted(path for path in directory.iterdir() if path.is_file())


def drop(paths: Sequence[Path]) -> None:
    """Make the next read of these files go to the device.

    Raises:
        StillCachedError: the kernel kept some of the pages (tmpfs keeps all: it has no device).
    """
    for path in paths:
        for _ in range(_TRIES):
            _ask_to_drop(path)
            if (npages := cached_pages(path)) == 0:
                break
        else:
            raise StillCachedError(f"{path.name}: {npages} pages are still in the page cache")


def _ask_to_drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def warm(paths: Sequence[Path]) -> None:
    """Read these files, so that the next read finds them in the page cache, whoever wrote around it."""
    into = memoryview(bytearray(_CALL_NBYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(into):
                pass


def cached_pages(path: Path) -> int:
    """How many pages of the file are in the page cache."""
    nbytes = path.stat().st_size
    if nbytes == 0:
        return 0
    # Writable because the kernel answers truthfully only to who could write the file (Linux 5.2), and ctypes asks so.
    with path.open("r+b") as file, mmap.mmap(file.fileno(), nbytes) as mapping:
        start = (ctypes.c_char * nbytes).from_buffer(mapping)
        pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(nbytes), pages)
        error = ctypes.get_errno()
        del start  # else the mapping cannot be closed
    if failed:
        raise OSError(error, os.strerror(error), str(path))
    return int((np.frombuffer(bytes(pages), np.uint8) & 1).sum())  # of a page's byte only bit 0 has a meaning
