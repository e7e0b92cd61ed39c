"""State dicts that both sides of an exchange build for themselves. Imports nothing of gpudcp: stock's side has none."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch

SUB_BYTE_NAMES = tuple(f"{sign}{bits}" for sign in ("int", "uint") for bits in range(1, 8))
QUANTIZED_NAMES = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
BITS_NAMES = ("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")


def every_dtype() -> list[torch.dtype]:
    """All dtypes of this torch, sorted by name."""
    return sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def plain_dtypes() -> list[torch.dtype]:
    """Those that a tensor of plain memory can have and torch can save: all that are not listed by name above."""
    special = {f"torch.{name}" for name in (*SUB_BYTE_NAMES, *QUANTIZED_NAMES, *BITS_NAMES)}
    return [dtype for dtype in every_dtype() if str(dtype) not in special]


def patterned(dtype: torch.dtype, *sizes: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, NaNs with payloads among them; a bool has only its two legal bytes."""
    random = torch.Generator().manual_seed(seed)
    nbytes = math.prod(sizes) * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256
    return torch.randint(0, limit, (nbytes,), dtype=torch.uint8, generator=random).view(dtype).view(sizes)


def numbers(*sizes: int, start: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Consecutive numbers from ``start`` on."""
    return torch.arange(start, start + math.prod(sizes)).to(dtype).view(sizes)


def of_dtypes() -> dict[str, Any]:
    """A matrix, a scalar and an empty tensor of every dtype."""
    state: dict[str, Any] = {}
    for seed, dtype in enumerate(plain_dtypes()):
        state[f"{dtype}"] = patterned(dtype, 5, 6, seed=seed)
        state[f"{dtype}_0d"] = patterned(dtype, seed=seed + 100)
        state[f"{dtype}_empty"] = patterned(dtype, 3, 0, 2)
    return state


def of_views() -> dict[str, Any]:
    """Tensors that are not the whole of a contiguous storage, read as they are."""
    complex_values = torch.complex(numbers(4, 5), numbers(4, 5, start=-9))
    storage = numbers(100, 40)
    return {
        "transposed": numbers(7, 5).t(),
        "permuted": numbers(3, 4, 5).permute(2, 0, 1),
        "channels_last": numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "every_other": numbers(9, 8)[::2, 1::3],
        "expanded": numbers(1, 4).expand(6, 4),
        "expanded_scalar": torch.tensor(7.5).expand(3, 3),
        "rows_of_larger": storage[30:60],
        "columns_of_larger": storage[:, 3:5],
        "element_of_larger": storage[50, 7],
        "at_odd_byte": torch.arange(64, dtype=torch.uint8)[3:50],
        "conjugate": complex_values.conj(),
        "conjugate_transposed": complex_values.mH,
        "negative": complex_values.conj().imag,
        "parameter": torch.nn.Parameter(numbers(3, 3)),
        "with_graph": numbers(3, 2).requires_grad_() * 2,
        "empty": torch.empty(0),
        "empty_rows": torch.empty(0, 7, dtype=torch.int16),
        "empty_strided": torch.empty(4, 0, 3).permute(2, 1, 0),
        "large": patterned(torch.float32, 300, 1000, seed=1),
        "larger_than_a_slab": patterned(torch.bfloat16, 1100, 2003, seed=2),
        "larger_strided": patterned(torch.int32, 1003, 1100, seed=3).t(),
    }


def of_nesting() -> dict[str, Any]:
    """Dicts and lists in each other, with keys that look like paths."""
    return {
        "model": {"layer.weight": numbers(2, 3), "layer": {"weight_of": numbers(4)}},
        "list": [numbers(2), [numbers(1), {"deep": numbers(3)}], "text", 5],
        "empty": {"dict": {}, "list": []},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": numbers(2, 2)}, 1: {"step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 0.25, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "": numbers(1),
        "käse/λ.weight": numbers(2),
    }


def of_objects() -> dict[str, Any]:
    """Values that are no tensors, some with tensors in them."""
    return {
        "none": None,
        "integer": 10**30,
        "float": 0.1,
        "bool": True,
        "text": "Übung\n",
        "bytes": bytes(range(256)),
        "tuple": (1, numbers(2, 2), ("x", None)),
        "set": {1, 2, 3},
        "ordered": collections.OrderedDict([("b", 1), ("a", [2])]),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "large": list(range(30_000)),
    }


class Counter:
    """A Stateful object."""

    def __init__(self, weight: torch.Tensor, steps: int) -> None:
        self.weight = weight
        self.steps = steps
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "meta": {"steps": self.steps}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.steps = state["weight"], state["meta"]["steps"]
        self.loads += 1


def of_stateful() -> dict[str, Any]:
    """Objects with state_dict and load_state_dict, a module among them, beside plain values."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with torch.no_grad():
        for seed, tensor in enumerate(module.state_dict().values()):
            tensor.copy_(patterned(torch.uint8, *tensor.shape, seed=seed))
    return {"counter": Counter(numbers(4, 2), 17), "module": module, "epoch": 3, "plain": numbers(2)}


def of_shards() -> dict[str, Any]:
    """Tensors to be loaded in parts: see ``SHARDINGS``."""
    return {
        "matrix": patterned(torch.float32, 37, 29, seed=5),
        "narrow": patterned(torch.bfloat16, 1000, 3, seed=6),
        "wide": patterned(torch.int64, 3, 70_000, seed=7),
        "cube": patterned(torch.float16, 6, 10, 14, seed=8),
        "few": patterned(torch.uint8, 2, 2, seed=9),
    }


SHARDINGS: tuple[tuple[tuple[int, ...], tuple[int | None, ...]], ...] = (
    ((4,), (0,)),
    ((4,), (1,)),
    ((3,), (None,)),
    ((2, 2), (0, 1)),
    ((2, 2), (0, 0)),
    ((2, 3), (None, 1)),
)
"""Mesh shapes, and the tensor dimension that each mesh dimension shards; None replicates."""

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "dtypes": of_dtypes,
    "views": of_views,
    "nesting": of_nesting,
    "objects": of_objects,
    "stateful": of_stateful,
}


