"""What a checkpoint's metadata says, item by item, and whether it agrees with itself. Opens no file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from gpudcp.arrays import NONE
from gpudcp.columns import CheckpointColumns
from gpudcp.errors import CorruptCheckpointError, GpuDcpError, PlanError, UnsafeCheckpointError
from gpudcp.files.commit import rank_of_data_file
from gpudcp.names import Names
from gpudcp.planners.validate import check_chunks
from gpudcp.storage.stored import StoredItem, StoredItems
from gpudcp.verification.report import Problem
from gpudcp.views import ColumnMetadata

Sizes = tuple[int, ...]


class Claim(NamedTuple):
    """One item of a file, as the metadata describes it."""

    item: StoredItem
    sizes: Sizes | None
    """Of the chunk; None: an object."""
    dtype: torch.dtype | None


class _Tensor(NamedTuple):
    fqn: str
    sizes: Sizes
    dtype: torch.dtype
    chunks: list[tuple[Sizes, Sizes]]


def claims_of(metadata: Metadata, directory: str, *, file: str) -> tuple[list[Claim], list[Problem]]:
    """Every item that the metadata places in a file, and every way in which it contradicts itself.

    Args:
        metadata: as it was decoded: of the right classes, with anything inside.
        directory: of the checkpoint.
        file: that holds the metadata, for messages.
    """
    if isinstance(metadata, ColumnMetadata):
        if (of_rows := _claims_of_rows(metadata, directory)) is not None:
            return of_rows, []
        metadata = metadata.plain()
    problems: list[Problem] = []
    tensors, described = _described(metadata, file, problems)
    try:
        stored = StoredItems(metadata, directory)
    except CorruptCheckpointError as err:
        return [], [Problem(kind="metadata", file=file, expected="a storage record for each item", found=str(err))]
    claims = []
    for index in metadata.storage_data:
        if not isinstance(index, MetadataIndex) or index not in described:
            found = f"one of {index!r}"
            problems.append(Problem(kind="record", file=file, expected="storage records of known items", found=found))
            continue
        sizes, dtype = described.pop(index)
        try:
            claims.append(Claim(stored.find(index), sizes, dtype))
        except GpuDcpError as err:
            problems.append(
                Problem(kind="record", fqn=index.fqn, file=file, expected="a storage record", found=str(err))
            )
    problems += [
        Problem(kind="record", fqn=index.fqn, file=file, expected=f"a storage record of {_chunk(index)}", found="none")
        for index in described
    ]
    # As on save: one rank alone may save no more than its own shard.
    ranks = {rank_of_data_file(claim.item.path) for claim in claims}
    problems += _cover_problems(tensors, file, must_cover=len(ranks) > 1)
    return claims, problems


def _claims_of_rows(metadata: ColumnMetadata, directory: str) -> list[Claim] | None:
    """The claims of columns, without an object for each entry; None where something is to be said of one of them."""
    columns, records = metadata.columns, metadata.row_records
    if records is None or not metadata.is_unchanged or 0 in np.diff(columns.first_rows):
        return None
    used = [records.paths[number] for number in np.unique(records.path_ids).tolist()]
    stored = StoredItems(metadata, directory)
    try:
        stored.checked_paths(used)
        check_chunks(columns, must_cover=len({rank_of_data_file(path) for path in used}) > 1)
    except (PlanError, UnsafeCheckpointError):
        return None
    indices = records.indices
    _, offsets = indices.offsets.distinct()
    keys = indices.name_ids.astype(np.int64) * len(offsets) + offsets[indices.offset_ids]
    if len(np.unique(keys)) < len(keys):
        return None  # an empty shard that begins where a full one does
    lengths, dtypes = columns.boxes[:, 1].tolist(), [*(each.dtype for each in columns.properties), None]
    known: dict[tuple[int, int], Sizes] = {}
    claims = []
    rows = (columns.row_boxes, columns.ndims[indices.name_ids], columns.property_ids[indices.name_ids])
    for index, box, ndim, property_id in zip(indices, *(row.tolist() for row in rows), strict=True):
        sizes = None
        if property_id != NONE and (sizes := known.get((box, ndim))) is None:
            sizes = known[box, ndim] = tuple(lengths[box][:ndim])
        claims.append(Claim(stored.find(index), sizes, dtypes[property_id]))
    return claims


def _chunk(index: MetadataIndex) -> str:
    return "the object" if index.offset is None else f"the chunk at {tuple(index.offset)}"


_Described = dict[MetadataIndex, tuple[Sizes | None, torch.dtype | None]]


def _described(metadata: Metadata, file: str, problems: list[Problem]) -> tuple[list[_Tensor], _Described]:
    """The tensors, and the chunk's sizes and dtype of each index that should have a storage record."""
    tensors: list[_Tensor] = []
    described: _Described = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            described[MetadataIndex(fqn)] = (None, None)
            continue
        tensor = _tensor(fqn, entry)
        if tensor is None:
            found = f"a {type(entry).__name__} that describes none"
            expected = "a tensor or an object"
            problems.append(Problem(kind="metadata", fqn=str(fqn), file=file, expected=expected, found=found))
            continue
        tensors.append(tensor)
        for offsets, sizes in tensor.chunks:
            index = MetadataIndex(fqn, offsets)
            # An empty shard may begin where a full one does: they share a record.
            if 0 not in sizes or index not in described:
                described[index] = (sizes, tensor.dtype)
    return tensors, described


