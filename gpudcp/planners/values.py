"""From values to items: what of a tensor, a DTensor, a ShardedTensor or an object is written, and what is read into it.

Pure functions over torch's own types. Offsets, sizes and lengths are elements for each dimension. The results are those
of torch's planners, but for errors, which are `gpudcp.errors`, and where a docstring says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from gpudcp._dcp import ShardedTensor, local_box
from gpudcp.arrays import Int64
from gpudcp.errors import PlanError
from gpudcp.planners.joins import overlaps


def write_items_for(fqn: str, value: Any) -> list[WriteItem]:
    """What this rank writes of a value: its shards, the tensor, or the object.

    A value with ``__create_write_items__`` (torch's ``_Checkpointable``) is asked; so is the local tensor of a
    DTensor. A tensor that no box describes (sparse, nested) is not told from others: that is a planner's to decide.

    Raises:
        PlanError: a DTensor with partial placements: its values are not known to any rank.
    """
    if (answer := _own_method(value, "__create_write_items__")) is not None:
        return list(answer(fqn, value))
    if isinstance(value, DTensor):
        return dtensor_write_items(fqn, value)
    if isinstance(value, ShardedTensor):
        return sharded_tensor_write_items(fqn, value)
    return [tensor_write_item(fqn, value) if isinstance(value, torch.Tensor) else object_write_item(fqn)]


def tensor_write_item(fqn: str, tensor: torch.Tensor) -> WriteItem:
    """A plain tensor, whole, as a TENSOR item."""
    chunk = _whole(tensor)
    return _tensor_item(WriteItemType.TENSOR, fqn, chunk, TensorProperties.create_from_tensor(tensor), tensor.size())


def dtensor_write_items(fqn: str, tensor: DTensor) -> list[WriteItem]:
    """This rank's box of a DTensor as one SHARD item, even where it is empty; none on a rank outside of its mesh.

    ``requires_grad`` is the DTensor's, whether or not gradients are enabled; torch's item changes with that.

    Raises:
        PlanError: a placement is partial.
    """
    if (chunk := _dtensor_chunk(tensor, fqn)) is None:
        return []
    local = local_tensor(tensor)
    if (answer := _own_method(local, "__create_write_items__")) is not None:
        return list(answer(fqn, tensor))
    properties = TensorProperties.create_from_tensor(local)
    properties.requires_grad = tensor.requires_grad
    return [_tensor_item(WriteItemType.SHARD, fqn, chunk, properties, tensor.size())]


def sharded_tensor_write_items(fqn: str, tensor: ShardedTensor) -> list[WriteItem]:
    """One SHARD item for each shard that this rank holds of a ShardedTensor."""
    return shard_items(fqn, tensor, [shard.metadata for shard in tensor.local_shards()])


def object_write_item(fqn: str) -> WriteItem:
    """A BYTE_IO item: whatever is no tensor."""
    return WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)


def chunk_list(tensor: Any, *, fqn: str = "value") -> list[ChunkStorageMetadata]:
    """The boxes of a tensor that this rank holds; none of a DTensor on a mesh that this rank is not in.

    Args:
        tensor: of any kind.
        fqn: what errors call it.

    Raises:
        PlanError: it is neither a tensor nor anything that has ``__create_chunk_list__``; or a DTensor with partial
            placements.
    """
    if (answer := _own_method(tensor, "__create_chunk_list__")) is not None:
        return list(answer())
    if isinstance(tensor, DTensor):
        if (chunk := _dtensor_chunk(tensor, fqn)) is None:
            return []
        answer = _own_method(local_tensor(tensor), "__create_chunk_list__")
        return [chunk] if answer is None else list(answer())
    if isinstance(tensor, ShardedTensor):
        return [_chunk_of_shard(shard.metadata) for shard in tensor.local_shards()]
    if isinstance(tensor, torch.Tensor):
        return [_whole(tensor)]
    raise PlanError(f"{fqn}: a {type(tensor).__qualname__} is no tensor, and has no chunks")


def read_items_for(fqn: str, metadata_entry: STORAGE_TYPES, value: Any) -> list[ReadItem]:
    """What this rank reads of a checkpoint's entry to fill a value.

    Raises:
        PlanError: the checkpoint holds a tensor, and the value is none; or a DTensor with partial placements.
    """
    if isinstance(metadata_entry, BytesStorageMetadata):
        nothing = torch.Size((0,))
        index = MetadataIndex(fqn)
        return [ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)]
    if not has_chunks(value):
        raise PlanError(f"{fqn}: a tensor in the checkpoint, a {type(value).__qualname__} in the state dict")
    return read_items_for_chunk_list(fqn, metadata_entry, chunk_list(value, fqn=fqn))


def read_items_for_chunk_list(
    fqn: str, tensor_metadata: TensorStorageMetadata, local_chunks: Sequence[ChunkStorageMetadata]
) -> list[ReadItem]:
    """One item for each pair of a local and a saved chunk that overlap, by local chunk, then by saved chunk.

    As a set these are torch's items. Indices carry the number of their chunk as a hint.

    Raises:
        PlanError: the chunks differ in their number of dimensions.
    """
    saved_chunks = tensor_metadata.chunks
    if not saved_chunks or not local_chunks:
        return []
    ndim = len(local_chunks[0].offsets)
    if (saved_ndim := len(saved_chunks[0].offsets)) != ndim:
        raise PlanError(f"{fqn}: saved chunks have {saved_ndim} dimensions, the tensor here has {ndim}")
    if len(saved_chunks) * len(local_chunks) <= _PAIRS_ONE_BY_ONE:
        rows = _pairs_one_by_one(saved_chunks, local_chunks)
    else:
        found = overlaps(*_columns(saved_chunks, ndim), *_columns(local_chunks, ndim))
        rows = zip(*(column.tolist() for column in found), strict=True)
    return [
        ReadItem(
            type=LoadItemType.TENSOR,
            dest_index=MetadataIndex(fqn, local_chunks[local].offsets, local),
            dest_offsets=torch.Size(dest_offsets),
            storage_index=MetadataIndex(fqn, saved_chunks[saved].offsets, saved),
            storage_offsets=torch.Size(storage_offsets),
            lengths=torch.Size(lengths),
        )
        for local, saved, storage_offsets, dest_offsets, lengths in rows
    ]


def find_shard(value: Any, index: MetadataIndex) -> Any:
    """The tensor, the shard of it that starts at ``index.offset``, or the object: what an index names of a value.

    Without an offset: the whole of a plain tensor, what this rank holds of a DTensor, an object. torch takes any
    offset for a DTensor's.

    Raises:
        PlanError: this rank holds no shard that starts there; or a ShardedTensor, and no offset.
    """
    if (answer := _own_method(value, "__get_tensor_shard__")) is not None:
        return answer(index)
    if isinstance(value, DTensor):
        return _dtensor_shard(value, index)
    if isinstance(value, ShardedTensor):
        return _sharded_tensor_shard(value, index)
    if index.offset is None:  # nor is a nested tensor asked for its sizes, which it has none of
        return value
    if not isinstance(value, torch.Tensor) or index.offset != _whole(value).offsets:
        raise PlanError(f"{index.fqn}: a {type(value).__qualname__} has no shard at {tuple(index.offset)}")
    return value


def find_rows(value: Any, index: MetadataIndex) -> Any:
    """As `find_shard`; and where ``index.offset`` is a row inside of a shard, that shard from this row on.

    Raises:
        PlanError: as `find_shard`.
    """
    if index.offset is None or not has_chunks(value):
        return find_shard(value, index)
    chunks = chunk_list(value, fqn=index.fqn)
    if not any(chunk.offsets == index.offset for chunk in chunks):
        for chunk in chunks:
            if (row := row_at(index.offset, chunk.offsets, chunk.sizes)) is not None:
                return find_shard(value, MetadataIndex(index.fqn, chunk.offsets))[row:]
    return find_shard(value, index)


def row_at(offset: Sequence[int], chunk_offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """Which row of a chunk begins at an offset in the whole tensor; None: none does."""
    if not offset or len(offset) != len(chunk_offsets) or tuple(offset[1:]) != tuple(chunk_offsets[1:]):
        return None
    row = offset[0] - chunk_offsets[0]
    return row if 0 <= row < lengths[0] else None


def _own_method(value: Any, name: str) -> Callable[..., Any] | None:
    """The method of that name, unless it is DTensor's own: those are answered here."""
    method = getattr(type(value), name, None)
    if method is not None and method is getattr(DTensor, name, None):
        return None
    own: Callable[..., Any] | None = getattr(value, name, None)
    return own


def has_chunks(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__create_chunk_list__")


def _tensor_item(
    kind: WriteItemType, fqn: str, chunk: ChunkStorageMetadata, properties: TensorProperties, size: torch.Size
) -> WriteItem:
    data = TensorWriteData(chunk=chunk, properties=properties, size=size)
    return WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=kind, tensor_data=data)


def shard_items(fqn: str, tensor: ShardedTensor, shards: Iterable[Any]) -> list[WriteItem]:
    metadata = tensor.metadata()
    of_all = metadata.tensor_properties
    return [
        _tensor_item(
            WriteItemType.SHARD,
            fqn,
            _chunk_of_shard(shard),
            TensorProperties(
                dtype=of_all.dtype,
                layout=of_all.layout,
                requires_grad=of_all.requires_grad,
                memory_format=of_all.memory_format,
                pin_memory=of_all.pin_memory,
            ),
            metadata.size,
        )
        for shard in shards
    ]


def _whole(tensor: torch.Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([0] * tensor.ndim), sizes=tensor.size())


def _chunk_of_shard(shard: Any) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.shard_offsets), sizes=torch.Size(shard.shard_sizes))


