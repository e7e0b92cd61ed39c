"""Whether the chunks of a checkpoint make whole tensors: inside them, without overlap, without a gap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpudcp.arrays import NONE, Int64
from gpudcp.columns import CheckpointColumns
from gpudcp.errors import PlanError

_MOST_NAMED = 5


def check_chunks(checkpoint: CheckpointColumns, *, must_cover: bool) -> None:
    """Check every tensor of a checkpoint.

    Args:
        checkpoint: its columns.
        must_cover: gaps are errors. torch asks so of more than one rank: one rank alone may save its own shard.

    Raises:
        PlanError: it names the keys and the chunks that are wrong.
    """
    problems = []
    for problem in _problems(checkpoint, must_cover=must_cover):
        problems.append(problem)
        if len(problems) > _MOST_NAMED:
            problems[-1] = "and more"
            break
    if problems:
        raise PlanError(f"the ranks' chunks make no whole tensors: {'; '.join(problems)}")


def _problems(checkpoint: CheckpointColumns, *, must_cover: bool) -> Iterator[str]:
    entries = np.nonzero(checkpoint.property_ids != NONE)[0]
    counts = np.diff(checkpoint.first_rows)[entries]
    single = entries[counts == 1]
    yield from _wrong_single(checkpoint, single, must_cover=must_cover)
    several = entries[counts > 1]
    for entry in _representatives(checkpoint, several):
        yield from _wrong_chunks(checkpoint, int(entry), must_cover=must_cover)


def _wrong_single(checkpoint: CheckpointColumns, entries: Int64, *, must_cover: bool) -> Iterator[str]:
    boxes = checkpoint.boxes[checkpoint.row_boxes[checkpoint.first_rows[entries]]]
    offsets, lengths = boxes[:, 0], boxes[:, 1]
    sizes = checkpoint.sizes[entries]
    is_outside = ((offsets < 0) | (lengths < 0) | (offsets + lengths > sizes)).any(axis=1)
    is_short = (lengths.prod(axis=1) != sizes.prod(axis=1)) & ~is_outside & must_cover
    for number in np.nonzero(is_outside)[0]:
        yield _outside(checkpoint, int(entries[number]), boxes[number])
    for number in np.nonzero(is_short)[0]:
        yield _gap(checkpoint, int(entries[number]), boxes[[number]], int(lengths[number].prod()))


def _representatives(checkpoint: CheckpointColumns, entries: Int64) -> Int64:
    """One entry of each pattern: of the same size, with the same chunks in the same order."""
    if not len(entries):
        return entries
    firsts, ends = checkpoint.first_rows[entries], checkpoint.first_rows[entries + 1]
    counts = ends - firsts
    known: dict[bytes, int] = {}
    if int(counts.sum()) > 0:
        for number, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
            pattern = checkpoint.row_boxes[first:end].tobytes() + checkpoint.sizes[entries[number]].tobytes()
            known.setdefault(pattern, number)
    return entries[np.fromiter(known.values(), dtype=np.int64, count=len(known))]


def _wrong_chunks(checkpoint: CheckpointColumns, entry: int, *, must_cover: bool) -> Iterator[str]:
    rows = checkpoint.row_boxes[checkpoint.first_rows[entry] : checkpoint.first_rows[entry + 1]]
    boxes = checkpoint.boxes[rows]
    offsets, lengths = boxes[:, 0], boxes[:, 1]
    size = checkpoint.sizes[entry]
    is_outside = ((offsets < 0) | (lengths < 0) | (offsets + lengths > size)).any(axis=1)
    if is_outside.any():
        for number in np.nonzero(is_outside)[0][:_MOST_NAMED]:
            yield _outside(checkpoint, entry, boxes[number])
        return
    ndim = int(checkpoint.ndims[entry])
    volumes = lengths.prod(axis=1)
    filled = np.nonzero(volumes)[0]
    if (pair := _overlapping(offsets[filled], lengths[filled], ndim)) is not None:
        one, other = (_box_text(boxes[filled[each]], ndim) for each in pair)
        yield f"{checkpoint.names.fqns[entry]}: {one} and {other} overlap"
    elif must_cover and ndim and int(volumes.sum()) != int(size.prod()):
        yield _gap(checkpoint, entry, boxes[filled], int(volumes.sum()))


def _overlapping(offsets: Int64, lengths: Int64, ndim: int) -> tuple[int, int] | None:
    """Two boxes that overlap, if any do."""
    if len(offsets) < 2:
        return None
    if ndim == 0:
        return 0, 1
    if _is_grid(offsets, lengths, ndim):
        _, first, counts = np.unique(offsets, axis=0, return_index=True, return_counts=True)
        if not (counts > 1).any():
            return None
        same = np.nonzero((offsets == offsets[first[np.argmax(counts)]]).all(axis=1))[0]
        return int(same[0]), int(same[1])
    return _swept(offsets, lengths, ndim)


def _is_grid(offsets: Int64, lengths: Int64, ndim: int) -> bool:
    """Whether in every dimension any two intervals are equal or disjoint: then boxes overlap only if they are equal."""
    for dim in range(ndim):
        order = np.lexsort((lengths[:, dim], offsets[:, dim]))
        starts, ends = offsets[order, dim], offsets[order, dim] + lengths[order, dim]
        is_equal = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1])
        if not (is_equal | (starts[1:] >= ends[:-1])).all():
            return False
    return True


def _swept(offsets: Int64, lengths: Int64, ndim: int) -> tuple[int, int] | None:
    """Boxes in the order of the dimension that tells most of them apart, each against those that still reach it."""
    dim = max(range(ndim), key=lambda d: len(np.unique(offsets[:, d])))
    order = np.argsort(offsets[:, dim], kind="stable")
    starts, ends = offsets[order], offsets[order] + lengths[order]
    # Boxes are sorted by start; the longest one says how far back a box can reach.
    reaches = np.searchsorted(starts[:, dim], starts[:, dim] - lengths[:, dim].max(), side="right").tolist()
    for number, reach in enumerate(reaches):
        before = slice(reach, number)
        hit = (starts[before] < ends[number]).all(axis=1) & (ends[before] > starts[number]).all(axis=1)
        if hit.any():
            return int(order[reach + int(np.argmax(hit))]), int(order[number])
    return None


def _box_text(box: Int64, ndim: int) -> str:
    return f"a chunk of {tuple(box[1, :ndim].tolist())} at {tuple(box[0, :ndim].tolist())}"


def _outside(checkpoint: CheckpointColumns, entry: int, box: Int64) -> str:
    ndim = int(checkpoint.ndims[entry])
    size = tuple(checkpoint.sizes[entry, :ndim].tolist())
    return f"{checkpoint.names.fqns[entry]}: {_box_text(box, ndim)} leaves the tensor, of size {size}"


def _gap(checkpoint: CheckpointColumns, entry: int, boxes: Int64, found: int) -> str:
    ndim = int(checkpoint.ndims[entry])
    size = tuple(checkpoint.sizes[entry, :ndim].tolist())
    volume = int(checkpoint.sizes[entry].prod())
    chunks = ", ".join(_box_text(box, ndim) for box in boxes[:_MOST_NAMED]) or "none"
    rest = f", and {len(boxes) - _MOST_NAMED} more" * (len(boxes) > _MOST_NAMED)
    return (
        f"{checkpoint.names.fqns[entry]}: the chunks have {found} elements, the tensor, of size {size}, {volume}: "
        f"{chunks}{rest}"
    )
