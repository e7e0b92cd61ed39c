"""The coordinator's part of a save: one global plan out of every rank's columns, all ranks and tensors at once.

Which items are the same chunk (replicas), which rank writes each (balance), whether the chunks make whole tensors
(validation), and what the checkpoint then holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import TensorProperties

from gpudcp.arrays import NONE, Int32, Int64, Path, distinct_rows, stable_order
from gpudcp.columns import OBJECT, SHARD, CheckpointColumns, SaveColumns, Templates, properties_key
from gpudcp.errors import PlanError
from gpudcp.formats.dtypes import QUANTIZED_DTYPES
from gpudcp.names import Names
from gpudcp.planners.balance import Replicas, assign
from gpudcp.planners.validate import check_chunks


class GlobalPlan(NamedTuple):
    """What every rank writes, and what the checkpoint holds when all have."""

    plans: list[SaveColumns]
    checkpoint: CheckpointColumns


def coordinate(
    plans: Sequence[SaveColumns], *, split_replicas: bool, to_lowest_rank: bool, is_flattened: bool
) -> GlobalPlan:
    """The global plan of these local plans, by rank.

    Args:
        plans: of each rank; unchanged.
        split_replicas: cut large replicated tensors by rows, so that every rank that has one writes a part.
        to_lowest_rank: of replicas, the one of the lowest rank is written, whatever that does to the balance.
        is_flattened: the names' paths go into the checkpoint.

    Raises:
        PlanError: chunks overlap, leave their tensor, or do not cover it; or ranks contradict each other.
    """
    items = _Items(plans)
    kept, template_ids = _without_replicas(items, split_replicas=split_replicas, to_lowest_rank=to_lowest_rank)
    return _global_plan(items, kept, template_ids, is_flattened=is_flattened)


class _Items:
    """The items of all ranks, one after the other."""

    def __init__(self, plans: Sequence[SaveColumns]) -> None:
        self.plans = plans
        self.counts = np.array([len(plan) for plan in plans], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.names, tables = _all_names([plan.names for plan in plans])
        self.name_ids = _concatenated(
            [table[plan.name_ids] for plan, table in zip(plans, tables, strict=True)], np.int32
        )
        self.templates, self.first_templates = _all_templates([plan.templates for plan in plans])
        self.template_ids = _concatenated([plan.template_ids for plan in plans], np.int32) + np.repeat(
            self.first_templates[:-1].astype(np.int32), self.counts
        )

    def __len__(self) -> int:
        return len(self.name_ids)

    def ranks(self) -> Int32:
        return np.repeat(np.arange(len(self.plans), dtype=np.int32), self.counts)

    def describe(self, item: int) -> str:
        """Rank, key and chunk of one item, for messages."""
        rank = int(np.searchsorted(self.starts, item, side="right")) - 1
        template = self.template_ids[item]
        ndim = int(self.templates.ndims[template])
        size, offsets, lengths = (tuple(each[:ndim]) for each in self.templates.boxes[template].tolist())
        property_id = self.templates.property_ids[template]
        dtype = "object" if property_id == NONE else self.templates.properties[property_id].dtype
        return f"rank {rank}: {lengths} at {offsets} of {size}, {dtype}"

    def fqn(self, item: int) -> str:
        return self.names[int(self.name_ids[item])]


def _all_names(every: Sequence[Names]) -> tuple[list[str], list[Int32]]:
    """All names, by first appearance, and the number of each rank's names among them."""
    numbers: dict[str, int] = {}
    tables: dict[int, Int32] = {}
    for names in every:
        if id(names) not in tables:
            table = [numbers.setdefault(fqn, len(numbers)) for fqn in names.fqns]
            tables[id(names)] = np.array(table, dtype=np.int32)
    return list(numbers), [tables[id(names)] for names in every]


