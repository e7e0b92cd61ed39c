"""Packing: the kernel against its reference, byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpudcp_kernels import pack
from gpudcp_kernels.casts import distinct_casts
from gpudcp_kernels.pack import SPECIALISATIONS, pack_cast, pack_cast_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import POISON, as_bytes, boxes_of, poisoned_slab


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits, NaNs too."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, nbytes, np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def assert_packs_as_the_reference(
    tensors: list[torch.Tensor], file_dtype: torch.dtype, *, alignment: int = 16, start: int = 0
) -> None:
    """The tensors one after the other, each at a multiple of ``alignment``; what lies between stays as it was."""
    ends = np.cumsum([0, *(-(-t.numel() * file_dtype.itemsize // alignment) * alignment + 16 for t in tensors)])
    boxes = boxes_of(tensors, ends[:-1].tolist())
    slab, expected = poisoned_slab(int(ends[-1]), start=start), poisoned_slab(int(ends[-1]))
    pack_cast(boxes, slab, memory_dtype=tensors[0].dtype, file_dtype=file_dtype)
    pack_cast_reference(boxes, expected, memory_dtype=tensors[0].dtype, file_dtype=file_dtype)
    assert as_bytes(slab) == as_bytes(expected)


PAIRS = [
    *((dtype, dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128)),
    *((torch.float32, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float64)),
    *((torch.float64, torch.float8_e5m2), (torch.float8_e4m3fn, torch.bfloat16), (torch.bool, torch.int64)),
]


@pytest.mark.parametrize(("memory_dtype", "file_dtype"), PAIRS, ids=str)
def test_boxes_of_many_shapes_are_packed_row_major(memory_dtype: torch.dtype, file_dtype: torch.dtype) -> None:
    """Lines with and without a rest, slices, columns, transposes, six dimensions, single numbers, nothing at all."""
    matrix = random_tensor(40, 128, dtype=memory_dtype)
    six = random_tensor(3, 2, 4, 2, 3, 5, dtype=memory_dtype)[:, :, ::2, :, 1:, :4]
    tensors = [
        *(matrix, matrix[3:37], matrix[:, 64:], matrix[5:9, 3:77], matrix.t(), matrix[::3, ::5], six),
        *(matrix.flatten()[1:], matrix.flatten()[:4999], matrix[0, 0], matrix[:0], matrix[0, :1].expand(33)),
        random_tensor(5, 7, 64, dtype=memory_dtype)[1:4, :, :32],
        random_tensor(5, 67, dtype=memory_dtype)[:, :64],  # rows of whole units that do not begin on one
    ]
    assert_packs_as_the_reference(tensors, file_dtype)


@pytest.mark.parametrize("start", range(16))
def test_a_payload_may_begin_at_any_byte_of_the_slab(start: int) -> None:
    """Where no typed store may go."""
    for file_dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [random_tensor(37, dtype=torch.float32), random_tensor(9, 8, dtype=torch.float32)[:, :5]]
        assert_packs_as_the_reference(tensors, file_dtype, alignment=1, start=start)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(0, 9), st.sampled_from([1, 2, 4, 16]))
def test_runs_of_any_length_and_alignment_are_packed(counts: list[int], skipped: int, alignment: int) -> None:
    """From the middle of other memory."""
    memory = random_tensor(3100, dtype=torch.bfloat16)
    assert_packs_as_the_reference([memory[skipped : skipped + n] for n in counts], torch.bfloat16, alignment=alignment)


def test_a_box_of_several_programs_is_packed_whole() -> None:
    """With the rest that no unit holds."""
    assert_packs_as_the_reference([random_tensor(70_003, dtype=torch.float32)], torch.bfloat16)
    assert_packs_as_the_reference([random_tensor(129, 1024, dtype=torch.bfloat16)[:, :512]], torch.bfloat16)


class LaunchRecorder:
    """A kernel that runs nothing: it keeps the grid and the constexprs of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *_, **keywords: self.launches.append((grid[0], keywords))


def test_many_tensors_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many programs as there are blocks, not tensors times the largest; unaligned ones are a second launch."""
    recorder = LaunchRecorder()
    monkeypatch.setattr(pack, "_pack_kernel", recorder)
    tensors = [torch.zeros(64) for _ in range(200)] + [torch.zeros(100_000)]
    offsets = [256 * i for i in range(201)]
    slab = poisoned_slab(256 * 200 + 400_000)
    pack_cast(boxes_of(tensors, offsets), slab, memory_dtype=torch.float32, file_dtype=torch.float32)
    blocks = -(-100_000 // (4 * 1024))
    assert [grid for grid, _ in recorder.launches] == [200 + blocks]
    offsets[7] += 4
    pack_cast(boxes_of(tensors, offsets), slab, memory_dtype=torch.float32, file_dtype=torch.float32)
    assert [(grid, keywords["UNIT"]) for grid, keywords in recorder.launches[1:]] == [(199 + blocks, 4), (1, 1)]


def test_nothing_to_pack_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows, or rows without elements."""
    recorder = LaunchRecorder()
    monkeypatch.setattr(pack, "_pack_kernel", recorder)
    boxes = boxes_of([torch.zeros(0), torch.zeros(3, 0)], [0, 0])
    pack_cast(boxes, poisoned_slab(0), memory_dtype=torch.float32, file_dtype=torch.float32)
    assert recorder.launches == []


def test_every_variant_that_can_be_launched_is_listed() -> None:
    """Else it would be compiled for the first time in the middle of a save."""
    listed = [specialisation.constexprs for specialisation in SPECIALISATIONS]
    assert len(listed) == 2 * len(distinct_casts())
    for cast in distinct_casts():
        for unit in (pack._aligned_unit(cast), 1):
            assert pack._constexprs(cast, unit) in listed


def test_what_cannot_be_packed_is_refused() -> None:
    """The cast, the slab's device or shape, the place: before the first byte is written."""
    tensor = torch.zeros(64)
    boxes, slab = boxes_of([tensor], [0]), poisoned_slab(255)
    with pytest.raises(ValueError, match="no kernel casts"):
        pack_cast(boxes, slab, memory_dtype=torch.float32, file_dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0: bytes 0 to 256, the slab has 255"):
        pack_cast(boxes, slab, memory_dtype=torch.float32, file_dtype=torch.float32)
    with pytest.raises(ValueError, match="the slab is on meta"):
        pack_cast(boxes, slab.to("meta"), memory_dtype=torch.float32, file_dtype=torch.float32)
    assert as_bytes(slab) == bytes([POISON]) * 255