def blank(value: Any) -> Any:
    """A destination for ``value``: tensors of its shape and dtype, whole and with other bytes; other plain values."""
    if isinstance(value, torch.Tensor):
        fresh = torch.full((value.numel() * value.dtype.itemsize,), 1, dtype=torch.uint8)
        return fresh.view(value.dtype).view(value.shape)
    if isinstance(value, Counter):
        return Counter(blank(value.weight), -1)
    if isinstance(value, torch.nn.Module):
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    if isinstance(value, dict):
        return type(value)((key, blank(part)) for key, part in value.items())
    if isinstance(value, list):
        return [blank(part) for part in value]
    return "to be replaced"


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor, row-major."""
    resolved = tensor.detach().resolve_conj().resolve_neg()
    # Through one flat dimension, as a 0-d tensor has no bytes to look at. Not by contiguous(): not all dtypes have it.
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    plain = resolved.view(carrier[resolved.dtype.itemsize]).contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().tobytes())


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Where two values differ, bit for bit, type for type; an empty list says that they are the same."""
    if isinstance(expected, torch.nn.Module):
        return differences(dict(expected.state_dict()), dict(found.state_dict()), path)
    if isinstance(expected, Counter):
        loads = [] if found.loads == 1 else [f"{path}: load_state_dict was called {found.loads} times"]
        return loads + differences(expected.state_dict(), found.state_dict(), path)
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            return [f"{path}: {found!r} is no tensor"]
        if (expected.dtype, expected.shape) != (found.dtype, found.shape):
            return [f"{path}: {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"]
        return [] if bits(expected) == bits(found) else [f"{path}: other bits"]
    if type(expected) is not type(found):
        return [f"{path}: a {type(found).__name__}, not a {type(expected).__name__}"]
    if isinstance(expected, dict):
        if list(expected) != list(found):
            return [f"{path}: keys {list(found)}, not {list(expected)}"]
        return [each for key in expected for each in differences(expected[key], found[key], f"{path}.{key}")]
    if isinstance(expected, list | tuple):
        if len(expected) != len(found):
            return [f"{path}: {len(found)} elements, not {len(expected)}"]
        pairs = zip(expected, found, strict=True)
        return [each for i, (old, new) in enumerate(pairs) for each in differences(old, new, f"{path}.{i}")]
    return [] if expected == found else [f"{path}: {found!r}, not {expected!r}"]
