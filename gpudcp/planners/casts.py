"""The cast rule: which dtype a tensor has in the checkpoint. It decides; it casts nothing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TypeAlias

import torch
from torch.distributed.tensor import DTensor

from gpudcp._dcp import ShardedTensor
from gpudcp.errors import PlanError
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable

DtypeRequest: TypeAlias = (
    "torch.dtype | Mapping[str, torch.dtype] | Callable[[str, torch.dtype], torch.dtype | None] | CastRule | None"
)
"""What ``dtype=`` takes; see `CastRule.of`."""

_Choice: TypeAlias = Callable[[str, torch.dtype], torch.dtype | None]
_Pattern: TypeAlias = tuple[re.Pattern[str], torch.dtype]


class CastRule:
    """Maps (fqn, dtype of the tensor) to the dtype in the checkpoint, and remembers each answer."""

    def __init__(self, choose: _Choice, *, floating_point_only: bool) -> None:
        self._choose = choose
        self._floating_point_only = floating_point_only
        self._answers: dict[tuple[str, torch.dtype], torch.dtype] = {}

    @classmethod
    def of(cls, request: DtypeRequest, *, floating_point_only: bool | None = None) -> CastRule:
        """The rule that a ``dtype=`` argument asks for.

        Args:
            request: None: every tensor keeps its dtype. A dtype: for all. A mapping of glob patterns of fqns (``*``
                matches dots too; case counts) to dtypes: the first pattern that matches; without one, the tensor
                keeps its dtype. A callable: what it returns for an fqn and the tensor's dtype, None to keep it; it
                is called once for each pair.
            floating_point_only: whether integers, bools and complex numbers keep their dtype whatever is asked for. By
                default they do, unless a callable decides.

        Raises:
            PlanError: the request is none of these, or asks for a dtype that torch cannot cast to: quantized, packed
                (float4), raw bits, integers below 8 bits.
        """
        if isinstance(request, CastRule):
            return request
        is_callable = not isinstance(request, torch.dtype | Mapping | None) and callable(request)
        choose = _choice(request)
        return cls(choose, floating_point_only=not is_callable if floating_point_only is None else floating_point_only)

    def dtype_for(self, fqn: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in the checkpoint of a tensor of memory that has this one.

        Quantized and packed dtypes stay, and complex numbers never become real.

        Raises:
            PlanError: a callable asked for a dtype that torch cannot cast to, or returned something else.
        """
        key = fqn, dtype
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = self._decide(fqn, dtype)
        return answer

    def dtype_of(self, fqn: str, tensor: torch.Tensor) -> torch.dtype:
        """`dtype_for` this tensor: its own where it is of a wrapper subclass, which only its class knows how to cast.

        DTensors and ShardedTensors are their local tensors here.
        """
        return self.dtype_for(fqn, tensor.dtype) if _has_own_memory(tensor) else tensor.dtype

    def _decide(self, fqn: str, dtype: torch.dtype) -> torch.dtype:
        if not _is_castable(dtype) or (self._floating_point_only and not dtype.is_floating_point):
            return dtype
        target = self._choose(fqn, dtype)
        if target is None or target == dtype:
            return dtype
        _check_target(target, f"{fqn}: ")
        return dtype if dtype.is_complex and not target.is_complex else target


def _choice(request: object) -> _Choice:
    # Named functions, as process-based async saves pickle planners.
    if request is None or isinstance(request, torch.dtype):
        if request is not None:
            _check_target(request)
        return partial(_same, request)
    if isinstance(request, Mapping):
        return partial(_first_match, _patterns(request))
    if callable(request):
        return request
    raise PlanError(f"dtype={request!r}: a torch.dtype, a mapping of patterns to dtypes, or a callable is needed")


def _same(target: torch.dtype | None, _fqn: str, _dtype: torch.dtype) -> torch.dtype | None:
    return target


def _first_match(patterns: list[_Pattern], fqn: str, _dtype: torch.dtype) -> torch.dtype | None:
    return next((target for matcher, target in patterns if matcher.match(fqn)), None)


def _patterns(request: Mapping[str, torch.dtype]) -> list[_Pattern]:
    patterns = []
    for pattern, target in request.items():
        if not isinstance(pattern, str):
            raise PlanError(f"dtype={{{pattern!r}: ...}}: a pattern is a str, not a {type(pattern).__name__}")
        _check_target(target, f"pattern {pattern!r}: ")
        patterns.append((re.compile(fnmatch.translate(pattern)), target))
    return patterns


def _check_target(target: object, of_what: str = "") -> None:
    if not isinstance(target, torch.dtype):
        raise PlanError(f"{of_what}{target!r} is no torch.dtype")
    if not _is_castable(target):
        raise PlanError(f"{of_what}{target} is no dtype that tensors can be cast to")


@cache
def _is_castable(dtype: torch.dtype) -> bool:
    """Whether a value in memory of this dtype is a number of its own, which torch casts from and to."""
    packed = str(dtype) == "torch.float4_e2m1fn_x2"  # two numbers in a byte; not in every torch
    return is_savable(dtype) and dtype not in QUANTIZED_DTYPES and not packed


def _has_own_memory(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return _has_own_memory(tensor.to_local())
    if isinstance(tensor, ShardedTensor):
        return all(_has_own_memory(shard.tensor) for shard in tensor.local_shards())
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
