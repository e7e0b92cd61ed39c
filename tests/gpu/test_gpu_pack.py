"""Packing on a GPU: the kernel against its reference, byte by byte, and everything around what it writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import (
    DEVICE,
    MARGIN_NBYTES,
    PAIRS,
    need_device_memory,
    needs_gpu_itself,
    on_device,
    poisoned,
    random_bytes,
    random_layout,
    run_boxes,
    slab_in,
)
from gpudcp_kernels.casts import cast_reference
from gpudcp_kernels.pack import pack_cast, pack_cast_reference
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES

pytestmark = [pytest.mark.gpu, pytest.mark.ptx]


@pytest.mark.parametrize(("memory_dtype", "file_dtype"), PAIRS, ids=str)
def test_random_boxes_are_packed_and_nothing_else_is_written(
    memory_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    """Of 0 to 5 dimensions, at any byte and at aligned ones; whole poisoned memories are compared."""
    for seed, (start, alignment) in enumerate([(0, 16), (0, 1), (5, 1), (8, 2)]):
        layout = random_layout(
            seed, memory_dtype=memory_dtype, file_dtype=file_dtype, start=start, slab_alignment=alignment
        )
        memory = random_bytes(layout.memory_nbytes, seed=seed, dtype=memory_dtype)
        expected = poisoned(layout.slab_nbytes + 2 * MARGIN_NBYTES)
        result, source = on_device(expected), on_device(memory)
        dtypes = {"memory_dtype": memory_dtype, "file_dtype": file_dtype}
        pack_cast_reference(layout.at(memory), slab_in(expected), **dtypes)
        pack_cast(layout.at(source), slab_in(result), **dtypes)
        assert torch.equal(result.cpu(), expected)
        assert torch.equal(source.cpu(), memory)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alignment", [16, 1])
def test_many_rows_of_any_length_are_packed(file_dtype: torch.dtype, alignment: int) -> None:
    """20,000 runs in one call, some of them empty, some of them many programs long."""
    rng = np.random.default_rng(alignment)
    numels = rng.integers(0, 700, 20_000)
    numels[::5000] = 200_003
    starts = np.cumsum(numels) - numels
    nbytes = numels * file_dtype.itemsize
    padded = -(-nbytes // alignment) * alignment
    byte_offsets = np.cumsum(padded) - padded
    memory = torch.randn(int(numels.sum()))
    result = on_device(poisoned(int(padded.sum()) + 2 * MARGIN_NBYTES))
    source = on_device(memory)
    boxes = run_boxes(source, starts, byte_offsets, numels)
    pack_cast(boxes, slab_in(result), memory_dtype=torch.float32, file_dtype=file_dtype)
    expected = poisoned(result.numel())
    packed = cast_reference(memory, file_dtype).view(torch.uint8)
    places = torch.from_numpy(np.repeat(byte_offsets - (np.cumsum(nbytes) - nbytes), nbytes))
    slab_in(expected)[places + torch.arange(len(packed))] = packed
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("start", [0, 3])
def test_offsets_beyond_two_and_four_gigabytes_are_right(start: int) -> None:
    """In the memory and in the slab, for one row longer than 2^31 bytes and for rows behind it."""
    numel = (1 << 30) + 5
    slab_nbytes = start + 4 * numel + 4 * 1003
    if (why := need_device_memory(4 * numel + 3 * slab_nbytes)) is not None:
        pytest.skip(why)
    source = torch.randint(-(2**31), 2**31 - 1, (numel + 1000,), dtype=torch.int32, device=DEVICE)
    memory = torch.full((slab_nbytes + SLAB_PADDING_NBYTES,), 0xA5, dtype=torch.uint8, device=DEVICE)
    numels = np.array([numel, 1000])
    boxes = run_boxes(source, np.array([0, numel]), np.array([start, start + 4 * numel + 4]), numels)
    pack_cast(boxes, memory[:slab_nbytes], memory_dtype=torch.int32, file_dtype=torch.int32)
    packed = memory[start : start + 4 * numel].clone().view(torch.int32)
    assert torch.equal(packed, source[:numel])
    last = memory[start + 4 * numel + 4 : start + 4 * numel + 4004].clone().view(torch.int32)
    assert torch.equal(last, source[numel:])
    between = [memory[:start], memory[start + 4 * numel : start + 4 * numel + 4], memory[start + 4 * numel + 4004 :]]
    assert all(bool((each == 0xA5).all()) for each in between)


@needs_gpu_itself
def test_work_goes_to_the_current_stream() -> None:
    """After what that stream was given before, without a wait on the host."""
    stream = torch.cuda.Stream()
    source = torch.zeros(1 << 24, device=DEVICE)
    memory = torch.zeros(source.nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device=DEVICE)
    boxes = run_boxes(source, np.array([0]), np.array([0]), np.array([source.numel()]))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            source += 1
        pack_cast(boxes, memory[: source.nbytes], memory_dtype=torch.float32, file_dtype=torch.float32)
        source.zero_()
        packed = memory[: source.nbytes].view(torch.float32)
        is_right = (packed == 200).all()
    stream.synchronize()
    assert bool(is_right)
