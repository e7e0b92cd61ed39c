"""Who writes what of the replicated tensors: as many bytes each, where the tensors allow it.

The replicas of one set of ranks are laid end to end on a line of bytes, and the line is cut where each rank's share
ends: most tensors stay whole, and of those that a cut goes through each side writes its rows. Shares level out what
the ranks write besides. Deterministic.
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
    parts: list[Assigned] = []
    for groups, ranks in _by_ranks(replicas):
        nbytes = replicas.nbytes[groups].astype(np.float64)
        ends = np.cumsum(nbytes)
        # Each rank's share ends here; the last one's at the very end.
        cuts = np.cumsum(_shares(loads[ranks], float(ends[-1])))[:-1]
        first = np.searchsorted(cuts, ends - nbytes, side="right")
        last = np.searchsorted(cuts, ends, side="left")
        middle = np.searchsorted(cuts, ends - nbytes / 2, side="left")
        is_cut = np.zeros(len(groups), dtype=bool)
        if replicas.nrows is not None:
            is_cut = (first < last) & (nbytes >= SPLIT_NBYTES) & (replicas.nrows[groups] > 1)
        whole = np.nonzero(~is_cut)[0]
        at, writer = groups[whole], middle[whole]
        parts.append(_whole(replicas.order[replicas.starts[at] + writer]))
        written = np.bincount(writer, weights=nbytes[whole], minlength=len(ranks)).astype(np.float64)
        for number in np.nonzero(is_cut)[0].tolist():
            group = groups[number]
            assert replicas.nrows is not None
            nrows = int(replicas.nrows[group])
            members, bounds = _cut_rows(
                cuts[first[number] : last[number]] - (ends[number] - nbytes[number]), nbytes[number], nrows
            )
            members = members + first[number]
            lengths = np.diff(bounds)
            parts.append(Assigned(replicas.order[replicas.starts[group] + members], bounds[:-1], lengths))
            written[members] += lengths * (nbytes[number] / nrows)
        loads[ranks] += written
    return Assigned(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _whole(items: Int64) -> Assigned:
    none = np.full(len(items), NONE, dtype=np.int64)
    return Assigned(items, none, none)


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
