"""Block-scaled weights: the kernel against its reference and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpudcp_kernels.dequant import SCALE_BLOCK, SPECIALISATIONS, Scales, dequant_unpack, dequant_unpack_reference
from gpudcp_kernels.tables import Int64s
from kernel_boxes import POISON, as_bytes, boxes_of, random_slab

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def scales_of(weights: list[torch.Tensor], origins: list[tuple[int, int]]) -> Scales:
    """One row for every matrix of scales."""
    return Scales(
        addresses=np.array([weight.data_ptr() for weight in weights], np.int64),
        strides=np.array([weight.stride(0) for weight in weights], np.int64),
        origins=np.array(origins, np.int64),
    )


def random_scales(rows: int, columns: int) -> torch.Tensor:
    """Of the blocks of a weight; powers of two and others, small and large."""
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK), generator=generator).exp()


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody wrote."""
    return torch.full((rows * columns * dtype.itemsize,), POISON, dtype=torch.uint8).view(dtype).view(rows, columns)


def dequantise_both(
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    origins: list[tuple[int, int]],
    *,
    start: int,
    gap: int,
    file_strides: Int64s | None = None,
) -> tuple[list[bytes], list[bytes]]:
    """The whole memories after the kernel and after the reference; boxes leave a margin of 16 columns."""
    results = []
    scales = [random_scales(o[0] + s[0], o[1] + s[1]) for o, s in zip(origins, shapes, strict=True)]
    begins = start + np.cumsum([0, *(2 * rows * columns + gap for rows, columns in shapes)])
    slab = random_slab(int(begins[-1]), seed=start)
    for function in (dequant_unpack, dequant_unpack_reference):
        memories = [poisoned(rows, columns + 16, dtype) for rows, columns in shapes]
        boxes = boxes_of([memory[:, :-16] for memory in memories], begins[:-1].tolist())
        function(boxes, scales_of(scales, origins), slab, memory_dtype=dtype, file_strides=file_strides)
        results.append([as_bytes(memory) for memory in memories])
    return results[0], results[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "gap"), [(0, 0), (5, 3), (0, 16)])
def test_each_element_is_scaled_by_its_block(dtype: torch.dtype, start: int, gap: int) -> None:
    """Weights that are whole blocks and weights that are not; parts of weights; from any byte; every e4m3 value."""
    shapes = [(256, 128), (130, 272), (17, 48), (9, 31), (1, 1), (0, 16)]
    origins = [(0, 0), (0, 0), (120, 96), (125, 3), (300, 127), (0, 0)]
    result, expected = dequantise_both(dtype, shapes, origins, start=start, gap=gap)
    assert result == expected


@pytest.mark.parametrize("start", range(16))
def test_a_payload_may_begin_at_any_byte(start: int) -> None:
    """As in every other file."""
    result, expected = dequantise_both(torch.bfloat16, [(5, 32), (3, 7)], [(126, 112), (0, 0)], start=start, gap=0)
    assert result == expected


def test_a_payload_may_be_strided() -> None:
    """Rows of a larger matrix, and columns."""
    strides = np.array([[64, 1], [1, 10]])
    result, expected = dequantise_both(
        torch.bfloat16, [(8, 32), (10, 6)], [(0, 0), (0, 0)], start=0, gap=512, file_strides=strides
    )
    assert result == expected


def test_a_weight_becomes_what_the_definition_says() -> None:
    """The element times its block's scale, by torch alone."""
    rows, columns = 200, 160
    slab, scales = random_slab(rows * columns, seed=1), random_scales(rows, columns)
    weight = slab.view(torch.float8_e4m3fn).view(rows, columns)
    memory = poisoned(rows, columns, torch.bfloat16)
    dequant_unpack(boxes_of([memory], [0]), scales_of([scales], [(0, 0)]), slab, memory_dtype=torch.bfloat16)
    spread = scales.repeat_interleave(SCALE_BLOCK, 0).repeat_interleave(SCALE_BLOCK, 1)[:rows, :columns]
    expected = (weight.float() * spread).to(torch.bfloat16)
    assert torch.equal(memory.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


def test_every_variant_that_can_be_launched_is_listed() -> None:
    """Three for each dtype."""
    assert len({specialisation.name for specialisation in SPECIALISATIONS}) == 9


def test_what_cannot_be_dequantised_is_refused() -> None:
    """Other dtypes, boxes or scales."""
    memory, scales, slab = poisoned(4, 16, torch.bfloat16), random_scales(4, 16), random_slab(64, seed=0)
    boxes, of_boxes = boxes_of([memory], [0]), scales_of([scales], [(0, 0)])
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        dequant_unpack(boxes, of_boxes, slab, memory_dtype=torch.float64)
    with pytest.raises(ValueError, match="have two dimensions"):
        dequant_unpack(boxes_of([memory[0]], [0]), of_boxes, slab, memory_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="1 boxes, scales of shapes"):
        dequant_unpack(boxes, scales_of([scales] * 2, [(0, 0)] * 2), slab, memory_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="row 0: scales at"):
        dequant_unpack(boxes, scales_of([scales], [(-1, 0)]), slab, memory_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="row 0: bytes 8 to 72, the slab has 64"):
        dequant_unpack(boxes_of([memory], [8]), of_boxes, slab, memory_dtype=torch.bfloat16)
    assert set(as_bytes(memory)) == {POISON}