def _all_templates(every: Sequence[Templates]) -> tuple[Templates, Int64]:
    """All templates in one table, and where each rank's start in it."""
    ndim = max((templates.boxes.shape[2] for templates in every), default=0)
    counts = [len(templates) for templates in every]
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    heads = np.empty((firsts[-1], 3), dtype=np.int32)
    boxes = np.ones((firsts[-1], 3, ndim), dtype=np.int64)
    boxes[:, 1] = 0
    numbers: dict[object, int] = {}
    properties: list[TensorProperties] = []
    for templates, first, count in zip(every, firsts.tolist(), counts, strict=False):
        table = [_numbered(numbers, properties, each) for each in templates.properties]
        rows = slice(first, first + count)
        heads[rows] = templates.heads
        if table != list(range(len(table))):
            heads[rows, 1] = np.array([*table, NONE], dtype=np.int32)[templates.property_ids]
        boxes[rows, :, : templates.boxes.shape[2]] = templates.boxes
    return Templates(heads, boxes, tuple(properties)), firsts


def _numbered(numbers: dict[object, int], properties: list[TensorProperties], each: TensorProperties) -> int:
    number = numbers.setdefault(properties_key(each), len(properties))
    if number == len(properties):
        properties.append(each)
    return number


def _concatenated(columns: list[Int32], dtype: type[np.int32]) -> Int32:
    return np.concatenate(columns) if columns else np.empty(0, dtype=dtype)


def _without_replicas(items: _Items, *, split_replicas: bool, to_lowest_rank: bool) -> tuple[NDArray[np.bool_], Int32]:
    """Which items are written, and each one's template: of replicas one, or several with some rows each."""
    kept = np.ones(len(items), dtype=bool)
    templates = items.templates
    if len(items) == 0:
        return kept, items.template_ids
    # A MetadataIndex, as a number: the name and the offsets; an object has none.
    offsets = np.concatenate([templates.ndims[:, None], templates.boxes[:, 1]], axis=1)
    offsets[templates.kinds == OBJECT] = NONE
    _, offset_ids = distinct_rows(offsets)
    keys = items.name_ids.astype(np.int64) * (int(offset_ids.max()) + 1) + offset_ids[items.template_ids]
    order, is_first = _groups_of_several(keys)
    if not len(order):
        return kept, items.template_ids
    _check_alike(items, order, is_first)
    if to_lowest_rank:
        kept[order[~is_first]] = False
        return kept, items.template_ids

    starts = np.nonzero(is_first)[0]
    nbytes = templates.nbytes()[items.template_ids]
    replicas = Replicas(
        order=order,
        starts=starts,
        counts=np.diff(np.append(starts, len(order))),
        ranks=items.ranks(),
        nbytes=np.maximum(nbytes[order[starts]], 1),  # of an object nothing is known: 1, as torch has it
        nrows=_rows_to_split(templates, items.template_ids[order[starts]]) if split_replicas else None,
    )
    kept[order] = False
    nbytes[order] = 0
    running = np.concatenate([[0], np.cumsum(nbytes)])
    assigned = assign(replicas, np.diff(running[items.starts]).astype(np.float64))
    kept[assigned.items] = True
    return kept, _with_pieces(items, assigned.items, assigned.first_rows, assigned.nrows)


def _groups_of_several(keys: Int64) -> tuple[Int64, NDArray[np.bool_]]:
    """The items of those keys that more than one has, key after key, in order; and which are the first of theirs."""
    order = stable_order(keys)
    ordered = keys[order]
    is_repeated = np.concatenate([[False], ordered[1:] == ordered[:-1]])
    of_several = np.nonzero(is_repeated | np.append(is_repeated[1:], False))[0]
    return order[of_several], ~is_repeated[of_several]


def _check_alike(items: _Items, order: Int64, is_first: NDArray[np.bool_]) -> None:
    """Replicas must agree in all but requires_grad and the like, of which the first's is taken."""
    templates = items.templates
    columns = [_dtype_ids(templates)[:, None]]
    columns += [templates.boxes[:, 0], templates.boxes[:, 2]]
    _, alike = distinct_rows(np.concatenate(columns, axis=1))
    found = alike[items.template_ids[order]]
    firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    if len(wrong := np.nonzero(found != found[firsts])[0]):
        one, other = int(order[firsts[wrong[0]]]), int(order[wrong[0]])
        raise PlanError(
            f"{items.fqn(one)}: the ranks disagree about one chunk: {items.describe(one)}; {items.describe(other)}"
        )


