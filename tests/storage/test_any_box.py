"""Any box of any saved tensor, into any destination: what gpudcp reads is what slicing the tensor gives."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import gpudcp
from gpudcp import Options

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.complex128, torch.float8_e5m2)


@dataclass(frozen=True)
class Case:
    """A tensor of ``sizes`` whose dimensions lie in memory in ``order``, and boxes of it, each offsets and lengths."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    dtype: torch.dtype
    is_stock: bool
    is_transposed: bool
    """The destinations."""
    options: Options


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ndim = draw(st.integers(0, 4))
    # Long dimensions at times, so that a tensor spans several of the smallest slabs.
    sizes = tuple(draw(st.sampled_from([0, 1, 2, 3, 5, 40] if ndim > 2 else [1, 7, 130])) for _ in range(ndim))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        offsets = tuple(draw(st.integers(0, size)) for size in sizes)
        boxes.append((offsets, tuple(draw(st.integers(0, size - o)) for size, o in zip(sizes, offsets, strict=True))))
    if draw(st.booleans()):
        boxes.append(((0,) * ndim, sizes))
    options = Options(
        slab_nbytes=draw(st.sampled_from([4096, 8192, 4 << 20])),
        lanes=draw(st.integers(1, 3)),
        verify=draw(st.sampled_from(["payload", "full", "off"])),
    )
    return Case(
        sizes,
        tuple(draw(st.permutations(range(ndim)))),
        boxes,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.booleans()),
        options,
    )


class Boxes(gpudcp.DefaultLoadPlanner):
    """Reads boxes of one tensor into tensors of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.found = [_empty(lengths, case) for _, lengths in case.boxes]
        self.committed = [0] * len(case.boxes)
        self._case = case

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        (index,) = self.metadata.storage_data
        return LoadPlan([self._part(index, number) for number in range(len(self._case.boxes))])

    def _part(self, index: MetadataIndex, number: int) -> ReadItem:
        offsets, lengths = self._case.boxes[number]
        return ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=index,
            # Only this planner looks at it.
            dest_offsets=torch.Size([number]),
            storage_index=index,
            storage_offsets=torch.Size(offsets),
            lengths=torch.Size(lengths),
        )

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.found[read_item.dest_offsets[0]]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        number = read_item.dest_offsets[0]
        assert tensor is self.found[number]
        self.committed[number] += 1


def _empty(lengths: tuple[int, ...], case: Case) -> torch.Tensor:
    if case.is_transposed:
        return torch.empty(lengths[::-1], dtype=case.dtype).permute(tuple(reversed(range(len(lengths)))))
    return torch.empty(lengths, dtype=case.dtype)


def _saved(case: Case) -> torch.Tensor:
    in_memory = tuple(case.sizes[dim] for dim in case.order)
    random = torch.Generator().manual_seed(len(case.boxes))
    nbytes = math.prod(in_memory) * case.dtype.itemsize
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=random)
    back = tuple(case.order.index(dim) for dim in range(len(case.order)))
    return data.view(case.dtype).view(in_memory).permute(back)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8).numpy())


@given(cases())
@settings(deadline=None, max_examples=150)
def test_any_box_of_any_layout_is_read_right(case: Case) -> None:
    """Permuted tensors that stock saved as they lie and gpudcp row-major, in slabs smaller than a row."""
    tensor = _saved(case)
    with tempfile.TemporaryDirectory() as directory:
        save: Any = dcp.save if case.is_stock else gpudcp.save
        save({"weight": tensor}, checkpoint_id=directory)
        planner = Boxes(case)
        wanted = {"weight": torch.empty(case.sizes, dtype=case.dtype)}
        gpudcp.load(wanted, directory, planner=planner, options=case.options)
    assert planner.committed == [1] * len(case.boxes)
    for (offsets, lengths), found in zip(case.boxes, planner.found, strict=True):
        expected = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        assert found.shape == expected.shape
        assert _bytes(found) == _bytes(expected)
