"""Block-scaled weights on a GPU: the kernel against its reference, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import MARGIN_NBYTES, on_device, poisoned, random_bytes, slab_in
from gpudcp_kernels.dequant import SCALE_BLOCK, Scales, dequant_unpack, dequant_unpack_reference
from gpudcp_kernels.tables import Boxes

pytestmark = [pytest.mark.gpu, pytest.mark.ptx]

SHAPES = [(256, 128), (130, 272), (17, 48), (9, 31), (1, 1), (0, 16), (700, 640), (33, 1000)]
ORIGINS = [(0, 0), (0, 0), (120, 96), (125, 3), (300, 127), (0, 0), (128, 256), (1, 5)]
ALL = [*range(len(SHAPES))]
ALIGNED = [n for n in ALL if SHAPES[n][1] % 16 == ORIGINS[n][1] % 16 == 0]
SCALE_NUMEL = 64
GAP_COLUMNS = 16


def run(
    function: object,
    memory: torch.Tensor,
    scales: torch.Tensor,
    slab: torch.Tensor,
    dtype: torch.dtype,
    start: int,
    which: list[int],
) -> torch.Tensor:
    """The whole memory after these weights, which lie in it with gaps between their rows."""
    shapes, origins = np.array(SHAPES)[which], np.array(ORIGINS)[which]
    rows, columns = shapes.T
    widths = columns + GAP_COLUMNS
    ends = np.cumsum(rows * widths)
    boxes = Boxes(
        addresses=memory.data_ptr() + (ends - rows * widths) * dtype.itemsize,
        byte_offsets=start + np.cumsum(rows * columns) - rows * columns,
        lengths=shapes,
        strides=np.column_stack((widths, np.ones_like(widths))),
    )
    of_boxes = Scales(
        addresses=scales.data_ptr() + 4 * SCALE_NUMEL * np.arange(len(which)),
        strides=np.full(len(which), 8),
        origins=origins,
    )
    function(boxes, of_boxes, slab_in(slab), memory_dtype=dtype)  # type: ignore[operator]
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("start", "which"), [(0, ALIGNED), *((start, ALL) for start in (0, 1, 2, 3, 7, 12))], ids=repr)
def test_each_element_is_scaled_by_its_block(dtype: torch.dtype, start: int, which: list[int]) -> None:
    """Whole blocks and parts of them, from any byte, all e4m3 values, scales from tiny to huge and not a number."""
    generator = torch.Generator().manual_seed(start)
    scales = (torch.randn(len(SHAPES) * SCALE_NUMEL, generator=generator) * 8).exp()
    scales[::17] = 1e-40  # products that are denormal
    scales[5::31] = torch.nan
    nelements = sum(rows * columns for rows, columns in SHAPES)
    slab = random_bytes(start + nelements + 2 * MARGIN_NBYTES, seed=start)
    memory = poisoned(sum(rows * (columns + GAP_COLUMNS) for rows, columns in SHAPES) * dtype.itemsize)
    result = run(dequant_unpack, on_device(memory), on_device(scales), on_device(slab), dtype, start, which)
    expected = run(dequant_unpack_reference, memory, scales, slab, dtype, start, which)
    assert torch.equal(result.cpu(), expected)


def test_a_row_of_scales_holds_the_boxes_that_are_tested() -> None:
    """Eight blocks a row, eight rows: else the test above would read what lies behind its own scales."""
    for (rows, columns), (row, column) in zip(SHAPES, ORIGINS, strict=True):
        assert (row + rows - 1) // SCALE_BLOCK < 8
        assert (column + columns - 1) // SCALE_BLOCK < 8
