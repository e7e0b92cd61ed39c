"""The contract of a files backend: one open file, written or read by several threads at once."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch


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


@runtime_checkable
class DeviceFileWriter(FileWriter, Protocol):
    """A new file that device memory can be written to as well, without a slab of host memory in between."""

    def write_device(self, tensor: torch.Tensor, byte_offset: int) -> None:
        """Write a contiguous uint8 tensor whole at ``byte_offset``, or raise TransferError.

        Address, offset and length are multiples of 4096. The tensor's bytes are there: whoever calls has waited for
        the work that makes them.
        """


class FileReader(Protocol):
    """An open file: it stays readable when its name is gone."""

    path: str
    nbytes: int
    alignment_nbytes: int
    """1: reads of every alignment are alike. 4096: those of whole blocks, to an address on a block, are faster."""

    def read(self, into: memoryview, byte_offset: int) -> None:
        """Fill all of ``into`` from ``byte_offset``, or raise TransferError."""

    @property
    def close(self) -> Callable[[], object]:
        """Call it to close the file; a second call does nothing."""


@runtime_checkable
class DeviceFileReader(FileReader, Protocol):
    """An open file that device memory can be read into as well."""

    def read_device(self, into: torch.Tensor, byte_offset: int) -> None:
        """Fill a contiguous uint8 tensor from ``byte_offset``, or raise TransferError. On return the bytes are there.

        Address and offset are multiples of 4096. A length that is not is right where the file ends there, and takes a
        second, smaller read. Nothing queued on the device may still be using the tensor's memory.
        """
