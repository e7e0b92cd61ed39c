"""The open files of one load."""

from __future__ import annotations

import os
import resource

from gpudcp.files.base import FileReader
from gpudcp.files.figures import Way
from gpudcp.files.ways import open_reader


class OpenFiles:
    """The checkpoint's open files, by relative path: as many as the process may have, and of the rest those used last.

    A file that is passed over for others is closed when the last read of it, which may be in flight, lets go of it.
    """

    _PASSING_FILES = 8

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.way: Way = "buffered"
        """How files that are opened from now on are read."""
        self._kept: dict[str, FileReader] = {}
        self._passing: dict[str, FileReader] = {}

    def open(self, paths: set[str]) -> None:
        """Open them all, as far as half of what the process may still open allows; the rest when it is needed."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        nfree = len(paths) * 2 if limit == resource.RLIM_INFINITY else max(0, limit - len(os.listdir("/proc/self/fd")))
        for path in sorted(paths)[: nfree // 2]:
            if path not in self._kept:
                self._kept[path] = self._opened(path)

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
        return open_reader(os.path.join(self._directory, path), self.way)

    def close(self) -> None:
        for file in (*self._kept.values(), *self._passing.values()):
            file.close()
        self._kept.clear()
        self._passing.clear()
