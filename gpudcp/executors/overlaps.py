"""Which destinations of a load share memory, so that what comes last in the files is what stands there at the end.

Tied weights are one tensor under two names; views of one tensor may overlap in part, or lie row by row between one
another without a byte in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch

from gpudcp.arrays import Int64
from gpudcp.boxes import extent_of_box

# So many pairs whose extents overlap are looked at together, which takes 50 ms on one core and some tens of MiB: those
# of 500 boxes that all lie between one another. A sequence with more is cut, which costs a launch and nothing else.
_MOST_PAIRS = 1 << 17


def extents_of(boxes: Iterable[torch.Tensor]) -> Int64:
    """Addresses of the first byte of each tensor and of the one after its last; (tensors, 2)."""
    extents: list[tuple[int, int]] = []
    for box in boxes:
        address = box.data_ptr()
        if box.is_contiguous():
            extents.append((address, address + box.nbytes))
        else:
            extents.append((address, address + extent_of_box(box.stride(), tuple(box.shape)) * box.itemsize))
    return np.array(extents, dtype=np.int64).reshape(-1, 2)


def in_turns(boxes: Sequence[torch.Tensor]) -> list[slice]:
    """Cut a sequence of tensors, none of them empty, into runs that have no two tensors that share memory.

    They are as few as that takes, unless very many tensors lie between one another.
    """
    extents = extents_of(boxes)
    order = np.argsort(extents[:, 0], kind="stable")
    starts, ends = extents[order].T
    if bool((starts[1:] >= np.maximum.accumulate(ends)[:-1]).all()):
        return [slice(0, len(boxes))]
    counts = np.searchsorted(starts, ends, side="left") - np.arange(1, len(starts) + 1)  # of those that begin within
    if int(counts.sum()) > _MOST_PAIRS:
        half = len(boxes) // 2
        later = (slice(run.start + half, run.stop + half) for run in in_turns(boxes[half:]))
        return [*in_turns(boxes[:half]), *later]
    outer = np.repeat(np.arange(len(starts)), counts)
    first, second = _sharing(boxes, order[outer], order[outer + 1 + _positions_in(counts)])
    last_before = np.full(len(boxes), -1)
    np.maximum.at(last_before, np.maximum(first, second), np.minimum(first, second))
    cuts = [0]
    for number, before in enumerate(last_before.tolist()):
        if before >= cuts[-1]:
            cuts.append(number)
    return [slice(start, stop) for start, stop in pairwise([*cuts, len(boxes)])]


def _sharing(boxes: Sequence[torch.Tensor], first: Int64, second: Int64) -> tuple[Int64, Int64]:
    """Those of the pairs that share a byte, or may share one.

    A pair shares a byte if whole numbers solve sum(stride * n) = distance, where each n is within the range of a
    dimension of the one box, or of its negative for the other one; a byte's place in its element is one dimension more.
    From the longest stride on, few values of an n leave what the shorter ones can still make up for.
    """
    numbers, places = np.unique(np.concatenate((first, second)), return_inverse=True)
    one, other = places[: len(first)], places[len(first) :]
    addresses, strides, reaches = _geometry([boxes[number] for number in numbers])
    terms = np.concatenate((strides[one], strides[other]), axis=1)
    lows = np.concatenate((np.zeros_like(reaches[one]), -reaches[other]), axis=1)
    highs = np.concatenate((reaches[one], np.zeros_like(reaches[other])), axis=1)
    by_length = np.argsort(-terms, axis=1, kind="stable")
    terms, lows, highs = (np.take_along_axis(each, by_length, axis=1) for each in (terms, lows, highs))
    for column in range(terms.shape[1] - 2, -1, -1):  # dimensions of one stride are one
        is_same = terms[:, column] == terms[:, column + 1]
        for bounds in (lows, highs):
            bounds[is_same, column] += bounds[is_same, column + 1]
            bounds[is_same, column + 1] = 0
    shares = _have_solutions(addresses[other] - addresses[one], terms, lows, highs)
    return first[shares], second[shares]


def _geometry(boxes: Sequence[torch.Tensor]) -> tuple[Int64, Int64, Int64]:
    """Addresses; strides in bytes and highest indices of each dimension, the bytes of an element being one more."""
    ndim = max(box.dim() for box in boxes)
    addresses: Int64 = np.array([box.data_ptr() for box in boxes], dtype=np.int64)
    strides: Int64 = np.zeros((len(boxes), ndim + 1), dtype=np.int64)
    reaches: Int64 = np.zeros((len(boxes), ndim + 1), dtype=np.int64)
    for row, box in enumerate(boxes):
        strides[row, : box.dim()] = [stride * box.itemsize for stride in box.stride()]
        reaches[row, : box.dim()] = [length - 1 for length in box.shape]
        strides[row, ndim], reaches[row, ndim] = 1, box.itemsize - 1
    strides[reaches == 0] = 0
    return addresses, strides, reaches


def _have_solutions(sums: Int64, strides: Int64, lows: Int64, highs: Int64) -> Int64:
    """The rows for which sum(strides * n) = sums has a solution in whole numbers lows <= n <= highs, or may have one.

    Strides descend and are not negative. Where three or more values of an n are possible, as no memory that a tensor
    is usually given has it, the search ends: there may be one.
    """
    least_after = np.cumsum((strides * lows)[:, ::-1], axis=1)[:, ::-1] - strides * lows
    most_after = np.cumsum((strides * highs)[:, ::-1], axis=1)[:, ::-1] - strides * highs
    rows, rests = np.arange(len(sums)), sums
    undecided: list[Int64] = []
    for column in range(strides.shape[1]):
        step = np.maximum(strides[rows, column], 1)
        low = np.maximum(lows[rows, column], -((most_after[rows, column] - rests) // step))
        high = np.minimum(highs[rows, column], (rests - least_after[rows, column]) // step)
        counts = high - low + 1
        undecided.append(rows[counts > 2])
        counts[counts > 2] = 0
        np.maximum(counts, 0, out=counts)
        origins = np.repeat(np.arange(len(rows)), counts)
        values = low[origins] + _positions_in(counts)
        rests = rests[origins] - strides[rows[origins], column] * values
        rows = rows[origins]
    return np.unique(np.concatenate((rows, *undecided)))


def _positions_in(counts: Int64) -> Int64:
    """0, 1, ... for each of the counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