def _dtype_ids(templates: Templates) -> Int64:
    """A number for the dtype of each template; NONE: an object."""
    numbers: dict[object, int] = {}
    of_properties = [numbers.setdefault(each.dtype, len(numbers)) for each in templates.properties]
    return np.array([*of_properties, NONE], dtype=np.int64)[templates.property_ids]


def _rows_to_split(templates: Templates, template_ids: Int32) -> Int64:
    """Rows that a chunk can be cut into; 1: it stays whole."""
    if templates.boxes.shape[2] == 0:
        return np.ones(len(template_ids), dtype=np.int64)
    # Quantized tensors go whole: a part has a scale of its own, which would not reach the whole destination.
    may_split = np.array([each.dtype not in QUANTIZED_DTYPES for each in templates.properties] + [False], dtype=bool)
    is_split = may_split[templates.property_ids[template_ids]] & (templates.ndims[template_ids] > 0)
    return np.where(is_split, templates.boxes[template_ids, 2, 0], 1)


def _with_pieces(items: _Items, chosen: Int64, first_rows: Int64, nrows: Int64) -> Int32:
    """Every item's template, where new ones stand for those items of which only some rows are written."""
    templates = items.templates
    at = np.nonzero(nrows != NONE)[0]
    if not len(at):
        return items.template_ids
    old = items.template_ids[chosen[at]]
    heads, boxes = templates.heads[old].copy(), templates.boxes[old].copy()
    heads[:, 0] = SHARD
    boxes[:, 1, 0] += first_rows[at]
    boxes[:, 2, 0] = nrows[at]
    template_ids = items.template_ids.copy()
    template_ids[chosen[at]] = len(templates) + np.arange(len(at), dtype=np.int32)
    items.templates = Templates(
        np.concatenate([templates.heads, heads]), np.concatenate([templates.boxes, boxes]), templates.properties
    )
    return template_ids


def _global_plan(items: _Items, kept: NDArray[np.bool_], template_ids: Int32, *, is_flattened: bool) -> GlobalPlan:
    chosen = np.nonzero(kept)[0]
    templates = items.templates
    chosen_templates = template_ids[chosen]
    # Entries by name, in the order of the names; of each, its chunks in the order of the ranks.
    order = stable_order(items.name_ids[chosen])
    rows = chosen[order]
    row_templates = template_ids[rows]
    row_names = items.name_ids[rows]
    first_rows = np.append(np.nonzero(np.diff(row_names, prepend=NONE))[0], len(rows))
    entry_names = row_names[first_rows[:-1]]
    hints = np.empty(len(chosen), dtype=np.int32)
    starts = np.repeat(first_rows[:-1].astype(np.int32), np.diff(first_rows))
    hints[order] = np.arange(len(rows), dtype=np.int32) - starts
    hints[(templates.kinds == OBJECT)[chosen_templates]] = NONE

    firsts = row_templates[first_rows[:-1]]
    _check_entries(items, rows, row_templates, first_rows)
    distinct, row_boxes = _distinct_boxes(templates, row_templates)
    is_object = templates.kinds[firsts] == OBJECT
    used = templates.property_ids[firsts]
    checkpoint = CheckpointColumns(
        names=Names([items.names[number] for number in entry_names], _merged_paths(items) if is_flattened else None),
        first_rows=first_rows.astype(np.int64),
        property_ids=np.where(is_object, NONE, used).astype(np.int32),
        properties=templates.properties,
        ndims=np.where(is_object, 0, templates.ndims[firsts]).astype(np.int32),
        sizes=templates.boxes[firsts, 0],
        boxes=distinct,
        row_boxes=row_boxes,
    )
    check_chunks(checkpoint, must_cover=len(items.plans) > 1)
    return GlobalPlan(list(_plans(items, chosen, chosen_templates, hints)), checkpoint)


