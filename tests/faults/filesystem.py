"""Between gpudcp's files and the system: what is asked is recorded, and some of it fails. For one directory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gpudcp.files import commit

_BLOCK_NBYTES = 4096
CALLS = ("open", "pwrite", "write", "preadv", "posix_fallocate", "ftruncate", "fsync", "replace", "unlink")


class Operation(NamedTuple):
    """One change to the directory or to a file in it; files are known by a number, as names change."""

    kind: str
    file: int = -1
    name: str = ""
    byte_offset: int = 0
    data: bytes = b""


Fault = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""What a call does instead: it gets the real function and its arguments."""


def failing(code: int) -> Fault:
    """The call fails."""

    def fail(_real: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def short(real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Half of the bytes are moved: of whole blocks whole blocks, as O_DIRECT does."""
    fd, data, *rest = arguments
    (view,) = data if isinstance(data, list) else (data,)
    nbytes = len(view) if len(view) == _BLOCK_NBYTES else len(view) // 2
    if len(view) % _BLOCK_NBYTES == 0:
        nbytes -= nbytes % _BLOCK_NBYTES
    part = memoryview(view)[: max(1, nbytes)]
    return real(fd, [part] if isinstance(data, list) else part, *rest)


@dataclass
class FileSystem:
    """Records the operations under ``directory``, and lets the ``at``-th of the calls named in ``faulty`` fail."""

    directory: Path
    faulty: tuple[str, ...] = ()
    at: int = -1
    fault: Fault | None = None
    operations: list[Operation] = field(default_factory=list)
    ncalls: int = 0
    """Of the faulty kinds."""
    _files: dict[str, int] = field(default_factory=dict)
    _guard: Any = field(default_factory=threading.RLock)

    def install(self, patch: pytest.MonkeyPatch) -> FileSystem:
        """Stand between, until the patch is undone."""
        for number, path in enumerate(sorted(self.directory.iterdir())):
            self._files[path.name] = number
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        patch.setattr(commit, "open", _open_unbuffered, raising=False)
        return self

    def _wrapped(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            name = self._name_of(arguments[0])
            if name is None or name.endswith(".lock"):
                return real(*arguments, **keywords)
            with self._guard:
                if kind in self.faulty:
                    self.ncalls += 1
                    if self.ncalls == self.at and self.fault is not None:
                        return self.fault(lambda *given: self._done(kind, name, real, given, keywords), arguments)
                return self._done(kind, name, real, arguments, keywords)

        return call

    def _name_of(self, target: Any) -> str | None:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if path == str(self.directory):
            return "."
        return os.path.basename(path) if os.path.dirname(path) == str(self.directory) else None

    def _done(
        self, kind: str, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        position = os.lseek(arguments[0], 0, os.SEEK_CUR) if kind == "write" else 0
        result = real(*arguments, **keywords)
        self.operations += self._recorded(kind, name, arguments, position, result)
        return result

    def _recorded(
        self, kind: str, name: str, arguments: tuple[Any, ...], position: int, result: Any
    ) -> Iterable[Operation]:
        match kind:
            case "open" if arguments[1] & os.O_CREAT:
                self._files[name] = len(self._files) + 1000 * len(self.operations)
                yield Operation("enter", self._files[name], name)
            case "pwrite" | "write":
                offset = arguments[2] if kind == "pwrite" else position
                yield Operation("write", self._files[name], "", offset, bytes(memoryview(arguments[1])[:result]))
            case "ftruncate":
                yield Operation("truncate", self._files[name], "", arguments[1])
            case "fsync":
                yield Operation("fsync directory") if name == "." else Operation("fsync", self._files[name])
            case "replace":
                target = os.path.basename(arguments[1])
                self._files[target] = self._files.pop(name)
                yield Operation("rename", self._files[target], f"{name}/{target}")
            case "unlink":
                yield Operation("remove", -1, name)


class _open_unbuffered:
    """`open` for a new file, of which every write is a system call that can be seen."""

    def __init__(self, path: str, mode: str) -> None:
        assert mode == "xb"
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)

    def __enter__(self) -> _open_unbuffered:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def writelines(self, parts: Iterable[bytes | memoryview]) -> None:
        for part in parts:
            view = memoryview(part)
            while len(view):
                count = os.write(self._fd, view)
                view = view[count:]

    def flush(self) -> None:
        """Nothing is kept back."""

    def fileno(self) -> int:
        return self._fd


EVERY_ERROR = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
