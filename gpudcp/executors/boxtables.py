"""Strided boxes of device memory, gathered row by row, as the kernels' launchers take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gpudcp_kernels.tables import Boxes

from gpudcp.arrays import Int64


class BoxTable:
    """Rows of boxes of any number of dimensions; `boxes` gives them all the most that one has."""

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._byte_offsets: list[int] = []
        self._lengths: list[Sequence[int]] = []
        self._strides: list[Sequence[int]] = []
        self._file_strides: list[Sequence[int]] = []

    def __len__(self) -> int:
        return len(self._addresses)

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

    def boxes(self) -> Boxes:
        """All of them."""
        ndim = max(1, max(map(len, self._lengths), default=1))
        return Boxes(
            addresses=np.array(self._addresses, dtype=np.int64),
            byte_offsets=np.array(self._byte_offsets, dtype=np.int64),
            lengths=_padded(self._lengths, ndim, 1),
            strides=_padded(self._strides, ndim, 0),
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