def _dtensor_chunk(tensor: DTensor, fqn: str) -> ChunkStorageMetadata | None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise PlanError(f"{fqn}: a DTensor with placements {tensor.placements} is not reduced yet: it has no values")
    try:
        box = local_box(tensor)
    except PlanError as err:
        raise PlanError(f"{fqn}: {err}") from err
    return None if box is None else ChunkStorageMetadata(offsets=box[0], sizes=box[1])


def local_tensor(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():  # else it is a view, made by an autograd function at ten times the cost
        return tensor.to_local()


def _dtensor_shard(tensor: DTensor, index: MetadataIndex) -> torch.Tensor:
    if (chunk := _dtensor_chunk(tensor, index.fqn)) is None:
        raise PlanError(f"{index.fqn}: this rank holds nothing of it, as it is not in its {tensor.device_mesh}")
    local = local_tensor(tensor)
    if (answer := _own_method(local, "__get_tensor_shard__")) is not None:
        shard: torch.Tensor = answer(index)
        return shard
    if index.offset is not None and index.offset != chunk.offsets:
        raise PlanError(
            f"{index.fqn}: no shard at {tuple(index.offset)} here: this rank's starts at {tuple(chunk.offsets)}"
        )
    return local


def _sharded_tensor_shard(tensor: ShardedTensor, index: MetadataIndex) -> torch.Tensor:
    if index.offset is None:
        raise PlanError(f"{index.fqn}: a ShardedTensor's shards are known by their offsets, and the index has none")
    shards = tensor.local_shards()
    hinted = shards[index.index : index.index + 1] if index.index is not None and index.index >= 0 else []
    for shard in itertools.chain(hinted, shards):
        if torch.Size(shard.metadata.shard_offsets) == index.offset:
            found: torch.Tensor = shard.tensor
            return found
    here = [tuple(shard.metadata.shard_offsets) for shard in shards]
    raise PlanError(f"{index.fqn}: no shard at {tuple(index.offset)} here: this rank's start at {here}")


# Measured: up to so many pairs this is quicker than to make columns of the chunks.
_PAIRS_ONE_BY_ONE = 24


_Pair: TypeAlias = "tuple[int, int, Sequence[int], Sequence[int], Sequence[int]]"


def _pairs_one_by_one(
    saved_chunks: Sequence[ChunkStorageMetadata], local_chunks: Sequence[ChunkStorageMetadata]
) -> Iterator[_Pair]:
    for local_number, local in enumerate(local_chunks):
        for saved_number, saved in enumerate(saved_chunks):
            storage_offsets, dest_offsets, lengths = [], [], []
            for at, n, saved_at, saved_n in zip(local.offsets, local.sizes, saved.offsets, saved.sizes, strict=True):
                end, saved_end = at + n, saved_at + saved_n
                if at >= saved_end or saved_at >= end:
                    break
                start = at if at > saved_at else saved_at
                storage_offsets.append(start - saved_at)
                dest_offsets.append(start - at)
                lengths.append((end if end < saved_end else saved_end) - start)
            else:
                yield local_number, saved_number, storage_offsets, dest_offsets, lengths


def _columns(chunks: Sequence[ChunkStorageMetadata], ndim: int) -> tuple[Int64, Int64]:
    """Offsets and sizes, [n, D]."""
    numbers = [number for chunk in chunks for number in (*chunk.offsets, *chunk.sizes)]
    boxes = np.array(numbers, dtype=np.int64).reshape(len(chunks), 2, ndim)
    return boxes[:, 0], boxes[:, 1]
