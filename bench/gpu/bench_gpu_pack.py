"""Packing and unpacking on a GPU beside one large copy on the same device: bytes read and written, device time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu.device_time import add_device_timings, compare_on_device, share
from bench.gpu.hardware import need_device_memory
from bench.measure import Contender
from bench.results import Suite, in_words
from bench.sizes import Sizes

COPY = "device-to-device copy"
COUNT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tensors, and the slab that they are packed into or unpacked from."""

    tensors: list[torch.Tensor]
    file_dtype: torch.dtype
    slab: torch.Tensor
    boxes: Any
    packed: list[torch.Tensor]
    """Each tensor's bytes in the slab."""

    @property
    def moved_nbytes(self) -> int:
        """Read and written."""
        numel = sum(tensor.numel() for tensor in self.tensors)
        return numel * (self.tensors[0].itemsize + self.file_dtype.itemsize)


def work_of(tensors: list[torch.Tensor], file_dtype: torch.dtype, *, start: int = 0) -> Work:
    """Tensors of one shape, one after the other in a slab from byte ``start`` on."""
    from gpudcp_kernels.tables import SLAB_PADDING_NBYTES

    from gpudcp.executors.boxtables import BoxTable

    of_one_nbytes = tensors[0].numel() * file_dtype.itemsize
    nbytes = start + len(tensors) * of_one_nbytes
    slab = torch.empty(nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device="cuda")[:nbytes]
    table = BoxTable()
    for number, tensor in enumerate(tensors):
        table.add(tensor.data_ptr(), start + number * of_one_nbytes, tensor.shape, tensor.stride())
    packed = list(slab[start:].view(len(tensors), -1))
    return Work(tensors=tensors, file_dtype=file_dtype, slab=slab, boxes=table.boxes(), packed=packed)


def packing(name: str, work: Work) -> Contender:
    """Pack all tensors; checked against torch, poisoned before."""
    from gpudcp_kernels.pack import pack_cast

    dtypes = {"memory_dtype": work.tensors[0].dtype, "file_dtype": work.file_dtype}

    def check() -> None:
        for tensor, packed in zip(work.tensors, work.packed, strict=True):
            if not torch.equal(packed.clone().view(work.file_dtype), tensor.to(work.file_dtype).reshape(-1)):
                raise ValueError(f"{name}: packed wrong")

    return Contender(
        name=name,
        prepare=lambda: work.slab.fill_(0xA5),
        run=lambda: pack_cast(work.boxes, work.slab, **dtypes),
        check=check,
    )


def unpacking(name: str, work: Work) -> Contender:
    """Unpack all tensors; checked against torch, poisoned before."""
    from gpudcp_kernels.unpack import unpack_cast

    dtypes = {"memory_dtype": work.tensors[0].dtype, "file_dtype": work.file_dtype}
    values = torch.randn(work.tensors[0].numel(), device="cuda").to(work.file_dtype)
    for packed in work.packed:
        packed.copy_(values.view(torch.uint8))

    def prepare() -> None:
        for tensor in work.tensors:
            tensor.fill_(-1)

    def check() -> None:
        expected = values.to(work.tensors[0].dtype).view(work.tensors[0].shape)
        if not all(torch.equal(tensor, expected) for tensor in work.tensors):
            raise ValueError(f"{name}: unpacked wrong")

    return Contender(name=name, prepare=prepare, run=lambda: unpack_cast(work.boxes, work.slab, **dtypes), check=check)


def copying(nbytes: int) -> tuple[Contender, int]:
    """The ceiling: so many bytes read and as many written, by one call of torch."""
    source = torch.empty(nbytes // 4, dtype=torch.int32, device="cuda").random_()
    into = torch.empty_like(source)
    return Contender(name=COPY, run=lambda: into.copy_(source)), 2 * source.nbytes


@pytest.mark.parametrize("act", [packing, unpacking], ids=["pack", "unpack"])
def test_large_tensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, act: Any) -> None:
    """Without a cast, from fp32 to bf16 or back, to and from odd bytes, and of columns of larger matrices."""
    need_device_memory(8 * sizes.gpu_nbytes)
    what = "pack" if act is packing else "unpack"
    rows = list(torch.randn(COUNT, sizes.gpu_nbytes // 4 // COUNT, device="cuda"))
    columns = [torch.randn(16, 2, len(row) // 32, device="cuda")[:, 0] for row in rows]
    works = {
        f"{what}, no cast": work_of(rows, torch.float32),
        f"{what}, fp32 and bf16": work_of(rows, torch.bfloat16),
        f"{what}, no cast, odd byte": work_of(rows, torch.float32, start=1),
        f"{what}, fp32 and bf16, odd byte": work_of(rows, torch.bfloat16, start=1),
        f"{what}, no cast, columns": work_of(columns, torch.float32),
    }
    copy, copied_nbytes = copying(sizes.gpu_nbytes)
    moved = {COPY: copied_nbytes} | {name: work.moved_nbytes for name, work in works.items()}
    contenders = [copy, *(act(name, work) for name, work in works.items())]
    timings = compare_on_device(benchmark, contenders, sizes.device_rounds)
    add_device_timings(suite, f"{what}, {in_words(sizes.gpu_nbytes)} in {COUNT} tensors", timings, moved, COPY)
    names = list(works)
    suite.expect(f"{names[0]}: of {COPY}", share(timings, moved, names[0], COPY), "at least", 0.9, "x")
    suite.expect(f"{names[1]}: of {COPY}", share(timings, moved, names[1], COPY), "at least", 0.85, "x")
