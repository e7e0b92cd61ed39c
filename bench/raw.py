"""The ceilings: the same bytes written and read with nothing but system calls of 8 MiB, from and into ready memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

_CALL_NBYTES = 8 << 20
_BLOCK_NBYTES = 4096


class RawMemory:
    """``nbytes`` of touched memory on a 4096-byte boundary, from the allocator that tensors come from."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        allocation = torch.zeros(nbytes + 2 * _BLOCK_NBYTES, dtype=torch.uint8)
        start = -allocation.data_ptr() % _BLOCK_NBYTES
        padded_nbytes = -(-nbytes // _BLOCK_NBYTES) * _BLOCK_NBYTES
        self.tensor = allocation[start : start + nbytes]
        self.padded = memoryview(allocation[start : start + padded_nbytes].numpy())

    def write(self, path: Path, *, is_direct: bool) -> None:
        """Write all of it to a new file, and fsync."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | (os.O_DIRECT if is_direct else 0)
        fd = os.open(path, flags, 0o666)
        try:
            for start, block in _blocks(self.padded if is_direct else self.padded[: self.nbytes]):
                if os.pwrite(fd, block, start) != len(block):
                    raise OSError(f"{path}: short write at byte {start}")
            os.ftruncate(fd, self.nbytes)  # direct writes are of whole blocks
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, paths: Sequence[Path]) -> None:
        """Read these files whole, one after the other, buffered, each into memory of its own."""
        into = self.padded[: self.nbytes]
        for path in paths:
            nbytes = path.stat().st_size
            fd = os.open(path, os.O_RDONLY)
            try:
                for start, block in _blocks(into[:nbytes]):
                    if os.preadv(fd, [block], start) != len(block):
                        raise OSError(f"{path}: short read at byte {start}")
            finally:
                os.close(fd)
            into = into[nbytes:]

    def check_holds(self, paths: Sequence[Path]) -> None:
        """Compare with these files, in the order in which `read` reads them.

        Raises:
            ValueError: names the file that is different.
        """
        held = self.padded[: self.nbytes]
        for path in paths:
            nbytes = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                if any(file.read(len(block)) != block for _, block in _blocks(held[:nbytes])):
                    raise ValueError(f"{path}: holds other bytes than the memory")
            held = held[nbytes:]


def _blocks(memory: memoryview) -> Iterator[tuple[int, memoryview]]:
    for start in range(0, len(memory), _CALL_NBYTES):
        yield start, memory[start : start + _CALL_NBYTES]
