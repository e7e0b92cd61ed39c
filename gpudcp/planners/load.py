"""The default load planner: torch's contract, in columns where the checkpoint's metadata is."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from gpudcp._dcp import flatten_as_torch_2_3, set_element
from gpudcp.arrays import NONE, Path
from gpudcp.columns import SHARD, CheckpointColumns
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.formats.objects import load_object
from gpudcp.items import ReadItems, StayingItems
from gpudcp.planners.closest import missing_keys_text
from gpudcp.planners.local import LocalItems, LocalItemsMaker, flattened, has_items
from gpudcp.planners.matching import Match
from gpudcp.planners.overrides import are_untouched
from gpudcp.planners.plans import local_load_plan
from gpudcp.planners.state_dicts import init_state_dict
from gpudcp.planners.values import chunk_list, find_shard
from gpudcp.views import ColumnMetadata

OnDtypeMismatch = Literal["cast", "warn", "error"]


class DefaultLoadPlanner(LoadPlanner):
    """What torch's DefaultLoadPlanner does; objects are loaded without running the code that their pickles name.

    `lookup_tensor` and `transform_tensor` are the extension points, as in torch.

    Args:
        flatten_state_dict: the checkpoint's keys are paths of nested dicts and lists, joined by dots.
        flatten_sharded_tensors: undo FSDP's nesting of ShardedTensors.
        allow_partial_load: leave what the checkpoint does not have as it is, instead of raising.
        on_dtype_mismatch: what happens to a tensor of another dtype than the saved one: ``cast`` casts as it reads, as
            torch does; ``warn`` says so, once for all; ``error`` raises.
        trust_pickle: load objects with Python's own pickle, as torch's planner does: it runs whatever code they name.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        on_dtype_mismatch: OnDtypeMismatch = "cast",
        trust_pickle: bool = False,
    ) -> None:
        if on_dtype_mismatch not in ("cast", "warn", "error"):
            raise PlanError(f"on_dtype_mismatch={on_dtype_mismatch!r}: must be 'cast', 'warn' or 'error'")
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.allow_partial_load = allow_partial_load
        self.on_dtype_mismatch = on_dtype_mismatch
        self.trust_pickle = trust_pickle
        self.original_state_dict: dict[str, Any] = {}
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Path] = {}
        self.metadata: Metadata | None = None
        self.is_coordinator = False
        self._maker = _DestinationsMaker(None)
        self._local: LocalItems | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take what is to be loaded into; meta tensors get memory."""
        init_state_dict(state_dict)
        self.original_state_dict = state_dict
        self.state_dict, self.mappings = flattened(
            state_dict, nested=self.flatten_state_dict, sharded_tensors=self.flatten_sharded_tensors
        )
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        self._local = None

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads.

        Raises:
            MissingKeyError: the checkpoint lacks keys, and ``allow_partial_load`` is False; it names all of them.
            PlanError: tensors have another size in the checkpoint, or are objects there; it names all of them.
        """
        if self.metadata is None:
            raise PlanError("the planner has not been set up with a checkpoint's metadata")
        saved = self.metadata.state_dict_metadata
        if self.flatten_state_dict and any(fqn not in self.state_dict for fqn in saved):
            # Checkpoints of torch 2.3 and before keep dicts without tensors whole.
            flat, paths = flatten_as_torch_2_3(self.original_state_dict)
            if any(fqn in saved and fqn not in self.state_dict for fqn in flat):
                self.state_dict, self.mappings = flat, paths
        # Nobody looks at them again but the reader.
        stay_on_rank = are_untouched(self, ("create_global_plan", "finish_plan"), DefaultLoadPlanner)
        if isinstance(self.metadata, ColumnMetadata) and self.metadata.is_unchanged:
            items = self._read_items(self.metadata.columns)
            items.stay_on_rank = stay_on_rank
            return LoadPlan(items)  # type: ignore[arg-type]
        plan = local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)
        if self.on_dtype_mismatch != "cast":
            self._check_dtypes(
                {
                    fqn: (entry.properties.dtype, value.dtype)
                    for fqn, value in self.state_dict.items()
                    if isinstance(value, torch.Tensor) and isinstance(entry := saved.get(fqn), TensorStorageMetadata)
                }
            )
        return dataclasses.replace(plan, items=StayingItems(plan.items)) if stay_on_rank else plan

    def _read_items(self, checkpoint: CheckpointColumns) -> ReadItems:
        wanted = self.state_dict
        missing = [fqn for fqn in wanted if fqn not in checkpoint.numbers]
        if missing:
            wanted = {fqn: value for fqn, value in wanted.items() if fqn in checkpoint.numbers}
        self._local = self._maker.make(wanted, None)
        match = Match(checkpoint, self._local.columns)
        misfits = match.misfits(wanted)
        if missing and not self.allow_partial_load:
            lacking = missing_keys_text(missing, checkpoint.names.fqns, self.state_dict)
            raise MissingKeyError("; ".join([lacking, *misfits]))
        if misfits:
            raise PlanError("; ".join(misfits))
        if self.on_dtype_mismatch != "cast":
            self._check_dtypes(match.dtypes())
        return match.read_items()

    def _check_dtypes(self, found: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
        differing = [f"{fqn}: {saved} saved, {own} wanted" for fqn, (saved, own) in found.items() if saved != own]
        if not differing:
            return
        rest = f"; and {len(differing) - 10} more" * (len(differing) > 10)
        message = f"{len(differing)} tensors have another dtype than was saved: {'; '.join(differing[:10])}{rest}"
        if self.on_dtype_mismatch == "error":
            raise PlanError(message)
        warnings.warn(message, UserWarning, stacklevel=2)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are: a load needs nothing of the other ranks."""
        return global_plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object in its place.

        Raises:
            UnsafeCheckpointError: it names a type that is not known to be harmless.
            CorruptCheckpointError: its bytes are no torch.save file.
        """
        fqn = read_item.dest_index.fqn
        loaded = load_object(value, fqn=fqn, trust_pickle=self.trust_pickle)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            # torch's planner has it in the copy alone that flattening sharded tensors makes: the caller never sees it.
            self.original_state_dict[fqn] = self.state_dict[fqn] = loaded

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The box of a tensor that a read item fills."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def resolve_tensors(self, items: ReadItems) -> list[torch.Tensor | None]:
        """`resolve_tensor` of all items at once, for storage that knows columns; None for objects."""
        local = self._local
        if local is None or not local.is_of(self.state_dict):
            return [None if items.ndims[row] == NONE else self.resolve_tensor(item) for row, item in enumerate(items)]
        tensors = [local.tensors.get(items.fqns[name]) for name in items.name_ids.tolist()]
        lengths, ndims = items.boxes[:, 2].tolist(), items.ndims.tolist()
        for row, (tensor, length, ndim) in enumerate(zip(tensors, lengths, ndims, strict=True)):
            if ndim == NONE:
                tensors[row] = None
            elif tensor is None or tensor.shape != tuple(length[:ndim]):
                tensors[row] = self.resolve_tensor(items[row])
        return tensors

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Every byte of the item is there. Nothing to do: it was read into its place."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor, or the shard of it, that a read item fills."""
        if index.fqn not in self.state_dict:
            raise PlanError(f"{index.fqn}: the state dict has no such key")
        value = self.state_dict[index.fqn]
        if self._local is not None and (tensor := self._local.tensor_of(index.fqn, value)) is not None:
            return tensor
        return find_shard(value, index)  # type: ignore[no-any-return]

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """The box of it that the read item fills."""
        if tensor.shape == read_item.lengths:
            return tensor
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return tensor[tuple(slice(offset, offset + length) for offset, length in box)]


class EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Rebuilds the state dict from the checkpoint alone, in an empty dict: plain CPU tensors, and objects.

    Args:
        keys: only these, or this one, and all that lies below them, by the checkpoint's names or their beginnings
            (``"model"``). None: everything.
        flatten_state_dict, flatten_sharded_tensors, allow_partial_load, on_dtype_mismatch, trust_pickle: as for
            `DefaultLoadPlanner`.
    """

    def __init__(self, keys: Collection[str] | str | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys = None if keys is None else frozenset({keys} if isinstance(keys, str) else keys)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Fill ``state_dict``, which must be empty, with tensors to read into.

        Raises:
            PlanError: it is not empty.
            MissingKeyError: the checkpoint has nothing of one of the keys.
        """
        if state_dict:
            raise PlanError(f"the state dict is to be rebuilt, and must be empty; it has {len(state_dict)} keys")
        if metadata is None:
            raise PlanError("a state dict cannot be rebuilt without the checkpoint's metadata")
        paths = metadata.planner_data or {}
        found: set[str] = set()
        for fqn, entry in metadata.state_dict_metadata.items():
            path = paths.get(fqn, (fqn,))
            if self.keys is not None:
                beginnings = {fqn, *(".".join(map(str, path[:end])) for end in range(1, len(path) + 1))}
                if not (hit := self.keys & beginnings):
                    continue
                found |= hit
            value: Any = entry
            if isinstance(entry, TensorStorageMetadata):
                value = torch.empty(entry.size, dtype=entry.properties.dtype)
            if fqn in paths:
                set_element(state_dict, path, value)
            else:
                state_dict[fqn] = value
        if self.keys is not None and (missing := sorted(self.keys - found)):
            raise MissingKeyError(missing_keys_text(missing, metadata.state_dict_metadata, {}))
        super().set_up_planner(state_dict, metadata, is_coordinator)


class _DestinationsMaker(LocalItemsMaker):
    """The chunks that a rank has of each value, to read into."""

    def _others(self, fqn: str, value: Any) -> list[tuple[str, int]]:
        if not has_items(value):
            return super()._others(fqn, value)
        properties, size = TensorProperties(dtype=value.dtype), value.size()
        return [
            (fqn, self._table.number(SHARD, properties, size, chunk.offsets, chunk.sizes))
            for chunk in chunk_list(value, fqn=fqn)
        ]

    def _check_dtype(self, fqn: str, dtype: torch.dtype) -> None:
        """Any dtype can be read into that torch can copy to."""