def _merged_paths(items: _Items) -> dict[str, Path]:
    merged: dict[str, Path] = {}
    for names in {id(plan.names): plan.names for plan in reversed(items.plans)}.values():
        merged.update(names.paths or {})
    return merged


def _distinct_boxes(templates: Templates, row_templates: Int32) -> tuple[Int64, Int32]:
    used = np.nonzero(np.bincount(row_templates))[0]
    boxes = templates.boxes[used, 1:]
    first, numbers = distinct_rows(boxes.reshape((len(used), 2 * boxes.shape[2])))
    places = np.zeros(len(templates), dtype=np.int32)
    places[used] = numbers
    return boxes[first], places[row_templates]


def _check_entries(items: _Items, rows: Int64, row_templates: Int32, first_rows: Int64) -> None:
    """All chunks of an entry are of one tensor; what is no shard is its only one.

    Raises:
        PlanError: they are not; it names two of them.
    """
    templates = items.templates
    counts = np.diff(first_rows)
    if len(rows) == len(counts):  # one chunk each
        return
    columns = [_dtype_ids(templates)[:, None]]
    columns += [templates.ndims[:, None].astype(np.int64), templates.boxes[:, 0]]
    _, tensors = distinct_rows(np.concatenate(columns, axis=1))
    found = tensors.astype(np.int32)[row_templates]
    is_wrong = found != np.repeat(found[first_rows[:-1]], counts)
    whole = np.nonzero((templates.kinds != SHARD)[row_templates])[0]
    is_wrong[whole] |= counts[np.searchsorted(first_rows, whole, side="right") - 1] > 1
    if len(wrong := np.nonzero(is_wrong)[0]):
        row = int(wrong[0])
        first = int(first_rows[np.searchsorted(first_rows, row, side="right") - 1])
        other = first if first != row else row + 1
        one, two = sorted((int(rows[other]), int(rows[row])))
        raise PlanError(
            f"{items.fqn(one)}: two write items that are not shards of one tensor: {items.describe(one)}; "
            f"{items.describe(two)}"
        )


def _plans(items: _Items, chosen: Int64, template_ids: Int32, hints: Int32) -> Iterator[SaveColumns]:
    ends = np.searchsorted(chosen, items.starts)
    nlocal = items.first_templates[-1]
    local_template_ids = template_ids - np.repeat(items.first_templates[:-1].astype(np.int32), np.diff(ends))
    for rank, plan in enumerate(items.plans):
        at = slice(ends[rank], ends[rank + 1])
        own, own_templates = local_template_ids[at], plan.templates
        pieces = np.nonzero(template_ids[at] >= nlocal)[0]
        if len(pieces):
            own_templates, own = _with_own_pieces(items, plan.templates, own, pieces, template_ids[at][pieces])
        whole = len(own) == len(plan)
        yield SaveColumns(
            names=plan.names,
            name_ids=plan.name_ids if whole else plan.name_ids[chosen[at] - items.starts[rank]],
            template_ids=own,
            templates=own_templates,
            hints=hints[at],
        )


def _with_own_pieces(
    items: _Items, templates: Templates, own: Int32, pieces: Int64, numbers: Int32
) -> tuple[Templates, Int32]:
    """A rank's templates with those of its pieces, and its items' numbers in them."""
    ndim = templates.boxes.shape[2]
    boxes = items.templates.boxes[numbers][:, :, :ndim]
    heads = items.templates.heads[numbers].copy()
    table = {properties_key(each): number for number, each in enumerate(templates.properties)}
    heads[:, 1] = [table[properties_key(items.templates.properties[number])] for number in heads[:, 1]]
    own = own.copy()
    own[pieces] = len(templates) + np.arange(len(pieces), dtype=np.int32)
    merged = Templates(
        np.concatenate([templates.heads, heads]), np.concatenate([templates.boxes, boxes]), templates.properties
    )
    return merged, own
