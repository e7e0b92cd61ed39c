"""Dtypes: which ones torch can save, and which ones widen to which, found out by asking torch about every value."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gpudcp.formats.dtypes import (
    DTYPES_BY_STORAGE_NAME,
    QUANTIZED_DTYPES,
    STORAGE_NAMES,
    dtype_name,
    is_savable,
    widens_exactly,
)

# torch says so once for each process, on any use of these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
PLAIN_DTYPES = [dtype for dtype in DTYPES if is_savable(dtype) and dtype not in QUANTIZED_DTYPES]
UNSAVABLE = {
    *("quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{sign}{n}" for sign in ("int", "uint") for n in range(1, 8)),
}


def comes_back(dtype: torch.dtype, path: Path) -> bool:
    """Whether stock DCP, asked to, saves a tensor of this dtype and loads it bit for bit."""
    if dtype in QUANTIZED_DTYPES:
        saved, loaded = (torch._empty_affine_quantized([8], scale=0.5, zero_point=0, dtype=dtype) for _ in range(2))
    else:
        saved, loaded = (torch.full((16,), fill, dtype=torch.uint8).view(dtype) for fill in (1, 0))
    try:
        dcp.save({"tensor": saved}, checkpoint_id=path)
        dcp.load({"tensor": loaded}, checkpoint_id=path)
    except dcp.CheckpointException:
        return False
    return dtype in QUANTIZED_DTYPES or torch.equal(loaded.view(torch.uint8), saved.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_is_savable_exactly_if_stock_saves_and_loads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """The answer is stock's own, for every dtype that this torch has."""
    assert is_savable(dtype) == comes_back(dtype, tmp_path)
    assert is_savable(dtype) == (dtype_name(dtype) not in UNSAVABLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_name_of_a_dtype_is_its_name_in_torch(dtype: torch.dtype) -> None:
    """As a pickle spells it: a global of the module torch."""
    assert getattr(torch, dtype_name(dtype)) is dtype


def test_storage_names_are_those_of_torchs_storage_classes() -> None:
    """Both tables say the same, and torch agrees."""
    assert {name: dtype for dtype, name in STORAGE_NAMES.items()} == DTYPES_BY_STORAGE_NAME
    for dtype, name in STORAGE_NAMES.items():
        assert getattr(torch, name).dtype == dtype


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_a_dtype_has_a_storage_name_exactly_if_torch_pickles_it_by_one(dtype: torch.dtype) -> None:
    """All others are pickled as untyped storages with their dtype beside them."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(16, dtype=torch.uint8).view(dtype), buffer)
    assert (b"UntypedStorage" in buffer.getvalue()) == (dtype not in STORAGE_NAMES)
    assert STORAGE_NAMES.get(dtype, "UntypedStorage").encode() in buffer.getvalue()


def test_the_quantized_dtypes_are_the_savable_ones_that_torch_calls_so() -> None:
    """torch names them all with a q."""
    quantized = {dtype for dtype in DTYPES if dtype_name(dtype).startswith("q")}
    assert {dtype for dtype in quantized if is_savable(dtype)} == QUANTIZED_DTYPES


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a dtype of 8 or 16 bits; of a wider one, values that a narrower type would lose."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (4096,), generator=generator)
    ends = torch.tensor([0, -1, 1, (1 << 63) - 1, -(1 << 63), 1 << 52, 1 << 23], dtype=torch.int64)
    return torch.cat([words, ends]).view(dtype)


def is_lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast to the target and back gives every bit again; NaNs only have to stay NaNs."""
    values = all_values(source)
    back = values.to(target).to(source)
    same_bits = (back.view(torch.uint8) == values.view(torch.uint8)).view(len(values), -1).all(dim=1)
    return bool((same_bits | (values != values) & (back != back)).all())


PAIRS = [pair for pair in itertools.product(PLAIN_DTYPES, repeat=2) if widens_exactly(*pair)]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda dtype: dtype_name(dtype))
def test_what_is_said_to_widen_exactly_loses_no_value(source: torch.dtype, target: torch.dtype) -> None:
    """Every bit pattern of the narrow types, through torch's own casts, denormals, infinities and signed zeros too."""
    if source != target:
        assert is_lossless(source, target)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e5m2),
        (torch.float8_e5m2, torch.float8_e4m3fn),
        (torch.int8, torch.uint8),
        (torch.uint8, torch.int8),
        (torch.int64, torch.uint64),
        (torch.uint64, torch.int64),
        (torch.int64, torch.float64),
        (torch.int32, torch.float32),
        (torch.float32, torch.int64),
        (torch.int8, torch.bool),
        (torch.complex128, torch.complex64),
        (torch.complex64, torch.float32),
        (torch.bool, torch.float8_e8m0fnu),
        (torch.bool, torch.float4_e2m1fn_x2),
    ],
    ids=dtype_name,
)
def test_what_can_lose_a_value_is_not_said_to_widen(source: torch.dtype, target: torch.dtype) -> None:
    """Range or precision: either is enough. float8_e8m0fnu has no zero, float4 lies two to a byte."""
    assert not widens_exactly(source, target)


def test_the_usual_widenings_are_known() -> None:
    """Those that training code meets: half to single, single to double, smaller integers to larger ones."""
    for source, target in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float16),
        (torch.int32, torch.int64),
        (torch.uint8, torch.int16),
        (torch.uint32, torch.int64),
        (torch.bool, torch.float32),
        (torch.bool, torch.uint8),
        (torch.complex64, torch.complex128),
    ):
        assert widens_exactly(source, target)
