"""Strided boxes of device memory, gathered row by row, as the kernels' launchers take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from gpudcp_kernels.tables import Boxes

from gpudcp.arrays import Int64


class BoxTable:
    """Rows of boxes of any number of dimensions; `boxes` gives them all the most that one has. Runs come last."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._byte_offsets: list[int] = []
        self._lengths: list[Sequence[int]] = []
        self._strides: list[Sequence[int]] = []
        self._file_strides: list[Sequence[int]] = []
        self._runs: tuple[list[int], list[int], list[int]] = [], [], []

    def __len__(self) -> int:
        return len(self._addresses) + len(self._runs[0])

    def add(
        self,
        address: int,
        byte_offset: int,
        lengths: Sequence[int],
        strides: Sequence[int],
        file_strides: Sequence[int] = (),
    ) -> None:
        """One box: its first element's address, its first byte in the slab; elements for each dimension."""
        self._addresses.append(address)
        self._byte_offsets.append(byte_offset)
        self._lengths.append(lengths)
        self._strides.append(strides)
        self._file_strides.append(file_strides)

    def add_runs(self, addresses: Iterable[int], byte_offsets: Iterable[int], lengths: Iterable[int]) -> None:
        """Runs of neighbouring elements: nearly all that there is, so by columns. Not with boxes with file strides."""
        for column, values in zip(self._runs, (addresses, byte_offsets, lengths), strict=True):
            column.extend(values)

    def boxes(self) -> Boxes:
        """All of them."""
        runs = self.of_runs(*(np.array(column, dtype=np.int64) for column in self._runs))
        if not self._addresses:
            return runs
        ndim = max(1, max(map(len, self._lengths), default=1))
        ones, zeros = (np.full((len(self._runs[0]), ndim - 1), value, dtype=np.int64) for value in (1, 0))
        return Boxes(
            addresses=np.concatenate((np.array(self._addresses, dtype=np.int64), runs.addresses)),
            byte_offsets=np.concatenate((np.array(self._byte_offsets, dtype=np.int64), runs.byte_offsets)),
            lengths=np.concatenate((_padded(self._lengths, ndim, 1), np.column_stack((ones, runs.lengths)))),
            strides=np.concatenate((_padded(self._strides, ndim, 0), np.column_stack((zeros, runs.strides)))),
        )

    def file_strides(self) -> Int64:
        """Strides of the boxes in the slab, by row; for those that were added with them."""
        return _padded(self._file_strides, max(1, max(map(len, self._lengths), default=1)), 0)

    @staticmethod
    def of_runs(addresses: Int64, byte_offsets: Int64, lengths: Int64) -> Boxes:
        """Runs of neighbouring elements."""
        return Boxes(
            addresses=addresses,
            byte_offsets=byte_offsets,
            lengths=lengths[:, None],
            strides=np.ones((len(lengths), 1), dtype=np.int64),
        )


def _padded(rows: list[Sequence[int]], ndim: int, fill: int) -> Int64:
    """The rows as one table, shorter ones filled up in front."""
    if all(len(row) == ndim for row in rows):
        return np.array(rows, dtype=np.int64).reshape(len(rows), ndim)
    return np.array([(*(fill,) * (ndim - len(row)), *row) for row in rows], dtype=np.int64).reshape(len(rows), ndim)
