"""The open files of one load."""

from __future__ import annotations

import os
import resource

from gpudcp.files.base import FileReader
from gpudcp.files.figures import Way
from gpudcp.files.posix import PosixReader
from gpudcp.files.ways import open_reader, read_by


class OpenFiles:
    """The checkpoint's open files, by relative path: as many as the process may have, and of the rest those used last.

    A file that is passed over for others is closed when the last read of it, which may be in flight, lets go of it.
    """

    _PASSING_FILES = 8

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._way: Way = "buffered"
        self._kept: dict[str, FileReader] = {}
        self._passing: dict[str, FileReader] = {}

    def open(self, paths: set[str]) -> None:
        """Open them all, as far as half of what the process may still open allows; the rest when it is needed."""
        nfree = _nfree_descriptors(len(paths) * 2)
        for path in sorted(paths)[: nfree // 2]:
            if path not in self._kept:
                self._kept[path] = self._opened(path)

    def read_by(self, way: Way) -> None:
        """Read files by this way: those to be opened, and those that are open, which may have lost their names."""
        self._way = way
        if way == "buffered":
            return
        # KvikIO opens a file twice more. Those for which there is no room stay as they are.
        for path in sorted(self._kept)[: _nfree_descriptors(len(self._kept) * 4) // 4]:
            file = self._kept[path]
            if isinstance(file, PosixReader):
                self._kept[path] = read_by(file, way)

    def get(self, path: str) -> FileReader:
        """The open file.

        Raises:
            CheckpointNotFoundError: it does not exist.
        """
        file = self._kept.get(path) or self._passing.get(path)
        if file is None:
            file = self._passing[path] = self._opened(path)
            if len(self._passing) > self._PASSING_FILES:
                del self._passing[next(iter(self._passing))]
        return file

    def _opened(self, path: str) -> FileReader:
        return open_reader(os.path.join(self._directory, path), self._way)

    def close(self) -> None:
        for file in (*self._kept.values(), *self._passing.values()):
            file.close()
        self._kept.clear()
        self._passing.clear()


def _nfree_descriptors(most: int) -> int:
    """How many files this process may still open; ``most`` where there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(0, limit - len(os.listdir("/proc/self/fd")))
