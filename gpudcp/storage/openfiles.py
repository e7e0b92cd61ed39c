"""The open files of one load."""

from __future__ import annotations

import os
import resource

from gpudcp.files.posix import PosixReader


class OpenFiles:
    """The checkpoint's open files, by relative path: as many as the process may have, and of the rest those used last.

    A file that is passed over for others is closed when the last read of it, which may be in flight, lets go of it.
    """

    _PASSING_FILES = 8

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._kept: dict[str, PosixReader] = {}
        self._passing: dict[str, PosixReader] = {}

    def open(self, paths: set[str]) -> None:
        """Open them all, as far as the process's limit on open files allows; the rest is opened when it is needed."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for path in sorted(paths) if limit == resource.RLIM_INFINITY else sorted(paths)[: limit // 2]:
            if path not in self._kept:
                self._kept[path] = self._opened(path)

    def get(self, path: str) -> PosixReader:
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

    def _opened(self, path: str) -> PosixReader:
        return PosixReader(os.path.join(self._directory, path))

    def close(self) -> None:
        for file in (*self._kept.values(), *self._passing.values()):
            file.close()
        self._kept.clear()
        self._passing.clear()
