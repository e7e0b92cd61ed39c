"""Unpacking on a GPU: the kernels against their reference, byte by byte, from every byte of a slab."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import (
    DEVICE,
    MARGIN_NBYTES,
    PAIRS,
    Layout,
    need_device_memory,
    on_device,
    poisoned,
    random_bytes,
    random_layout,
    run_boxes,
    slab_in,
)
from gpudcp_kernels.casts import cast_reference
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES
from gpudcp_kernels.unpack import unpack_cast, unpack_cast_reference

pytestmark = [pytest.mark.gpu, pytest.mark.ptx]


def check_unpacks(
    layout: Layout, file_dtype: torch.dtype, memory_dtype: torch.dtype, *, is_file_strided: bool = False
) -> None:
    """Whole poisoned memories, the kernel's and the reference's, are equal; the slab stays as it was."""
    slab = random_bytes(layout.slab_nbytes + 2 * MARGIN_NBYTES, seed=layout.slab_nbytes, dtype=file_dtype)
    file_strides = layout.file_strides if is_file_strided else None
    expected = poisoned(layout.memory_nbytes)
    result, source = on_device(expected), on_device(slab)
    for boxes, from_slab, function in (
        (layout.at(expected), slab, unpack_cast_reference),
        (layout.at(result), source, unpack_cast),
    ):
        function(boxes, slab_in(from_slab), file_dtype=file_dtype, memory_dtype=memory_dtype, file_strides=file_strides)
    assert torch.equal(result.cpu(), expected)
    assert torch.equal(source.cpu(), slab)


@pytest.mark.parametrize(("file_dtype", "memory_dtype"), PAIRS, ids=str)
def test_payloads_are_unpacked_into_random_boxes_and_nothing_else_is_written(
    file_dtype: torch.dtype, memory_dtype: torch.dtype
) -> None:
    """Boxes of 0 to 5 dimensions; all aligned, payloads that are all aligned, and payloads at any byte."""
    for seed, (start, alignment, are_regular) in enumerate(
        [(0, 16, True), (0, 16, False), (0, 1, False), (11, 1, False)]
    ):
        layout = random_layout(
            seed,
            memory_dtype=memory_dtype,
            file_dtype=file_dtype,
            start=start,
            slab_alignment=alignment,
            are_regular=are_regular,
        )
        check_unpacks(layout, file_dtype, memory_dtype)


@pytest.mark.parametrize("start", range(16))
def test_payloads_may_begin_at_each_of_the_sixteen_offsets(start: int) -> None:
    """All of them at this one: aligned units, words, and elements of all widths."""
    for file_dtype, memory_dtype in [
        *((dtype, dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128)),
        *((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float8_e4m3fn, torch.float16)),
    ]:
        layout = random_layout(
            start, memory_dtype=memory_dtype, file_dtype=file_dtype, start=start, slab_alignment=16, count=18
        )
        check_unpacks(layout, file_dtype, memory_dtype)


@pytest.mark.parametrize(
    ("file_dtype", "memory_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 3])
def test_payloads_may_be_strided_too(file_dtype: torch.dtype, memory_dtype: torch.dtype, start: int) -> None:
    """As stock saves a transposed tensor."""
    layout = random_layout(
        start, memory_dtype=memory_dtype, file_dtype=file_dtype, start=start, is_file_strided=True, slab_alignment=1
    )
    check_unpacks(layout, file_dtype, memory_dtype, is_file_strided=True)


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alignment", [16, 1])
def test_many_rows_of_any_length_are_unpacked(memory_dtype: torch.dtype, alignment: int) -> None:
    """20,000 runs in one call, some of them empty, some of them many programs long."""
    rng = np.random.default_rng(alignment)
    numels = rng.integers(0, 700, 20_000)
    numels[::5000] = 200_003
    starts = np.cumsum(numels) - numels
    padded = -(-(4 * numels + alignment - 1) // alignment) * alignment
    byte_offsets = np.cumsum(padded) - padded
    values = torch.randn(int(numels.sum()))
    slab = poisoned(int(padded.sum()) + 2 * MARGIN_NBYTES)
    nbytes = 4 * numels
    places = torch.from_numpy(np.repeat(byte_offsets - (np.cumsum(nbytes) - nbytes), nbytes))
    slab_in(slab)[places + torch.arange(values.nbytes)] = values.view(torch.uint8)
    result = torch.zeros(len(values), dtype=memory_dtype, device=DEVICE)
    boxes = run_boxes(result, starts, byte_offsets, numels)
    unpack_cast(boxes, slab_in(on_device(slab)), file_dtype=torch.float32, memory_dtype=memory_dtype)
    assert torch.equal(result.cpu(), cast_reference(values, memory_dtype))


@pytest.mark.parametrize("start", [0, 3])
def test_offsets_beyond_two_and_four_gigabytes_are_right(start: int) -> None:
    """In the slab and in the memory, for one row longer than 2^31 bytes and for rows behind it."""
    numel = (1 << 30) + 8
    slab_nbytes = start + 4 * (numel + 1000)
    if (why := need_device_memory(3 * slab_nbytes)) is not None:
        pytest.skip(why)
    memory = torch.empty(slab_nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device=DEVICE).random_()
    result = torch.zeros(numel + 1002, dtype=torch.int32, device=DEVICE)
    starts, numels = np.array([1, numel + 1]), np.array([numel, 1000])
    if start == 0:
        starts -= 1  # then the long row is aligned on both sides
    boxes = run_boxes(result, starts, start + 4 * np.array([0, numel]), numels)
    unpack_cast(boxes, memory[:slab_nbytes], file_dtype=torch.int32, memory_dtype=torch.int32)
    expected = memory[start : start + 4 * (numel + 1000)].clone().view(torch.int32)
    first = int(starts[0])
    assert torch.equal(result[first : first + numel + 1000], expected)
    assert not bool(result[:first].any() | result[first + numel + 1000 :].any())
