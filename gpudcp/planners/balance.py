"""Who writes what of the replicated tensors: as many bytes each, where the tensors allow it.

What cannot be cut is placed first: what is large, the largest first, on the rank that has least; then the small. The
rest of one set of ranks is laid end to end on a line of bytes, and the line is cut where each rank's share ends: most
tensors stay whole, and of those that a cut goes through each side writes its rows. Shares level out what the ranks
write besides, also where sets of ranks overlap. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudcp.arrays import NONE, Int32, Int64

Float64 = NDArray[np.float64]

SPLIT_NBYTES = 1 << 20
"""Replicas below this stay whole: a chunk more costs every later load more than it saves here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Groups of items that hold the same bytes on several ranks."""

    order: Int64
    """Items, group after group; those of one group by rank."""
    starts: Int64
    """Of each group, in ``order``."""
    counts: Int64
    """Items of each group."""
    ranks: Int32
    """Of each item."""
    nbytes: Int64
    """Of each group: of one replica."""
    nrows: Int64 | None
    """Of each group: the rows it can be cut into. None: nothing is cut."""


class Assigned(NamedTuple):
    """The items that are written; of a piece its first row in the chunk and its rows, NONE of whole ones."""

    items: Int64
    first_rows: Int64
    nrows: Int64


def assign(replicas: Replicas, loads: Float64) -> Assigned:
    """Choose a writer for each group, or several with some rows each.

    Args:
        replicas: the groups.
        loads: bytes that each rank writes besides; unchanged.
    """
    loads = loads.astype(np.float64)  # a copy
    can_be_cut = np.zeros(len(replicas.starts), dtype=bool)
    if replicas.nrows is not None:
        can_be_cut = (replicas.nbytes >= SPLIT_NBYTES) & (replicas.nrows > 1)
    parts: list[Assigned] = []
    rest: list[tuple[Int64, Int32]] = []
    for groups, ranks in _by_ranks(replicas):
        parts.append(_placed_whole(replicas, groups[~can_be_cut[groups]], ranks, loads))
        if len(cuttable := groups[can_be_cut[groups]]):
            rest.append((cuttable, ranks))
    totals = [float(replicas.nbytes[groups].sum()) for groups, _ in rest]
    for (groups, _), shares in zip(rest, _level([ranks for _, ranks in rest], totals, loads), strict=True):
        parts += _cut_by_shares(replicas, groups, shares)
    return Assigned(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _placed_whole(replicas: Replicas, groups: Int64, ranks: Int32, loads: Float64) -> Assigned:
    """A writer for each group; its bytes are added to ``loads``."""
    is_small = replicas.nbytes[groups] < SPLIT_NBYTES
    large, small = groups[~is_small], groups[is_small]
    large = large[np.argsort(-replicas.nbytes[large], kind="stable")]
    own = loads[ranks]
    writers = np.empty(len(large), dtype=np.int64)
    for number, nbytes in enumerate(replicas.nbytes[large].tolist()):
        writers[number] = writer = int(np.argmin(own))
        own[writer] += nbytes
    # The small ones on a line, as they may be many: each is its middle's.
    nbytes = replicas.nbytes[small].astype(np.float64)
    ends = np.cumsum(nbytes)
    cuts = np.cumsum(_shares(own, float(nbytes.sum())))[:-1]
    middle = np.searchsorted(cuts, ends - nbytes / 2, side="left")
    loads[ranks] = own + np.bincount(middle, weights=nbytes, minlength=len(ranks))
    at = np.concatenate([large, small])
    items = replicas.order[replicas.starts[at] + np.concatenate([writers, middle])]
    none = np.full(len(items), NONE, dtype=np.int64)
    return Assigned(items, none, none)


def _cut_by_shares(replicas: Replicas, groups: Int64, shares: Float64) -> Iterator[Assigned]:
    """The groups of one set of ranks on a line, cut where each one's share ends; the last one's at the very end."""
    assert replicas.nrows is not None
    nbytes = replicas.nbytes[groups].astype(np.float64)
    ends = np.cumsum(nbytes)
    cuts = np.cumsum(shares)[:-1]
    first = np.searchsorted(cuts, ends - nbytes, side="right")
    last = np.searchsorted(cuts, ends, side="left")
    is_whole = first >= last
    items = replicas.order[replicas.starts[groups[is_whole]] + first[is_whole]]
    none = np.full(len(items), NONE, dtype=np.int64)
    yield Assigned(items, none, none)
    for number in np.nonzero(~is_whole)[0].tolist():
        group = groups[number]
        cuts_within = cuts[first[number] : last[number]] - (ends[number] - nbytes[number])
        members, bounds = _cut_rows(cuts_within, nbytes[number], int(replicas.nrows[group]))
        pieces = replicas.order[replicas.starts[group] + first[number] + members]
        yield Assigned(pieces, bounds[:-1], np.diff(bounds))


def _by_ranks(replicas: Replicas) -> Iterator[tuple[Int64, Int32]]:
    """The groups of each set of ranks, and the set; small sets first, as they have the least choice."""
    # The sum of random numbers of its ranks tells one set from another.
    codes = np.random.default_rng(0).integers(1 << 63, size=int(replicas.ranks.max()) + 1, dtype=np.int64)
    stops = replicas.starts + replicas.counts
    running = np.concatenate([[0], np.cumsum(codes[replicas.ranks[replicas.order]])])  # wraps around, as it may
    sets = running[stops] - running[replicas.starts]
    by_set = np.lexsort((np.arange(len(sets)), sets))
    changes = np.nonzero(np.diff(sets[by_set]))[0] + 1
    members = np.split(by_set, changes)
    members.sort(key=lambda groups: (int(replicas.counts[groups[0]]), int(groups[0])))
    for groups in members:
        start = replicas.starts[groups[0]]
        yield groups, replicas.ranks[replicas.order[start : start + replicas.counts[groups[0]]]]


def _level(sets: list[Int32], totals: list[float], loads: Float64) -> list[Float64]:
    """How many bytes each rank of each set writes, so that all ranks come as level as their sets allow.

    Sets are poured in turn, and where they overlap once more given what the others have become: each turn lowers the
    sum of squares, a convex function, so this ends at its minimum (block coordinate descent).
    """
    shares = [np.zeros(len(ranks)) for ranks in sets]
    overlap = bool(sets) and bool((np.bincount(np.concatenate(sets)) > 1).any())
    for _ in range(_MOST_TURNS if overlap else 1):
        moved = 0.0
        for number, (ranks, total) in enumerate(zip(sets, totals, strict=True)):
            others = loads[ranks] - shares[number]
            poured = _shares(others, total)
            moved = max(moved, float(np.abs(poured - shares[number]).max()))
            shares[number] = poured
            loads[ranks] = others + poured
        if moved <= _STILL * float(loads.max()):
            break
    return shares


_MOST_TURNS = 32
_STILL = 1e-3
"""Of the largest rank's bytes: a turn that moves no more is the last one."""


def _shares(loads: Float64, total: float) -> Float64:
    """How ``total`` is poured over the loads so that the lowest ones come level."""
    ordered = np.sort(loads)
    filled = np.arange(1, len(loads) + 1) * ordered - np.cumsum(ordered)  # to bring the first n to the n-th's level
    count = int(np.searchsorted(filled, total, side="right"))
    level = (total + ordered[:count].sum()) / count
    shares: Float64 = np.maximum(level - loads, 0.0)
    return shares


def _cut_rows(cuts: Float64, nbytes: float, nrows: int) -> tuple[Int64, Int64]:
    """Which of the sides get rows of a chunk that is cut at these bytes, and where each one's rows begin."""
    bounds = np.concatenate([[0], np.clip(np.rint(cuts / nbytes * nrows), 0, nrows), [nrows]]).astype(np.int64)
    members = np.nonzero(np.diff(bounds))[0]
    return members, np.append(bounds[members], nrows)
