"""Which saved boxes overlap which local ones, and where: the geometry of resharding, as columns. No tensors, no keys.

The pairs are those of torch's ``create_read_items_for_chunk_list``, which sweeps along the longest dimension, and so
looks at every pair when the chunks lie side by side in another one. Here the dimension is the one that separates them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gpudcp.arrays import Int64
from gpudcp.errors import PlanError

# Measured. NumPy takes 16 us for the fewest boxes, torch 6 us for one against one, and a Python loop is quicker than
# both: to look at up to so many pairs, and to write out up to so many.
_PAIRS_IN_PYTHON = 96
_CUTS_IN_PYTHON = 8
# Up to so many pairs, looking at all of them is quicker than a sort.
_PAIRS_AT_ONCE = 1 << 14
# Candidates held in memory at the same time: more gain nothing, and there may be very many before they are filtered.
_CANDIDATES_AT_ONCE = 1 << 20
# All pairs of a tensor are candidates in a batch if there are at most so many for each of its chunks.
_PAIRS_A_CHUNK = 4


class Overlaps(NamedTuple):
    """One row for each pair of a local and a saved box that overlap, by local number, then by saved number."""

    local: Int64
    """[k]: number of the local box."""
    saved: Int64
    """[k]: number of the saved box."""
    storage_offsets: Int64
    """[k, D]: where the overlap begins, from the start of the saved box."""
    dest_offsets: Int64
    """[k, D]: where the overlap begins, from the start of the local box."""
    lengths: Int64
    """[k, D]: elements of the overlap along each dimension."""


def overlaps(saved_offsets: Int64, saved_lengths: Int64, local_offsets: Int64, local_lengths: Int64) -> Overlaps:
    """Every pair of a saved and a local box of one tensor that overlap; torch's items, as a set.

    Boxes may repeat, overlap each other and be empty. As in torch, two boxes overlap if in every dimension each
    starts before the other ends. So all 0-d boxes do; an empty box at the start or end of another one does not, nor
    do two at one place; and an empty box *strictly inside* another one does, with a length of 0.

    Args:
        saved_offsets: [n, D], elements from the start of the tensor; any n and D, 0 included.
        saved_lengths: [n, D], elements; none negative.
        local_offsets: [m, D].
        local_lengths: [m, D].

    Raises:
        PlanError: saved and local boxes differ in their number of dimensions.
    """
    _check_same_dims(saved_offsets, local_offsets)
    if len(saved_offsets) * len(local_offsets) <= _PAIRS_IN_PYTHON:
        return _overlaps_of_few(saved_offsets, saved_lengths, local_offsets, local_lengths)
    saved, local = _Boxes.of(saved_offsets, saved_lengths), _Boxes.of(local_offsets, local_lengths)
    return _cut(saved, local, _pairs(saved, local))


def overlaps_batch(
    saved_starts: Int64,
    saved_offsets: Int64,
    saved_lengths: Int64,
    local_starts: Int64,
    local_offsets: Int64,
    local_lengths: Int64,
) -> Overlaps:
    """`overlaps` of many tensors at once; a box only ever meets boxes of its own tensor.

    Tensors of fewer dimensions are filled up with offset 0 and length 1.

    Args:
        saved_starts: [t + 1], ascending: the saved boxes of tensor i are the rows from ``saved_starts[i]`` on,
            before ``saved_starts[i + 1]``.
        saved_offsets: [n, D], as for `overlaps`.
        saved_lengths: [n, D].
        local_starts: [t + 1], the same for local boxes.
        local_offsets: [m, D].
        local_lengths: [m, D].

    Returns:
        ``local`` and ``saved`` are row numbers among the boxes of all tensors.

    Raises:
        PlanError: saved and local boxes differ in their number of dimensions, or the starts in their number.
    """
    _check_same_dims(saved_offsets, local_offsets)
    if len(saved_starts) != len(local_starts):
        raise PlanError(f"saved boxes of {len(saved_starts) - 1} tensors, local boxes of {len(local_starts) - 1}")
    if not len(saved_offsets) or not len(local_offsets):
        return _no_overlaps(saved_offsets.shape[1])
    saved, local = _Boxes.of(saved_offsets, saved_lengths), _Boxes.of(local_offsets, local_lengths)
    saved_counts, local_counts = np.diff(saved_starts), np.diff(local_starts)
    is_small = saved_counts * local_counts <= _PAIRS_A_CHUNK * (saved_counts + local_counts)
    candidates = _expanded(
        np.repeat(saved_starts[:-1], local_counts), np.repeat(np.where(is_small, saved_counts, 0), local_counts)
    )
    dims = _telling_dims(saved, local)
    found = [_overlapping(saved, local, pairs, dims) for pairs in candidates]
    large = np.flatnonzero(~is_small).tolist()
    for tensor in large:
        first_saved, first_local = int(saved_starts[tensor]), int(local_starts[tensor])
        pairs = _pairs(
            saved.rows(first_saved, int(saved_starts[tensor + 1])),
            local.rows(first_local, int(local_starts[tensor + 1])),
        )
        found.append(_Pairs(pairs.local + first_local, pairs.saved + first_saved))
    return _cut(saved, local, _sorted(found, saved.box_count) if large else _joined(found))


class _Boxes(NamedTuple):
    """Boxes by dimension: a column of starts and one of ends for each."""

    starts: Int64
    """[D, n]"""
    ends: Int64
    """[D, n]"""

    @classmethod
    def of(cls, offsets: Int64, lengths: Int64) -> _Boxes:
        starts = np.ascontiguousarray(offsets.T)
        return cls(starts, starts + lengths.T)

    @property
    def box_count(self) -> int:
        return int(self.starts.shape[1])

    def rows(self, start: int, stop: int) -> _Boxes:
        return _Boxes(self.starts[:, start:stop], self.ends[:, start:stop])


class _Columns(NamedTuple):
    """Boxes by dimension, as lists."""

    starts: list[list[int]]
    sizes: list[list[int]]


class _Pairs(NamedTuple):
    """Row numbers, side by side."""

    local: Int64
    saved: Int64


def _check_same_dims(saved_offsets: Int64, local_offsets: Int64) -> None:
    if saved_offsets.shape[1] != local_offsets.shape[1]:
        raise PlanError(f"saved boxes have {saved_offsets.shape[1]} dimensions, local ones {local_offsets.shape[1]}")


def _cut(saved: _Boxes, local: _Boxes, pairs: _Pairs) -> Overlaps:
    """What the two boxes of each pair have in common."""
    saved_starts, local_starts = saved.starts[:, pairs.saved], local.starts[:, pairs.local]
    starts = np.maximum(saved_starts, local_starts)
    lengths = np.minimum(saved.ends[:, pairs.saved], local.ends[:, pairs.local])
    lengths -= starts
    return Overlaps(pairs.local, pairs.saved, (starts - saved_starts).T, (starts - local_starts).T, lengths.T)


def _overlaps_of_few(
    saved_offsets: Int64, saved_lengths: Int64, local_offsets: Int64, local_lengths: Int64
) -> Overlaps:
    saved = _Columns(saved_offsets.T.tolist(), saved_lengths.T.tolist())
    local = _Columns(local_offsets.T.tolist(), local_lengths.T.tolist())
    saved_count, local_count = len(saved_offsets), len(local_offsets)
    if saved_count >= local_count:  # the more boxes, the more a comprehension gains
        pairs = [(to, at) for to in range(local_count) for at in _partners(to, local, saved_count, saved)]
    else:
        pairs = sorted((to, at) for at in range(saved_count) for to in _partners(at, saved, local_count, local))
    if len(pairs) > _CUTS_IN_PYTHON:
        local_rows, saved_rows = np.array(pairs, dtype=np.int64).T
        boxes = _Boxes.of(saved_offsets, saved_lengths), _Boxes.of(local_offsets, local_lengths)
        return _cut(*boxes, _Pairs(local_rows, saved_rows))
    dims = saved_offsets.shape[1]
    if not pairs:
        return _no_overlaps(dims)
    table = np.array([_cut_row(pair, local, saved) for pair in pairs], dtype=np.int64)
    return Overlaps(
        table[:, 0], table[:, 1], table[:, 2 : 2 + dims], table[:, 2 + dims : 2 + 2 * dims], table[:, 2 + 2 * dims :]
    )


def _partners(row: int, boxes: _Columns, other_count: int, others: _Columns) -> Iterable[int]:
    """The others that overlap this box, in order."""
    partners: Iterable[int] = range(other_count)
    for starts, sizes, other_starts, other_sizes in zip(*boxes, *others, strict=True):
        start, end = starts[row], starts[row] + sizes[row]
        partners = [p for p in partners if other_starts[p] < end and start < other_starts[p] + other_sizes[p]]
        if not partners:
            break
    return partners


def _cut_row(pair: tuple[int, int], local: _Columns, saved: _Columns) -> list[int]:
    """The values of a row of `Overlaps`, one after the other."""
    to, at = pair
    storage_offsets, dest_offsets, lengths = [], [], []
    for local_starts, local_sizes, saved_starts, saved_sizes in zip(*local, *saved, strict=True):
        local_start, saved_start = local_starts[to], saved_starts[at]
        local_end, saved_end = local_start + local_sizes[to], saved_start + saved_sizes[at]
        start = local_start if local_start > saved_start else saved_start
        storage_offsets.append(start - saved_start)
        dest_offsets.append(start - local_start)
        lengths.append((local_end if local_end < saved_end else saved_end) - start)
    return [to, at, *storage_offsets, *dest_offsets, *lengths]


@functools.cache
def _no_overlaps(dims: int) -> Overlaps:
    rows, boxes = np.empty(0, dtype=np.int64), np.empty((0, dims), dtype=np.int64)
    rows.flags.writeable = boxes.flags.writeable = False  # the next caller gets them too
    return Overlaps(rows, rows, boxes, boxes, boxes)


def _pairs(saved: _Boxes, local: _Boxes) -> _Pairs:
    """The rows of boxes of one tensor that overlap, by local, then by saved row."""
    if saved.box_count * local.box_count <= _PAIRS_AT_ONCE or 1 in (saved.box_count, local.box_count):
        return _pairs_at_once(saved, local)
    dims = _telling_dims(saved, local)
    if not dims:
        return _pairs_at_once(saved, local)
    sweep = _best_sweep(saved, local, dims)
    return _sorted([_overlapping(saved, local, candidates, dims) for candidates in sweep.candidates()], saved.box_count)


def _pairs_at_once(saved: _Boxes, local: _Boxes) -> _Pairs:
    do_overlap = np.ones((local.box_count, saved.box_count), dtype=np.bool_)
    for saved_starts, saved_ends, local_starts, local_ends in zip(
        saved.starts, saved.ends, local.starts[:, :, None], local.ends[:, :, None], strict=True
    ):
        do_overlap &= saved_starts < local_ends
        do_overlap &= local_starts < saved_ends
    return _Pairs(*np.nonzero(do_overlap))


def _telling_dims(saved: _Boxes, local: _Boxes) -> list[int]:
    """The dimensions in which not every local box overlaps every saved one; there must be boxes of both."""
    is_telling = (saved.starts.max(axis=1) >= local.ends.min(axis=1)) | (
        local.starts.max(axis=1) >= saved.ends.min(axis=1)
    )
    return np.flatnonzero(is_telling).tolist()


def _overlapping(saved: _Boxes, local: _Boxes, candidates: _Pairs, dims: Iterable[int]) -> _Pairs:
    """Those of the candidates that overlap in these dimensions."""
    local_rows, saved_rows = candidates
    for dim in dims:
        do_overlap = saved.starts[dim][saved_rows] < local.ends[dim][local_rows]
        do_overlap &= local.starts[dim][local_rows] < saved.ends[dim][saved_rows]
        if not do_overlap.all():
            local_rows, saved_rows = local_rows[do_overlap], saved_rows[do_overlap]
    return _Pairs(local_rows, saved_rows)


class _Sweep(NamedTuple):
    """The pairs that overlap along one dimension, found but not yet written out; a few empty boxes may be too many.

    If two intervals overlap, either the saved one starts inside the local one (or where it starts), or the local
    one starts inside the saved one. Each is a range of boxes sorted by their start, whatever the boxes' lengths.
    """

    saved_order: Int64
    local_order: Int64
    saved_firsts: Int64
    saved_counts: Int64
    local_firsts: Int64
    local_counts: Int64

    @classmethod
    def along(cls, dim: int, saved: _Boxes, local: _Boxes) -> _Sweep:
        saved_order = np.argsort(saved.starts[dim], kind="stable")
        local_order = np.argsort(local.starts[dim], kind="stable")
        saved_starts, saved_ends = saved.starts[dim][saved_order], saved.ends[dim][saved_order]
        local_starts, local_ends = local.starts[dim][local_order], local.ends[dim][local_order]
        saved_firsts = saved_starts.searchsorted(local_starts, "left")
        local_firsts = local_starts.searchsorted(saved_starts, "right")
        return cls(
            saved_order=saved_order,
            local_order=local_order,
            saved_firsts=saved_firsts,
            saved_counts=saved_starts.searchsorted(local_ends, "left") - saved_firsts,
            local_firsts=local_firsts,
            # An empty saved box ends before the first local one that starts after it.
            local_counts=np.maximum(local_starts.searchsorted(saved_ends, "left") - local_firsts, 0),
        )

    @property
    def candidate_count(self) -> int:
        return int(self.saved_counts.sum() + self.local_counts.sum())

    def candidates(self) -> Iterator[_Pairs]:
        for pairs in _expanded(self.saved_firsts, self.saved_counts):
            yield _Pairs(self.local_order[pairs.local], self.saved_order[pairs.saved])
        for saved, local in _expanded(self.local_firsts, self.local_counts):
            yield _Pairs(self.local_order[local], self.saved_order[saved])


def _best_sweep(saved: _Boxes, local: _Boxes, dims: Iterable[int]) -> _Sweep:
    """Along the dimension that leaves the fewest candidates."""
    best: _Sweep | None = None
    for dim in dims:
        sweep = _Sweep.along(dim, saved, local)
        best = sweep if best is None or sweep.candidate_count < best.candidate_count else best
        if best.candidate_count <= saved.box_count + local.box_count:
            break  # another one can hardly be worth its sort
    assert best
    return best


def _expanded(firsts: Int64, counts: Int64) -> Iterator[_Pairs]:
    """Each row beside its partners ``firsts[row], firsts[row] + 1, ...``, ``counts[row]`` of them; rows in order.

    In parts of a bounded size, unless one row has more partners than that.
    """
    stops = np.cumsum(counts)
    begin, done = 0, 0
    while begin < len(counts):
        end = max(int(stops.searchsorted(done + _CANDIDATES_AT_ONCE, "right")), begin + 1)
        part = counts[begin:end]
        total = int(stops[end - 1]) - done
        skipped = firsts[begin:end] - (stops[begin:end] - part - done)
        yield _Pairs(np.repeat(np.arange(begin, end), part), np.arange(total) + np.repeat(skipped, part))
        begin, done = end, done + total


def _joined(parts: Sequence[_Pairs]) -> _Pairs:
    if len(parts) == 1:
        return parts[0]
    nothing = np.empty(0, dtype=np.int64)
    return _Pairs(
        np.concatenate([nothing, *(part.local for part in parts)]),
        np.concatenate([nothing, *(part.saved for part in parts)]),
    )


def _sorted(parts: Sequence[_Pairs], saved_count: int) -> _Pairs:
    """By local, then by saved row, which are below ``saved_count``."""
    pairs = _joined(parts)
    keys = pairs.local * saved_count + pairs.saved
    keys.sort()
    local = keys // max(saved_count, 1)
    return _Pairs(local, keys - local * saved_count)
