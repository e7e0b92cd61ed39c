"""The cast rule on a GPU: every value of narrow types, telling values of wide ones, and what CUDA's ``.to()`` does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gpu_cases import (
    BITS,
    DEVICE,
    FLOAT_PAIRS,
    MARGIN_NBYTES,
    needs_gpu_itself,
    on_device,
    poisoned,
    run_boxes,
    slab_in,
    telling_values,
)
from gpudcp_kernels.casts import CANONICAL_NANS, cast_reference
from gpudcp_kernels.pack import pack_cast
from gpudcp_kernels.unpack import unpack_cast
from to_table import KEPT, as_lines, measured

from gpudcp.executors.casting import copy_cast

pytestmark = [pytest.mark.gpu, pytest.mark.ptx]


def assert_same_bits(found: torch.Tensor, values: torch.Tensor, expected: torch.Tensor) -> None:
    """Names the first values whose casts differ."""
    carrier, source_carrier = BITS[expected.itemsize], BITS[values.itemsize]
    differ = (found.view(carrier) != expected.view(carrier)).nonzero()[:5, 0]
    first = [(values.view(source_carrier)[n].item(), found.view(carrier)[n].item()) for n in differ]
    assert first == []


@pytest.mark.parametrize(("source", "dest"), FLOAT_PAIRS, ids=str)
def test_packing_casts_by_the_rule(source: torch.dtype, dest: torch.dtype) -> None:
    """All values of 8 and 16 bits; denormals, ties, NaNs and overflows of the others. Aligned, and not."""
    values = telling_values(source, dest)
    expected = cast_reference(values, dest)
    nan = expected.view(BITS[dest.itemsize])[values.isnan()]
    assert torch.equal(nan, torch.full_like(nan, CANONICAL_NANS[dest]))
    for start in (0, 1):
        memory = on_device(poisoned(expected.nbytes + start + 2 * MARGIN_NBYTES))
        source_memory = on_device(values)
        boxes = run_boxes(source_memory, np.array([0]), np.array([start]), np.array([len(values)]))
        pack_cast(boxes, slab_in(memory), memory_dtype=source, file_dtype=dest)
        found = slab_in(memory)[start : start + expected.nbytes].cpu().clone().view(dest)
        assert_same_bits(found, values, expected)


@pytest.mark.parametrize(("source", "dest"), FLOAT_PAIRS, ids=str)
def test_unpacking_casts_by_the_rule(source: torch.dtype, dest: torch.dtype) -> None:
    """By each of its kernels: aligned, words at an odd byte, elements apart from one another."""
    values = telling_values(source, dest)
    expected = cast_reference(values, dest)
    for start, step in ((0, 1), (1, 1), (3, 2)):
        slab = poisoned(start + values.nbytes + 2 * MARGIN_NBYTES)
        slab_in(slab)[start : start + values.nbytes] = values.view(torch.uint8)
        result = on_device(torch.zeros(step * len(values), dtype=dest))
        boxes = run_boxes(result, np.array([0]), np.array([start]), np.array([len(values)]))
        boxes.strides[:] = step
        unpack_cast(boxes, slab_in(on_device(slab)), file_dtype=source, memory_dtype=dest)
        assert_same_bits(result.cpu()[::step].contiguous(), values, expected)


@needs_gpu_itself
@pytest.mark.parametrize("way", ["device to device", "device to host", "host to device"])
@pytest.mark.parametrize(("source", "dest"), FLOAT_PAIRS, ids=str)
def test_torch_casts_by_the_rule_as_the_executors_ask_it(source: torch.dtype, dest: torch.dtype, way: str) -> None:
    """What snapshots, and tensors that no kernel takes, are cast by."""
    values = telling_values(source, dest)
    expected = cast_reference(values, dest)
    into = torch.zeros_like(expected, device=DEVICE if way.endswith("device") else "cpu")
    copy_cast(into, on_device(values) if way.startswith("device") else values)
    assert_same_bits(into.cpu(), values, expected)


@needs_gpu_itself
def test_where_cudas_own_casts_differ_from_the_rule_is_as_written_down() -> None:
    """Printed, and compared with the table that was kept; what the rule says does not depend on it."""
    found = measured()
    print("\n".join(as_lines(found)))
    if not KEPT.exists():
        pytest.skip("no table is kept yet: look at the one above, then keep it as to_table.py says")
    assert found["pairs"] == json.loads(KEPT.read_text())["pairs"]
