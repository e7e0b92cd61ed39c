"""What a Metadata says of its tensors and objects, as columns for whoever writes it, from columns or from objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from gpudcp.arrays import NONE, Column, Int32, Int64, distinct_numbers
from gpudcp.columns import CheckpointColumns, properties_key
from gpudcp.sizes import SizeTable
from gpudcp.views import ColumnMetadata


class Content(NamedTuple):
    """``state_dict_metadata`` as columns: tables of what is shared, and numbers into them."""

    names: Sequence[str]
    is_tensor: NDArray[np.bool_]
    """Of each entry."""
    states: list[Any]
    """Of TensorProperties."""
    state_ids: Column
    """Of each tensor."""
    sizes: SizeTable
    size_ids: Int32
    """Of each tensor."""
    counts: Int64
    """Chunks of each tensor."""
    chunk_offsets: Int32
    """Of each chunk, into the sizes."""
    chunk_sizes: Int32


def content_of(metadata: Metadata) -> Content | None:
    """The content; None where it has values of other classes than torch's own, of which more would have to be said."""
    if isinstance(metadata, ColumnMetadata) and metadata.is_unchanged:
        return _content_of_columns(metadata.columns)
    if type(metadata) is not Metadata or type(metadata.planner_data) not in (dict, type(None)):
        return None
    if len(vars(metadata)) > len(fields(Metadata)):  # a planner may keep more there
        return None
    values = list(metadata.state_dict_metadata.values())
    if not all_are(values, TensorStorageMetadata, BytesStorageMetadata):
        return None
    tensors = [value for value in values if type(value) is TensorStorageMetadata]
    if not set(map(len, map(vars, tensors))) <= {len(fields(TensorStorageMetadata))}:
        return None
    if not all_are(map(attrgetter("properties"), tensors), TensorProperties):
        return None
    if not all_are(map(attrgetter("chunks"), tensors), list):
        return None
    chunks = list(chain.from_iterable(map(attrgetter("chunks"), tensors)))
    if not all_are(chunks, ChunkStorageMetadata):
        return None
    found_sizes = map(attrgetter("size"), tensors), map(attrgetter("offsets"), chunks), map(attrgetter("sizes"), chunks)
    if not all_are(chain(*found_sizes), torch.Size):
        return None
    sizes: dict[torch.Size, int] = {}
    numbers: dict[Any, int] = {}
    states: list[Any] = []
    return Content(
        names=list(metadata.state_dict_metadata),
        is_tensor=np.array([type(value) is TensorStorageMetadata for value in values], dtype=bool),
        states=states,
        state_ids=np.array([_state_number(tensor.properties, numbers, states) for tensor in tensors], dtype=np.int64),
        size_ids=_numbered(map(attrgetter("size"), tensors), sizes),
        counts=np.array([len(tensor.chunks) for tensor in tensors], dtype=np.int64),
        chunk_offsets=_numbered(map(attrgetter("offsets"), chunks), sizes),
        chunk_sizes=_numbered(map(attrgetter("sizes"), chunks), sizes),
        sizes=SizeTable.of(list(sizes)),
    )


def _content_of_columns(columns: CheckpointColumns) -> Content:
    is_tensor = columns.property_ids != NONE
    entries = np.nonzero(is_tensor)[0]
    every_count = np.diff(columns.first_rows)
    counts, ndims = every_count[entries], columns.ndims[entries]
    row_boxes = columns.row_boxes
    if len(entries) < len(columns):
        row_boxes = row_boxes[np.repeat(is_tensor, every_count)]
    # Boxes are padded: one box is another one for tensors of other dimensions.
    most = columns.boxes.shape[2] + 1
    used, places = distinct_numbers(row_boxes.astype(np.int64) * most + np.repeat(ndims, counts))
    box_ids, box_ndims = places.astype(np.int32), (used % most).astype(np.int32)
    boxes = columns.boxes[used // most]
    lengths = np.where(np.arange(most - 1) < box_ndims[:, None], boxes[:, 1], 0)
    sizes = np.where(np.arange(most - 1) < ndims[:, None], columns.sizes[entries], 0)
    tables = [(boxes[:, 0], box_ndims), (lengths, box_ndims), (sizes, ndims)]
    numbers: dict[Any, int] = {}
    states: list[Any] = []
    state_ids = np.array([_state_number(each, numbers, states) for each in columns.properties], dtype=np.int64)
    return Content(
        names=columns.names.fqns,
        is_tensor=is_tensor,
        states=states,
        state_ids=state_ids[columns.property_ids[entries]] if len(state_ids) else entries,
        sizes=SizeTable.joined(SizeTable(*table) for table in tables),
        size_ids=(2 * len(used) + np.arange(len(entries))).astype(np.int32),
        counts=counts,
        chunk_offsets=box_ids,
        chunk_sizes=box_ids + np.int32(len(used)),
    )


def all_are(values: Iterable[Any], *types: type) -> bool:
    """Whether each value is of one of these very types: of a subclass more would have to be written."""
    return set(map(type, values)) <= {*types}


def _state_number(properties: TensorProperties, numbers: dict[Any, int], states: list[Any]) -> int:
    """The number of the state that pickle asks these properties for, the same for equal ones."""
    number = numbers.setdefault(properties_key(properties), len(states))
    if number == len(states):
        states.append(properties.__getstate__())  # type: ignore[no-untyped-call]
    return number


def _numbered(found: Iterable[Any], numbers: dict[Any, int]) -> Int32:
    """The number of each, a new one for what is new."""
    return np.array([numbers.setdefault(each, len(numbers)) for each in found], dtype=np.int32)
