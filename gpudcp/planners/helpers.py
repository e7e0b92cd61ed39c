"""The steps of planning as pure functions over torch's own types: what a planner of one's own is built from.

Values become items (`write_items_for`, `read_items_for`), state dicts become plans (`local_save_plan`,
`local_load_plan`), the plans of all ranks become the checkpoint's metadata (`global_save_plan`). Offsets, sizes and
lengths are elements for each dimension. No planner's state, no bytes, no files.

The results are those of torch's planners, but for errors, which are `gpudcp.errors`, and where a docstring says so.
"""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from gpudcp._dcp import ShardedTensor, local_box
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.planners.joins import overlaps

__all__ = [
    "chunk_list",
    "closest_names",
    "dtensor_write_items",
    "find_shard",
    "global_load_plan",
    "global_save_plan",
    "init_state_dict",
    "iterate_state_dict",
    "local_load_plan",
    "local_metadata",
    "local_save_plan",
    "materialized",
    "merge_delta_plans",
    "metadata_only_plan",
    "missing_keys_text",
    "object_write_item",
    "plans_equal",
    "read_items_for",
    "read_items_for_chunk_list",
    "sharded_tensor_write_items",
    "tensor_write_item",
    "write_items_for",
]

Int64 = NDArray[np.int64]
_T = TypeVar("_T")


# From a value to items


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
    local = _local_tensor(tensor)
    if (answer := _own_method(local, "__create_write_items__")) is not None:
        return list(answer(fqn, tensor))
    properties = TensorProperties.create_from_tensor(local)
    properties.requires_grad = tensor.requires_grad
    return [_tensor_item(WriteItemType.SHARD, fqn, chunk, properties, tensor.size())]


def sharded_tensor_write_items(fqn: str, tensor: ShardedTensor) -> list[WriteItem]:
    """One SHARD item for each shard that this rank holds of a ShardedTensor."""
    return _shard_items(fqn, tensor, [shard.metadata for shard in tensor.local_shards()])


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
        answer = _own_method(_local_tensor(tensor), "__create_chunk_list__")
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
    if not _has_chunks(value):
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
    at = _whole(value).offsets if isinstance(value, torch.Tensor) else None
    if index.offset is not None and index.offset != at:
        raise PlanError(f"{index.fqn}: a {type(value).__qualname__} has no shard at {tuple(index.offset)}")
    return value


def _own_method(value: Any, name: str) -> Callable[..., Any] | None:
    """The method of that name, unless it is DTensor's own: those are answered here."""
    method = getattr(type(value), name, None)
    if method is not None and method is getattr(DTensor, name, None):
        return None
    own: Callable[..., Any] | None = getattr(value, name, None)
    return own


def _has_chunks(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__create_chunk_list__")


def _tensor_item(
    kind: WriteItemType, fqn: str, chunk: ChunkStorageMetadata, properties: TensorProperties, size: torch.Size
) -> WriteItem:
    data = TensorWriteData(chunk=chunk, properties=properties, size=size)
    return WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=kind, tensor_data=data)


def _shard_items(fqn: str, tensor: ShardedTensor, shards: Iterable[Any]) -> list[WriteItem]:
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


def _local_tensor(tensor: DTensor) -> torch.Tensor:
    with torch.no_grad():  # else it is a view, made by an autograd function at ten times the cost
        return tensor.to_local()


def _dtensor_shard(tensor: DTensor, index: MetadataIndex) -> torch.Tensor:
    if (chunk := _dtensor_chunk(tensor, index.fqn)) is None:
        raise PlanError(f"{index.fqn}: this rank holds nothing of it, as it is not in its {tensor.device_mesh}")
    local = _local_tensor(tensor)
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
"""Local and saved number; storage offsets, destination offsets and lengths: a row of `Overlaps`."""


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


# From a state dict to plans


def local_save_plan(state_dict: Mapping[str, Any]) -> SavePlan:
    """What this rank would write of a flat state dict; replicas are dropped by the global plan.

    Raises:
        PlanError: see `write_items_for`.
    """
    return SavePlan([item for fqn, value in state_dict.items() for item in write_items_for(fqn, value)])


def metadata_only_plan(state_dict: Mapping[str, Any]) -> SavePlan:
    """As `local_save_plan`, but with all shards of a ShardedTensor, which knows those of other ranks."""
    return SavePlan(
        [
            item
            for fqn, value in state_dict.items()
            for item in (
                _shard_items(fqn, value, value.metadata().shards_metadata)
                if isinstance(value, ShardedTensor)
                else write_items_for(fqn, value)
            )
        ]
    )


def local_metadata(state_dict: Mapping[str, Any]) -> Metadata:
    """The Metadata of a checkpoint of this state dict alone, as `metadata_only_plan` plans it."""
    return global_save_plan([metadata_only_plan(state_dict)])[1]


