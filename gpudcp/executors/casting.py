"""The cast rule on tensors, by torch: what `gpudcp_kernels.casts` states, for those who move elements without kernels.

Between floating-point dtypes of the rule float8_e4m3fn saturates and a NaN becomes the target's one NaN, so that every
executor writes the same bytes: what torch's own casts do there depends on its version and on the code path. All other
values, and all other pairs, are torch's ``copy_``.

All other pairs start from host memory, as in a load of stock DCP, and torch's ``copy_`` then casts before it moves.
What lies beyond an integer's range, of which a GPU makes something else, is then what torch makes of it on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpudcp_kernels.casts import CANONICAL_NANS, in_range_of

# So that what a copy takes beside the tensors, such as a cast's mask and elements in range, is little also on a full
# GPU.
_PIECE_NUMEL = 4 << 20


def in_pieces(into: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors, which have one shape, in halves of halves: as views of a bounded number of elements, in order.

    Those of a contiguous tensor are contiguous.
    """
    if into.numel() <= _PIECE_NUMEL:
        yield into, source
        return
    first = next(dim for dim, length in enumerate(into.shape) if length > 1)
    for half, half_source in zip(into.chunk(2, first), source.chunk(2, first), strict=True):
        yield from in_pieces(half, half_source)


def copy_cast(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy elements of one shape, cast by the rule; on whatever devices they are."""
    # Of a GPU's such views that have gaps too torch, by its source, conjugates or negates the elements twice.
    is_resolved = into.is_cpu and not source.is_cpu and not source.is_contiguous()
    if into.dtype == source.dtype and not (is_resolved and (source.is_conj() or source.is_neg())):
        into.copy_(source)
        return
    for piece, piece_of_source in in_pieces(into, source):
        if is_resolved:
            piece_of_source = piece_of_source.resolve_conj().resolve_neg()
        if into.dtype == source.dtype:
            piece.copy_(piece_of_source)
        else:
            _cast_piece(piece, piece_of_source)


def _cast_piece(into: torch.Tensor, source: torch.Tensor) -> None:
    is_by_rule = into.dtype in CANONICAL_NANS and source.dtype in CANONICAL_NANS
    if not source.is_cpu and (into.is_cpu or not is_by_rule):
        source = source.cpu()  # also so that no cast takes memory of the device, which may have none left
    into.copy_(in_range_of(into.dtype, source) if is_by_rule else source)
    if not is_by_rule or into.is_neg():  # a negated NaN has no bits of its own
        return
    is_nan = source.isnan()
    # To ask a GPU would be to wait for it.
    if not is_nan.is_cpu or bool(is_nan.any()):
        into.view(_CARRIERS[into.dtype.itemsize]).masked_fill_(is_nan.to(into.device), CANONICAL_NANS[into.dtype])


_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
