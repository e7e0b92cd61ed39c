"""The cast rule by torch: one NaN, and in all else what the kernels' reference gives."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from executor_fakes import random_tensor
from gpudcp_kernels.casts import CANONICAL_NANS, FLOATS, cast_reference, is_castable

from gpudcp.executors.casting import copy_cast

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CASTABLE = [
    (source, dest)
    for source, dest in product([*FLOATS, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64], repeat=2)
    if is_castable(source, dest)
]


def bits(tensor: torch.Tensor) -> list[int]:
    """The elements as integers."""
    return tensor.contiguous().view(-1).view(CARRIERS[tensor.dtype.itemsize]).tolist()


@pytest.mark.parametrize(("source", "dest"), CASTABLE, ids=str)
def test_every_castable_pair_is_the_reference_bit_for_bit(source: torch.dtype, dest: torch.dtype) -> None:
    """Random bits, so NaNs of all kinds; a size that leaves torch's vectorised loop a scalar end."""
    tensor = random_tensor(37, 41, dtype=source)
    into = torch.zeros(37, 41, dtype=dest)
    copy_cast(into, tensor)
    assert bits(into) == bits(cast_reference(tensor, dest))


@pytest.mark.parametrize(("source", "dest"), [pair for pair in product(FLOATS, FLOATS) if pair[0] != pair[1]], ids=str)
def test_a_nan_becomes_the_one_of_the_target(source: torch.dtype, dest: torch.dtype) -> None:
    """Whatever its sign and payload were, also in a strided destination."""
    nan = CANONICAL_NANS[source]
    sign = nan - (1 << (8 * source.itemsize)) + (1 << (8 * source.itemsize - 1))
    if source.itemsize == 1:
        sign += 256
    raw = torch.tensor([nan, sign] * 20, dtype=CARRIERS[source.itemsize]).view(source)
    into = torch.zeros(40, 3, dtype=dest)[:, 1]
    copy_cast(into, raw)
    assert set(bits(into)) == {CANONICAL_NANS[dest]}


@pytest.mark.parametrize("source", [dtype for dtype in FLOATS if dtype != torch.float8_e4m3fn], ids=str)
def test_e4m3fn_saturates_whatever_torch_does(source: torch.dtype) -> None:
    """From 448 on, with the sign; in torch 2.11 ``copy_`` makes NaNs of the same numbers. NaNs stay NaNs."""
    numbers = torch.tensor([384.0, 448.0, 460.0, 464.0, 480.0, 3e4, torch.inf, torch.nan], dtype=torch.float64)
    values = torch.cat((numbers, -numbers)).to(source).repeat(3)
    into = torch.zeros(len(values), dtype=torch.float8_e4m3fn)
    copy_cast(into, values)
    positive = [0x7C, *[0x7E] * 6, 0x7F]
    assert bits(into) == [*positive, *(code | 0x80 for code in positive[:-1]), 0x7F] * 3


@pytest.mark.parametrize("shape", [(700,), (1, 3, 233), (3, 5, 1, 47), (690, 1)], ids=str)
@pytest.mark.parametrize("dest", [torch.bfloat16, torch.float8_e4m3fn, torch.int32], ids=str)
def test_large_tensors_are_cast_in_pieces(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dest: torch.dtype
) -> None:
    """Which gives the same, whatever is cut; strided on both sides."""
    tensor = random_tensor(*shape) if dest.is_floating_point else torch.arange(float(prod(shape))).view(shape)
    whole, cut = torch.zeros(shape, dtype=dest), torch.zeros(*shape, 2, dtype=dest)[..., 1]
    copy_cast(whole, tensor)
    monkeypatch.setattr("gpudcp.executors.casting._PIECE_NUMEL", 64)
    copy_cast(cut, tensor)
    assert bits(cut) == bits(whole)


def test_a_dtype_to_itself_moves_the_bits_of_nans() -> None:
    """Payloads and signs stay."""
    tensor = torch.tensor([0x7FC00001, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    into = torch.zeros(3)
    copy_cast(into, tensor)
    assert bits(into) == bits(tensor)


def test_nans_are_cast_into_negative_views() -> None:
    """Torch refuses to show such a view's bits; its memory gets the negated values all the same."""
    into = torch.zeros(2, dtype=torch.complex64).conj().imag
    copy_cast(into, torch.tensor([1.5, torch.nan], dtype=torch.bfloat16))
    assert into[0] == 1.5
    assert bool(into[1].isnan())


def test_pairs_outside_the_rule_are_torchs() -> None:
    """A load may narrow: float to integer as copy_ does it."""
    into = torch.zeros(3, dtype=torch.int8)
    copy_cast(into, torch.tensor([1.9, -2.9, 100.0]))
    assert into.tolist() == [1, -2, 100]