def global_save_plan(
    all_plans: Sequence[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """The plans of all ranks, without replicas, as the checkpoint's Metadata.

    Args:
        all_plans: one for each rank, in order.
        rewrite_index_hints: the plans that are returned say in each tensor item's index which of the Metadata's
            chunks it is.

    Raises:
        PlanError: a TENSOR or BYTE_IO item of a key that another item has; a key with two dtypes or two sizes, which
            torch takes as the first one says; a tensor item without a chunk.
    """
    entries: dict[str, STORAGE_TYPES] = {}
    plans = []
    for plan in all_plans:
        items = []
        for item in plan.items:
            number = _entered(item, entries)
            if rewrite_index_hints and number is not None:
                index = MetadataIndex(item.index.fqn, item.index.offset, number)
                item = WriteItem(index, item.type, item.bytes_io_data, item.tensor_data)
            items.append(item)
        plans.append(SavePlan(items, plan.storage_data, plan.planner_data, plan.usable))
    return plans, Metadata(entries)


def _entered(item: WriteItem, entries: dict[str, STORAGE_TYPES]) -> int | None:
    """Add an item to the entries; the number of its chunk, None of an object."""
    fqn, data = item.index.fqn, item.tensor_data
    entry = entries.get(fqn)
    if entry is not None and (item.type is not WriteItemType.SHARD or isinstance(entry, BytesStorageMetadata)):
        raise PlanError(f"{fqn}: planned twice, the second time as {item.type.name}; replicas are to be dropped first")
    if item.type is WriteItemType.BYTE_IO:
        entries[fqn] = BytesStorageMetadata()
        return None
    if data is None or data.chunk is None:
        raise PlanError(f"{fqn}: a {item.type.name} item without a chunk")
    if entry is None:
        entry = entries[fqn] = TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[])
    assert isinstance(entry, TensorStorageMetadata)
    if entry.size != data.size or entry.properties.dtype != data.properties.dtype:
        raise PlanError(
            f"{fqn}: {entry.properties.dtype} of {tuple(entry.size)} in one shard, {data.properties.dtype} of "
            f"{tuple(data.size)} in another"
        )
    entry.chunks.append(data.chunk)
    return len(entry.chunks) - 1


def local_load_plan(state_dict: Mapping[str, Any], metadata: Metadata, strict: bool = True) -> LoadPlan:
    """What this rank reads to fill a flat state dict.

    Args:
        state_dict: what to fill, by the checkpoint's own names.
        metadata: the checkpoint's.
        strict: False: keys that the checkpoint does not have are left out.

    Raises:
        MissingKeyError: the checkpoint lacks keys. All of them are named, the first ten with the closest names that
            the checkpoint has; so is whatever else does not fit.
        PlanError: tensors of another size than the saved ones, or no tensors where tensors were saved: all of them are
            named.
    """
    saved = metadata.state_dict_metadata
    items: list[ReadItem] = []
    missing: list[str] = []
    misfits: list[str] = []
    for fqn, value in state_dict.items():
        entry = saved.get(fqn)
        if entry is None:
            missing.append(fqn)
        elif (misfit := _misfit(entry, value)) is not None:
            misfits.append(f"{fqn}: {misfit}")
        else:
            items.extend(read_items_for(fqn, entry, value))
    if strict and missing:
        raise MissingKeyError("; ".join([missing_keys_text(missing, saved, state_dict), *misfits]))
    if misfits:
        raise PlanError("; ".join(misfits))
    return LoadPlan(items)


def _misfit(entry: STORAGE_TYPES, value: Any) -> str | None:
    """Why a value cannot take a checkpoint's entry, or None."""
    if isinstance(entry, BytesStorageMetadata):
        return None
    if not _has_chunks(value):
        return f"a tensor in the checkpoint, a {type(value).__qualname__} in the state dict"
    size = value.size() if callable(getattr(value, "size", None)) else entry.size
    if size != entry.size:
        return f"size {tuple(entry.size)} in the checkpoint, {tuple(size)} in the state dict"
    return None


def global_load_plan(all_plans: Sequence[LoadPlan]) -> list[LoadPlan]:
    """The plans as they are: each rank's load needs nothing of the others."""
    return list(all_plans)


def plans_equal(plan: SavePlan, other: SavePlan) -> bool:
    """Whether two plans write the same, so that one may stand for the other in a cache.

    Everything that the checkpoint says of an item counts: torch's comparison leaves out dtype and properties, and the
    mappings in ``planner_data``. ``storage_data`` does not count: it is the writer's, and new with every save.
    """
    return (
        plan.usable == other.usable
        and len(plan.items) == len(other.items)
        # The hint apart: a MetadataIndex leaves it out of its own comparison.
        and all(a == b and a.index.index == b.index.index for a, b in zip(plan.items, other.items, strict=True))
        and bool(plan.planner_data == other.planner_data)
    )


def merge_delta_plans(cached: Sequence[SavePlan], deltas: Sequence[SavePlan]) -> list[SavePlan]:
    """The plans of all ranks, where a rank whose plan is not ``usable`` keeps its cached one.

    Raises:
        PlanError: another number of ranks than what is cached.
    """
    if len(cached) != len(deltas):
        raise PlanError(f"plans of {len(deltas)} ranks, and cached ones of {len(cached)}")
    return [delta if delta.usable else old for old, delta in zip(cached, deltas, strict=True)]


# Names that come close

_NAMES_SEARCHED = 20_000
_NAMES_COMPARED = 100
_KEYS_EXPLAINED = 10


def closest_names(fqn: str, names: Iterable[str]) -> list[str]:
    """Up to three names that look most like ``fqn``, best first; maybe none.

    At most 20,000 names are looked at, by the triples of characters they share with ``fqn``, and the best 100 of those
    by difflib: milliseconds, however many there are.
    """
    triples = {fqn[i : i + 3] for i in range(max(len(fqn) - 2, 1))}
    likely = heapq.nlargest(
        _NAMES_COMPARED,
        itertools.islice(names, _NAMES_SEARCHED),
        key=lambda name: (sum(triple in name for triple in triples), -abs(len(name) - len(fqn))),
    )
    return difflib.get_close_matches(fqn, likely)


def missing_keys_text(missing: Sequence[str], saved: Iterable[str], wanted: Mapping[str, Any]) -> str:
    """What is missing from the names ``saved``, all of it, the first ten with the closest names there are."""
    # A name that the state dict has as well is no misspelling of another key.
    unclaimed = list(itertools.islice((name for name in saved if name not in wanted), _NAMES_SEARCHED))
    named = []
    for number, fqn in enumerate(missing):
        closest = closest_names(fqn, unclaimed) if number < _KEYS_EXPLAINED else []
        named.append(f"{fqn!r} (it has {', '.join(map(repr, closest))})" if closest else repr(fqn))
    return f"the checkpoint has no {', '.join(named)}"


# Walking over state dicts


def iterate_state_dict(
    state_dict: _T,
    *,
    dtensor: Callable[[DTensor], Any],
    sharded_tensor: Callable[[ShardedTensor], Any],
    tensor: Callable[[torch.Tensor], Any],
) -> _T:
    """Replace every tensor, by its kind, with what a function makes of it: in place in dicts and lists.

    A tuple with a replaced value in it is replaced by a new one of its type. Everything else stays as it is; torch
    replaces values of types that it does not know by None.

    Returns:
        ``state_dict`` itself; of a tensor or a tuple, what stands in for it.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, DTensor):
            return dtensor(value)
        if isinstance(value, ShardedTensor):
            return sharded_tensor(value)
        if isinstance(value, torch.Tensor):
            return tensor(value)
        if isinstance(value, dict | list):
            for key, old in value.items() if isinstance(value, dict) else enumerate(value):
                if (new := visit(old)) is not old:
                    value[key] = new
        elif isinstance(value, tuple):
            parts = [visit(part) for part in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    visited: _T = visit(state_dict)
    return visited


def init_state_dict(state_dict: Any, device: torch.device | str | None = None) -> None:
    """Give every meta tensor of a state dict uninitialised memory, in place. A tensor under two names stays one.

    Args:
        state_dict: nested dicts, lists and tuples.
        device: where; by default, what `materialized` chooses.

    Raises:
        PlanError: a ShardedTensor is on the meta device.
    """
    # By identity; each with the tensor that it replaces, so that no other one gets its id.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def give_memory(value: torch.Tensor) -> torch.Tensor:
        if value.device.type != "meta":
            return value
        if id(value) not in made:
            made[id(value)] = value, materialized(value, device)
        return made[id(value)][1]

    def refuse_meta(value: ShardedTensor) -> ShardedTensor:
        if getattr(value, "device", None) == torch.device("meta"):
            raise PlanError("a ShardedTensor on the meta device cannot be given memory: use a DTensor")
        return value

    iterate_state_dict(state_dict, dtensor=give_memory, sharded_tensor=refuse_meta, tensor=give_memory)


def materialized(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """A tensor like this one, sizes, strides, dtype and placements, with uninitialised memory; no Parameter.

    Args:
        tensor: on any device, meta as a rule; of a DTensor, this rank's part is made, evenly sharded or not.
        device: where. By default, a DTensor goes to its mesh's kind of device, and a plain tensor to the process
            group's, the CPU where it has several or there is none; of a kind with several, to the current one.
    """
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device or _current(_group_device_type()))
    local = torch.empty_like(_local_tensor(tensor), device=device or _current(tensor.device_mesh.device_type))
    return DTensor.from_local(
        local,
        device_mesh=tensor.device_mesh,
        placements=tensor.placements,
        run_check=False,
        # Uneven shards: the whole cannot be told from one of them.
        shape=tensor.size(),
        stride=tensor.stride(),
    )


def _current(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def _group_device_type() -> str:
    if not (dist.is_available() and dist.is_initialized()):
        return "cpu"
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return "cpu" if "cpu" in kinds else kinds[0]
