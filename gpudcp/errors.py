"""The exception tree. Every error is also the built-in that a caller expects.

GpuDcpError
├── PlanError(ValueError)                 what was asked for does not fit what there is
├── BackendUnavailableError(RuntimeError) a backend asked for by name cannot be used here; the message has the remedy
├── TransferError(OSError)                bytes did not move: path, byte offset, expected and moved bytes, errno
├── CorruptCheckpointError(ValueError)    bytes are there, and wrong: tensor, file, both checksums
├── UnsafeCheckpointError(ValueError)     reading would run code or leave the directory: the global or path refused
├── MissingKeyError(KeyError)             the checkpoint lacks a key
├── CheckpointNotFoundError(FileNotFoundError)
├── CheckpointExistsError(FileExistsError)
├── CheckpointBusyError(RuntimeError)     another save, or a newer checkpoint, got in the way; trying again can help
└── RankFailedError(RuntimeError)         an error from outside this tree stopped one or more ranks

Ranks send errors to each other by pickle, and one that does not unpickle leaves the other ranks hanging: every error
here survives ``pickle.loads(pickle.dumps(error))`` with its attributes.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackendUnavailableError",
    "CheckpointBusyError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "GpuDcpError",
    "MissingKeyError",
    "PlanError",
    "RankFailedError",
    "TransferError",
    "UnsafeCheckpointError",
]


class GpuDcpError(Exception):
    """The root of every error that gpudcp raises by itself."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        # One place for all attributes, so that pickling needs no code per class.
        for name, value in details.items():
            setattr(self, name, value)
        self._details = tuple(details)

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        details = {name: getattr(self, name) for name in self._details}
        return _rebuild, (type(self), str(self), details)


def _rebuild(cls: type[GpuDcpError], message: str, details: dict[str, Any]) -> GpuDcpError:
    return cls(message, **details)


class PlanError(GpuDcpError, ValueError):
    """A plan, a tensor or an option does not fit what there is; nothing has been moved for it."""


class BackendUnavailableError(GpuDcpError, RuntimeError):
    """A backend that was asked for by name cannot be used; the message ends with the remedy."""


class TransferError(GpuDcpError, OSError):
    """Bytes did not move. ``errno`` is the system's, when it gave one."""

    def __init__(
        self,
        message: str,
        *,
        path: str,
        byte_offset: int | None = None,
        expected_nbytes: int | None = None,
        moved_nbytes: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(
            message,
            path=path,
            byte_offset=byte_offset,
            expected_nbytes=expected_nbytes,
            moved_nbytes=moved_nbytes,
            errno=errno,
        )


class CorruptCheckpointError(GpuDcpError, ValueError):
    """Bytes are not what was written. ``expected_crc32`` and ``found_crc32`` are set when a checksum told."""

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        fqn: str | None = None,
        expected_crc32: int | None = None,
        found_crc32: int | None = None,
    ) -> None:
        super().__init__(message, path=path, fqn=fqn, expected_crc32=expected_crc32, found_crc32=found_crc32)


class UnsafeCheckpointError(GpuDcpError, ValueError):
    """The checkpoint asks for something that reading it must not do; ``refused`` names the global or the path."""

    def __init__(self, message: str, *, refused: str) -> None:
        super().__init__(message, refused=refused)


class MissingKeyError(GpuDcpError, KeyError):
    """The checkpoint lacks a key that was asked for."""


class CheckpointNotFoundError(GpuDcpError, FileNotFoundError):
    """There is no checkpoint at this path."""


class CheckpointExistsError(GpuDcpError, FileExistsError):
    """There is a checkpoint at this path, and ``overwrite=False``."""


class CheckpointBusyError(GpuDcpError, RuntimeError):
    """Another save holds the directory, or a newer checkpoint replaced this one while it was read."""


class RankFailedError(GpuDcpError, RuntimeError):
    """An error from outside the tree stopped one or more ranks; ``ranks`` maps each to its cause in one line."""

    def __init__(self, message: str, *, ranks: dict[int, str]) -> None:
        super().__init__(message, ranks=ranks)
