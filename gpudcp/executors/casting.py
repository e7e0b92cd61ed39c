"""The cast rule on tensors, by torch: what `gpudcp_kernels.casts` states, for those who move elements without kernels.

Between floating-point dtypes of the rule a NaN becomes the target's one NaN, so that every executor writes the same
bytes; torch's own NaNs depend on the code path it takes. All other values, and all other pairs, are torch's ``copy_``.
"""

from __future__ import annotations

import torch
from gpudcp_kernels.casts import CANONICAL_NANS


def copy_cast(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy elements of one shape, cast by the rule; on whatever devices they are."""
    into.copy_(source)
    if into.dtype == source.dtype:
        return
    nan = CANONICAL_NANS.get(into.dtype)
    if nan is None or source.dtype not in CANONICAL_NANS or into.is_neg():  # a negated NaN has no bits of its own
        return
    is_nan = source.isnan()
    if bool(is_nan.any()):
        into.view(_CARRIERS[into.dtype.itemsize])[is_nan.to(into.device)] = nan


_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
