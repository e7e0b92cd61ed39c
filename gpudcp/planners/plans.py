"""From state dicts to plans, and from the plans of all ranks to the checkpoint's metadata.

Pure functions over torch's own types, one object for each item: what a planner of one's own is built from. The default
planners do the same in columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)

from gpudcp._dcp import ShardedTensor
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.planners.closest import missing_keys_text
from gpudcp.planners.values import has_chunks, read_items_for, shard_items, write_items_for


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
                shard_items(fqn, value, value.metadata().shards_metadata)
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
    if not has_chunks(value):
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
