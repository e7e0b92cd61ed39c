"""Unpacking: the kernels against their reference, byte by byte, from every byte of a slab."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpudcp_kernels import unpack
from gpudcp_kernels.casts import distinct_casts
from gpudcp_kernels.pack import pack_cast
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES, Int64s, row_major_strides
from gpudcp_kernels.unpack import SPECIALISATIONS, unpack_cast, unpack_cast_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import POISON, as_bytes, boxes_of, columns_of, poisoned_slab, random_slab

PAIRS = [
    *((dtype, dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128)),
    *((torch.float32, dtype) for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn)),
    *((torch.bfloat16, torch.float32), (torch.float8_e5m2, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)),
    *((torch.float64, torch.float16), (torch.float64, torch.float8_e5m2), (torch.int16, torch.int64)),
]


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody wrote."""
    memory = torch.full((int(np.prod(shape)) * dtype.itemsize,), POISON, dtype=torch.uint8)
    return memory.view(dtype).reshape(shape)


def destinations(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Whole memories, and boxes in them of many shapes that overlap nowhere."""
    shapes = [(40, 64), (9, 77), (40, 64), (33,), (6, 10), (3, 5, 64), (2, 3, 4, 2, 3, 5), (1,), (2100,), (4,), (5, 67)]
    memories = [poisoned(*shape, dtype=dtype) for shape in shapes]
    a, b, c, d, e, f, g, h, i, j, k = memories
    boxes = [
        a[3:39],
        b[2:7, 3:70],
        c[:, 16:48],
        d[1:],
        e.t(),
        f[1:, :4, 32:],
        g[:, :, ::2, :, 1:, :4],
        h[0],
        i,
        j[:0],
        k[:, :64],
    ]
    return memories, boxes


def unpack_both(
    file_dtype: torch.dtype,
    memory_dtype: torch.dtype,
    *,
    start: int,
    alignment: int,
    file_strides: Int64s | None = None,
) -> tuple[list[bytes], list[bytes]]:
    """The memories after the kernel and after the reference, from one slab; the first payload begins at ``start``."""
    results = []
    for function in (unpack_cast, unpack_cast_reference):
        memories, boxes = destinations(memory_dtype)
        nbytes = [box.numel() * file_dtype.itemsize * 3 for box in boxes]
        begins = start + np.cumsum([0, *(-(-n // alignment) * alignment for n in nbytes)])
        slab = random_slab(int(begins[-1]), seed=start)
        function(
            boxes_of(boxes, begins[:-1].tolist()),
            slab,
            file_dtype=file_dtype,
            memory_dtype=memory_dtype,
            file_strides=file_strides,
        )
        results.append([as_bytes(memory) for memory in memories])
    return results[0], results[1]


@pytest.mark.parametrize(("file_dtype", "memory_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("start", [0, 5])
def test_payloads_are_unpacked_into_boxes_of_many_shapes(
    file_dtype: torch.dtype, memory_dtype: torch.dtype, start: int
) -> None:
    """Aligned payloads, and payloads at odd bytes; nothing beside the boxes is touched."""
    result, expected = unpack_both(file_dtype, memory_dtype, start=start, alignment=16 if start == 0 else 1)
    assert result == expected


@pytest.mark.parametrize("start", range(16))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128], ids=str)
def test_a_payload_may_begin_at_any_byte(dtype: torch.dtype, start: int) -> None:
    """Stock items are concatenated without padding; both of the kernels that read them so."""
    count = 300
    slab = random_slab(count * dtype.itemsize * 2 + start, seed=start)
    line, columns = poisoned(count, dtype=dtype), poisoned(count // 5, 7, dtype=dtype)
    begins = [start, start + count * dtype.itemsize]
    unpack_cast(boxes_of([line, columns[:, 1:6]], begins), slab, file_dtype=dtype, memory_dtype=dtype)
    data = as_bytes(slab)[start:]
    assert as_bytes(line) == data[: line.nbytes]
    assert as_bytes(columns[:, 1:6]) == data[line.nbytes :]
    assert set(as_bytes(columns[:, 0].clone()) + as_bytes(columns[:, 6].clone())) == {POISON}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 40))
def test_runs_of_any_length_and_alignment_are_unpacked(counts: list[int], skipped: int, gap: int) -> None:
    """Into the middle of other memory."""
    memories = [poisoned(3100, dtype=torch.bfloat16) for _ in counts]
    begins = np.cumsum([0, *(2 * n + gap for n in counts)])
    slab = random_slab(int(begins[-1]), seed=gap)
    boxes = boxes_of([m[skipped : skipped + n] for m, n in zip(memories, counts, strict=True)], begins[:-1].tolist())
    unpack_cast(boxes, slab, file_dtype=torch.bfloat16, memory_dtype=torch.bfloat16)
    data, poison = as_bytes(slab), bytes([POISON])
    for memory, begin, count in zip(memories, begins[:-1], counts, strict=True):
        expected = poison * (2 * skipped) + data[begin : begin + 2 * count] + poison * (2 * (3100 - skipped - count))
        assert as_bytes(memory) == expected


@pytest.mark.parametrize(
    ("file_dtype", "memory_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 3])
def test_a_payload_may_be_strided_too(file_dtype: torch.dtype, memory_dtype: torch.dtype, start: int) -> None:
    """Stock saves a transposed tensor with its strides."""
    _, boxes = destinations(memory_dtype)
    transposed = [list(torch.empty(box.shape[::-1], device="meta").stride())[::-1] for box in boxes]
    strides = columns_of(transposed, 0)
    result, expected = unpack_both(file_dtype, memory_dtype, start=start, alignment=1, file_strides=strides)
    assert result == expected


def test_a_transposed_payload_is_read_in_its_own_order() -> None:
    """Against torch, not the reference."""
    saved = torch.arange(35, dtype=torch.float32).reshape(5, 7).t()
    slab = poisoned_slab(35 * 4)
    slab.copy_(torch.from_numpy(np.arange(35, dtype=np.float32).view(np.uint8)))
    loaded = poisoned(7, 5, dtype=torch.float32)
    strides = np.array([saved.stride()])
    unpack_cast(
        boxes_of([loaded], [0]), slab, file_dtype=torch.float32, memory_dtype=torch.float32, file_strides=strides
    )
    assert torch.equal(loaded, saved)


def test_a_box_of_several_programs_is_unpacked_whole() -> None:
    """From an aligned byte and from another, with the rest that no unit holds."""
    for start in (0, 3):
        slab = random_slab(2 * 70_003 + start, seed=start)
        loaded = poisoned(70_003, dtype=torch.float32)
        unpack_cast(boxes_of([loaded], [start]), slab, file_dtype=torch.bfloat16, memory_dtype=torch.float32)
        saved = slab[start:].clone().view(torch.bfloat16)
        assert torch.equal(loaded[~saved.isnan()], saved[~saved.isnan()].float())
        assert loaded[saved.isnan()].isnan().all()


def test_what_is_packed_is_unpacked() -> None:
    """Bit for bit, where the dtype does not change."""
    tensors = [torch.randn(50, 40)[:, 3:17], torch.randn(300), torch.randn(7, 9).t()]
    begins, slab = [0, 4096, 8192], poisoned_slab(12_288)
    pack_cast(boxes_of(tensors, begins), slab, memory_dtype=torch.float32, file_dtype=torch.float32)
    loaded = [poisoned(*tensor.shape, dtype=torch.float32) for tensor in tensors]
    unpack_cast(boxes_of(loaded, begins), slab, file_dtype=torch.float32, memory_dtype=torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(tensors, loaded, strict=True))


class LaunchRecorder:
    """A kernel that runs nothing: it keeps the grid of each launch."""

    def __init__(self) -> None:
        self.grids: list[int] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *_, **__: self.grids.append(grid[0])


def test_many_tensors_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned or not; boxes that lie in memory as no unit does are a second one."""
    names = ["_unpack_aligned_kernel", "_unpack_words_kernel", "_unpack_elements_kernel"]
    recorders = [LaunchRecorder() for _ in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(unpack, name, recorder)
    monkeypatch.setattr(unpack, "_variant", unpack._variant.__wrapped__)
    slab = poisoned_slab(300 * 256 + 64)
    whole, odd = [torch.zeros(64) for _ in range(299)], torch.zeros(64, 2)[:, 0]
    for tensors, start in (([*whole, torch.zeros(64)], 0), ([*whole, torch.zeros(64)], 1), ([*whole, odd], 0)):
        boxes = boxes_of(tensors, [start + 256 * i for i in range(300)])
        unpack_cast(boxes, slab, file_dtype=torch.float32, memory_dtype=torch.float32)
    assert [recorder.grids for recorder in recorders] == [[300, 299], [300], [1]]


def test_every_variant_that_can_be_launched_is_listed() -> None:
    """Else it would be compiled for the first time in the middle of a load."""
    listed = [(s.kernel, s.constexprs) for s in SPECIALISATIONS]
    for cast in distinct_casts():
        for name in ("aligned", "words", "elements"):
            variant = unpack._variant(name, cast)
            assert (variant.kernel, variant.constexprs) in listed
    assert len(listed) == 3 * len(distinct_casts())


def test_what_cannot_be_unpacked_is_refused() -> None:
    """The cast, the padding, the place, the file strides' shape."""
    tensor = poisoned(64, dtype=torch.float32)
    boxes, slab = boxes_of([tensor], [1]), poisoned_slab(256)
    with pytest.raises(ValueError, match="no kernel casts"):
        unpack_cast(boxes, slab, file_dtype=torch.float32, memory_dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0: bytes 1 to 257, the slab has 256"):
        unpack_cast(boxes, slab, file_dtype=torch.float32, memory_dtype=torch.float32)
    with pytest.raises(ValueError, match=f"kernels may read {SLAB_PADDING_NBYTES}"):
        unpack_cast(boxes, slab.clone(), file_dtype=torch.float32, memory_dtype=torch.float32)
    strides = row_major_strides(np.array([[8, 8]]))
    with pytest.raises(ValueError, match="file strides are int64"):
        unpack_cast(boxes, slab, file_dtype=torch.float32, memory_dtype=torch.float32, file_strides=strides)
    assert set(as_bytes(tensor)) == {POISON}
