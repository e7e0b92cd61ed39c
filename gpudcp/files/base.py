"""The contract of a files backend: one open file, written or read by several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class FileWriter(Protocol):
    """A new file. Leaving its context without `finish` removes it."""

    path: str
    alignment_nbytes: int
    """1: writes of any offset, length and address. 4096: all three are multiples of it."""

    def write(self, data: memoryview, byte_offset: int) -> None:
        """Write all of ``data`` at ``byte_offset``, or raise TransferError. Ranges of several threads never overlap.

        The last range of the file may be padded to the alignment; `finish` cuts it off.
        """

    def finish(self, nbytes: int) -> None:
        """Every write is done: give the file its length, bring it to stable storage, and keep it."""

    def __enter__(self) -> FileWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileReader(Protocol):
    """An open file: it stays readable when its name is gone."""

    path: str

    def read(self, into: memoryview, byte_offset: int) -> None:
        """Fill all of ``into`` from ``byte_offset``, or raise TransferError."""

    @property
    def close(self) -> Callable[[], object]:
        """Call it to close the file; a second call does nothing."""
