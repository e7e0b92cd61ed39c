"""The cast rule: the device functions and the reference against torch's ``.to()``."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from gpudcp_kernels.casts import CANONICAL_NANS, FLOATS, cast_of, cast_reference, distinct_casts, is_castable
from gpudcp_kernels.pack import pack_cast
from kernel_boxes import boxes_of, poisoned_slab

from gpudcp.formats.dtypes import widens_exactly

INTEGERS = (
    *(torch.uint8, torch.int8, torch.uint16, torch.int16),
    *(torch.uint32, torch.int32, torch.uint64, torch.int64),
)
NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WIDE = [torch.float32, torch.float64]


def cast_by_kernel(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor through `pack_cast`."""
    slab = poisoned_slab(tensor.numel() * dtype.itemsize)
    pack_cast(boxes_of([tensor], [0]), slab, memory_dtype=tensor.dtype, file_dtype=dtype)
    return slab.view(dtype)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of a type of one or two bytes."""
    nbits = 8 * dtype.itemsize
    return torch.arange(2**nbits, dtype=torch.int64).to(BITS[dtype.itemsize]).view(dtype)


def values_near_ties(source: torch.dtype, dest: torch.dtype) -> torch.Tensor:
    """Numbers of ``dest``, ties between them, what lies past both ends, and the numbers of ``source`` next to all."""
    codes = every_value(dest) if dest.itemsize < 4 else random_bits(torch.float32, 20_000)
    exact = codes.double()
    exact = exact[exact.isfinite()].sort().values
    limits = torch.finfo(dest)
    half_step = 2.0 ** math.floor(math.log2(limits.max)) * limits.eps / 2
    past = torch.tensor([limits.max + half_step * n for n in range(8)] + [limits.max * 1e3], dtype=torch.float64)
    points = torch.cat((exact, (exact[1:] + exact[:-1]) / 2, past, -past)).to(source)
    bits = points.view(BITS[source.itemsize])
    return torch.cat((bits - 1, bits, bits + 1)).view(source)


def random_bits(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Any bit pattern: denormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
    exponents = bits.view(BITS[dtype.itemsize])
    exponents[: count // 8] &= (1 << (8 * dtype.itemsize - 10)) - 1  # many denormals
    exponents[count // 8 : count // 6] |= 0x7FF0 << (8 * dtype.itemsize - 16)  # many NaNs
    return bits


def assert_follows_the_rule(source: torch.Tensor, result: torch.Tensor) -> None:
    """Equal to torch in every value that is not NaN, and the canonical NaN where the source is one."""
    expected = source
    if result.dtype == torch.float8_e4m3fn:
        expected = source.double().clamp(-448, 448)  # as torch 2.13 does; 2.11 makes NaNs of what is larger
    expected = expected.to(result.dtype)
    carrier = BITS[result.dtype.itemsize]
    is_nan = source.isnan()
    nans = result.view(carrier)[is_nan]
    assert torch.equal(nans, torch.full_like(nans, CANONICAL_NANS[result.dtype]))
    assert torch.equal(result.view(carrier)[~is_nan], expected.view(carrier)[~is_nan])


@pytest.mark.parametrize(("source", "dest"), [p for p in product(NARROW, FLOATS) if p[0] != p[1]], ids=str)
def test_every_value_of_a_narrow_float_is_cast_as_torch_casts_it(source: torch.dtype, dest: torch.dtype) -> None:
    """All 256 or 65,536 of them, to every other type."""
    values = every_value(source)
    assert_follows_the_rule(values, cast_by_kernel(values, dest))


@pytest.mark.parametrize(("source", "dest"), [*product(WIDE, NARROW), (torch.float64, torch.float32)], ids=str)
def test_wide_floats_are_rounded_as_torch_rounds_them(source: torch.dtype, dest: torch.dtype) -> None:
    """Every number and every tie of the narrow type, with the wide numbers next to them."""
    values = values_near_ties(source, dest)
    assert_follows_the_rule(values, cast_by_kernel(values, dest))


@pytest.mark.parametrize(("source", "dest"), [p for p in product(WIDE, FLOATS) if p[0] != p[1]], ids=str)
def test_any_bits_of_a_wide_float_are_cast_as_torch_casts_them(source: torch.dtype, dest: torch.dtype) -> None:
    """Random bits, with many denormals and NaNs."""
    values = random_bits(source, 30_000)
    assert_follows_the_rule(values, cast_by_kernel(values, dest))


@pytest.mark.parametrize("source", [*INTEGERS, torch.bool], ids=str)
def test_integers_and_bools_widen_exactly(source: torch.dtype) -> None:
    """To every type that holds all their values."""
    values = integers_of(source)
    for dest in (*INTEGERS, *FLOATS):
        if is_castable(source, dest):
            result = cast_by_kernel(values, dest)
            assert result.tolist() == values.tolist()


def integers_of(dtype: torch.dtype) -> torch.Tensor:
    """Both ends, and what lies around zero."""
    if dtype == torch.bool:
        return torch.tensor([True, False] * 20)
    ends = torch.iinfo(dtype)
    numbers = [ends.min, ends.min + 1, *range(max(ends.min, -9), 10), ends.max // 2, ends.max - 1, ends.max]
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128, torch.int32, torch.bool], ids=str)
def test_a_dtype_to_itself_moves_bits(dtype: torch.dtype) -> None:
    """NaN payloads, signs of NaNs and denormals stay."""
    values = random_bits(torch.float64, 700).view(torch.uint8).view(dtype)
    moved = cast_by_kernel(values, dtype)
    assert torch.equal(moved.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("source", "dest"), [p for p in product(FLOATS, FLOATS) if p[0] != p[1]], ids=str)
def test_the_reference_follows_the_rule(source: torch.dtype, dest: torch.dtype) -> None:
    """As the kernels do."""
    values = random_bits(source, 5_000) if source.itemsize > 2 else every_value(source)
    assert_follows_the_rule(values, cast_reference(values, dest))


def test_exactly_the_exact_integer_casts_are_castable() -> None:
    """The same pairs as the plans widen."""
    for source, dest in product((*INTEGERS, torch.bool), (*INTEGERS, torch.bool, *FLOATS)):
        assert is_castable(source, dest) == widens_exactly(source, dest), (source, dest)


def test_all_floats_are_castable_to_one_another_but_not_to_integers() -> None:
    """The rule has no float to integer; torch's ``copy_`` does that."""
    assert all(is_castable(source, dest) for source, dest in product(FLOATS, FLOATS))
    assert not any(is_castable(source, dest) for source, dest in product(FLOATS, (*INTEGERS, torch.bool)))
    assert not is_castable(torch.complex64, torch.complex128)


def test_a_cast_that_the_rule_lacks_is_refused() -> None:
    """By the kernels' launchers and the reference alike."""
    with pytest.raises(ValueError, match=r"no kernel casts torch\.float32 to torch\.int32"):
        cast_of(torch.float32, torch.int32)
    with pytest.raises(ValueError, match=r"no kernel casts torch\.int64 to torch\.int32"):
        cast_reference(torch.zeros(3, dtype=torch.int64), torch.int32)


def test_moves_of_one_width_are_one_cast() -> None:
    """So few variants are compiled: 30 among floats, 4 widths of bits, 12 of integers and 6 of bool."""
    assert cast_of(torch.float16, torch.float16) == cast_of(torch.int16, torch.int16)
    assert cast_of(torch.complex128, torch.complex128) == cast_of(torch.int64, torch.int64)
    assert len(distinct_casts()) == 52


def test_the_rule_and_the_tables_need_no_triton() -> None:
    """What plans ask of them is asked on machines without it."""
    code = "import sys, gpudcp_kernels.casts, gpudcp_kernels.tables; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