def _tensor(fqn: object, entry: object) -> _Tensor | None:
    """The entry's sizes, checked: a damaged pickle of the right classes can hold anything."""
    if not isinstance(fqn, str) or not isinstance(entry, TensorStorageMetadata):
        return None
    try:
        sizes, dtype = tuple(entry.size), entry.properties.dtype
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    except (AttributeError, TypeError):
        return None
    every: Iterable[tuple[Any, ...]] = (sizes, *(part for chunk in chunks for part in chunk))
    if not all(len(each) == len(sizes) and all(type(n) is int and 0 <= n < 1 << 62 for n in each) for each in every):
        return None
    return _Tensor(fqn, sizes, dtype, chunks) if chunks and isinstance(dtype, torch.dtype) else None


def _cover_problems(tensors: list[_Tensor], file: str, *, must_cover: bool) -> list[Problem]:
    if _cover_error(tensors, must_cover=must_cover) is None:
        return []
    # All at once they are checked fast; one by one each gives its own problem.
    errors = [(tensor, _cover_error([tensor], must_cover=must_cover)) for tensor in tensors]
    return [
        Problem(kind="cover", fqn=tensor.fqn, file=file, expected="chunks that make the whole tensor", found=error)
        for tensor, error in errors
        if error is not None
    ]


def _cover_error(tensors: list[_Tensor], *, must_cover: bool) -> str | None:
    try:
        check_chunks(_columns(tensors), must_cover=must_cover)
    except PlanError as err:
        return str(err)
    return None


def _columns(tensors: list[_Tensor]) -> CheckpointColumns:
    ndim = max((len(tensor.sizes) for tensor in tensors), default=0)
    boxes: dict[tuple[Sizes, Sizes], int] = {}
    rows = [boxes.setdefault(chunk, len(boxes)) for tensor in tensors for chunk in tensor.chunks]
    padded = [[_padded(offsets, ndim, 0), _padded(sizes, ndim, 1)] for offsets, sizes in boxes]
    return CheckpointColumns(
        names=Names([tensor.fqn for tensor in tensors], None),
        first_rows=np.cumsum([0, *(len(tensor.chunks) for tensor in tensors)]).astype(np.int64),
        property_ids=np.zeros(len(tensors), dtype=np.int32),
        properties=(),
        ndims=np.array([len(tensor.sizes) for tensor in tensors], dtype=np.int32),
        sizes=np.array([_padded(tensor.sizes, ndim, 1) for tensor in tensors], np.int64).reshape(len(tensors), ndim),
        boxes=np.array(padded, dtype=np.int64).reshape(len(boxes), 2, ndim),
        row_boxes=np.array(rows, dtype=np.int32),
    )


def _padded(values: Sizes, ndim: int, fill: int) -> list[int]:
    return [*values, *[fill] * (ndim - len(values))]
