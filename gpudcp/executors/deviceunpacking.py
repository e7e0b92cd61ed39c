"""From a slab in device memory to the tensors of a load: a kernel for each pair of dtypes, checksums on the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from gpudcp_kernels.casts import is_castable
from gpudcp_kernels.checksum import crc32_ranges
from gpudcp_kernels.unpack import unpack_cast

from gpudcp.chunkplan.load import ChunkRead, SlabRead
from gpudcp.executors.boxtables import BoxTable
from gpudcp.executors.casting import copy_cast
from gpudcp.executors.compiling import checksumming, first_launch_apart, unpacking
from gpudcp.executors.lanes import MARGIN_NBYTES, Lane
from gpudcp.executors.memory import as_bits
from gpudcp.executors.overlaps import in_turns
from gpudcp.report import Stopwatch

_Pair = tuple[ChunkRead, torch.Tensor]


def checksum_segments(lane: Lane, read: SlabRead, *, stopwatch: Stopwatch) -> torch.Tensor:
    """CRC-32 of each segment of a read that lies in the device slab; on the current stream."""
    columns = np.array([segment[1:] for segment in read.segments], dtype=np.int64).reshape(-1, 2)
    byte_offsets, nbytes = columns[:, 0] + MARGIN_NBYTES, np.ascontiguousarray(columns[:, 1])
    with first_launch_apart(stopwatch, lane.device.torch_device, *checksumming(nbytes)):
        return crc32_ranges(lane.memory, byte_offsets, nbytes)


def unpack(lane: Lane, read: SlabRead, pairs: Sequence[_Pair], *, stopwatch: Stopwatch) -> None:
    """Unpack chunks of a read into their boxes of destinations on the lane's device, on the current stream.

    Destinations that share memory, as tied weights do, are filled one after the other: the last one wins.
    """
    base = MARGIN_NBYTES - read.byte_offset
    for run in in_turns([box for _, box in pairs]):
        _unpack_by_kernel(lane, [pair for pair in pairs[run] if _is_for_kernel(*pair)], base, stopwatch)
        for chunk, box in pairs[run]:
            if not _is_for_kernel(chunk, box):
                _unpack_by_torch(lane, chunk, box, base)


def _is_for_kernel(chunk: ChunkRead, box: torch.Tensor) -> bool:
    is_view_of_another = box.is_conj() or box.is_neg()
    # Elements at one place torch refuses to write.
    is_expanded = not box.is_contiguous() and 0 in box.stride()
    return not is_view_of_another and not is_expanded and is_castable(chunk.dtype, box.dtype)


def _unpack_by_kernel(lane: Lane, pairs: Iterable[_Pair], base: int, stopwatch: Stopwatch) -> None:
    tables: defaultdict[tuple[torch.dtype, torch.dtype, bool], BoxTable] = defaultdict(BoxTable)
    runs: defaultdict[tuple[torch.dtype, torch.dtype, bool], list[_Pair]] = defaultdict(list)
    for chunk, box in pairs:
        key = chunk.dtype, box.dtype, chunk.is_dense
        if chunk.is_dense and box.is_contiguous():
            runs[key].append((chunk, box))
        else:
            tables[key].add(box.data_ptr(), base + chunk.byte_offset, chunk.lengths, box.stride(), chunk.strides)
    for key, parts in runs.items():
        tables[key].add_runs(
            [box.data_ptr() for _, box in parts],
            [base + chunk.byte_offset for chunk, _ in parts],
            [box.numel() for _, box in parts],
        )
    slab = lane.memory[:-MARGIN_NBYTES]  # what follows is what kernels may read beyond its end
    for (file_dtype, memory_dtype, is_dense), table in tables.items():
        boxes = table.boxes()
        with first_launch_apart(
            stopwatch, lane.device.torch_device, *unpacking(file_dtype, memory_dtype, boxes, is_dense=is_dense)
        ):
            unpack_cast(
                boxes,
                slab,
                file_dtype=file_dtype,
                memory_dtype=memory_dtype,
                file_strides=None if is_dense else table.file_strides(),
            )


def _unpack_by_torch(lane: Lane, chunk: ChunkRead, box: torch.Tensor, base: int) -> None:
    """Casts that the rule leaves to torch, which makes them on the host, and views of conjugates."""
    start = base + chunk.byte_offset
    packed = lane.memory[start : start + chunk.nbytes].clone()  # a typed view must start on an element
    box, dtype = as_bits(box, chunk.dtype)
    copy_cast(box, packed.view(dtype).as_strided(chunk.lengths, chunk.strides))
