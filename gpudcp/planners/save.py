"""The default save planner: torch's contract, in columns from the local plan to the metadata."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from gpudcp_kernels.casts import in_range_of
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from gpudcp.arrays import Path
from gpudcp.columns import OBJECT, CheckpointColumns, SaveColumns
from gpudcp.errors import PlanError
from gpudcp.formats.objects import DumpedObject
from gpudcp.items import WriteItems
from gpudcp.planners.caching import PlanCache
from gpudcp.planners.casts import CastRule, DtypeRequest
from gpudcp.planners.coordinate import coordinate
from gpudcp.planners.local import LocalItems, LocalItemsMaker, flattened
from gpudcp.planners.overrides import are_untouched
from gpudcp.planners.saveplans import columns_of_plan, with_columns
from gpudcp.planners.values import find_rows
from gpudcp.views import ANNOUNCEMENT, ColumnMetadata, Paths

_logger = logging.getLogger("gpudcp")


class DefaultSavePlanner(SavePlanner):
    """What torch's DefaultSavePlanner does, at the scale of thousands of ranks; sparse and subclass tensors too.

    `lookup_object` and `transform_object` are the extension points, as in torch.

    Args:
        flatten_state_dict: keys of nested dicts and lists become one key each, joined by dots.
        flatten_sharded_tensors: undo FSDP's nesting of ShardedTensors.
        dedup_replicated_tensors: without effect, as in torch: replicas are always written once.
        dedup_save_to_lowest_rank: of replicas, the lowest rank writes its own, whole.
        enable_plan_caching: a plan that has not changed since the last save is not sent again; reuse the planner.
        dtype: the dtype that floating-point tensors have in the checkpoint; see `gpudcp.planners.CastRule.of`.
        split_replicas: a large tensor that several ranks have is cut by rows, and each writes some. It takes for
            granted that replicas are equal, as those of a DTensor are.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
        *,
        dtype: DtypeRequest = None,
        split_replicas: bool = True,
    ) -> None:
        if dedup_replicated_tensors is not None:
            _logger.warning("dedup_replicated_tensors has no effect, as in torch: replicas are always written once")
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self.split_replicas = split_replicas
        self.state_dict: dict[str, Any] = {}
        self.mappings: dict[str, Path] = {}
        self.is_coordinator = False
        self.plan = SavePlan([])
        self.global_plan: list[SavePlan] = []
        self.metadata: Metadata | None = None
        self.casts = None if dtype is None else CastRule.of(dtype)
        self._maker = LocalItemsMaker(self.casts, remembers=enable_plan_caching)
        self._takes_columns = False
        self._local: LocalItems | None = None
        self._cache = PlanCache(is_flattened=flatten_state_dict) if enable_plan_caching else None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take what is to be saved."""
        self.state_dict, self.mappings = flattened(
            state_dict, nested=self.flatten_state_dict, sharded_tensors=self.flatten_sharded_tensors
        )
        self.is_coordinator = is_coordinator
        # Subclasses written before torch 2.3 pass is_coordinator in its place.
        modules = storage_meta.modules if isinstance(storage_meta, StorageMeta) else None
        self._takes_columns = ANNOUNCEMENT in (modules or ())
        self._local = None

    def create_local_plan(self) -> SavePlan:
        """What this rank has.

        Raises:
            PlanError: a value cannot be saved; it names the key.
        """
        self._local = self._maker.make(self.state_dict, self.mappings if self.flatten_state_dict else None)
        columns = self._local.columns
        paths = Paths(columns.names) if self.flatten_state_dict else None
        self.plan = SavePlan(WriteItems(columns), planner_data=paths)  # type: ignore[arg-type]
        if self._cache is not None and (digest := self._cache.begin(columns)) is not None:
            return SavePlan([], planner_data=digest, usable=False)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank writes, and what the checkpoint then holds. On the coordinator alone.

        Raises:
            PlanError: the ranks' chunks overlap, leave their tensor, or do not cover it; it names key and chunks.
        """
        if self._cache is None:
            local = [columns_of_plan(plan, is_flattened=self.flatten_state_dict) for plan in all_plans]
            columns, checkpoint = self._coordinated(local)
            self.global_plan = [with_columns(plan, own) for plan, own in zip(all_plans, columns, strict=True)]
        else:
            self.global_plan, checkpoint = self._cache.coordinated(all_plans, self._coordinated)
        metadata = ColumnMetadata(checkpoint)
        self.metadata = metadata if self._takes_columns else metadata.plain()
        return self.global_plan, self.metadata

    def _coordinated(self, local: Sequence[SaveColumns]) -> tuple[list[SaveColumns], CheckpointColumns]:
        plans, checkpoint = coordinate(
            local,
            split_replicas=self.split_replicas and self._finds_pieces(),
            to_lowest_rank=self.dedup_save_to_lowest_rank,
            is_flattened=self.flatten_state_dict,
        )
        return plans, checkpoint

    def _finds_pieces(self) -> bool:
        """Whether a part of a chunk is found: an override may go by the key alone, and give its first rows for each."""
        return are_untouched(self, ("lookup_object", "resolve_data", "resolve_source"), DefaultSavePlanner)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan that the coordinator made of this rank's."""
        self.plan = new_plan if self._cache is None else self._cache.finish(new_plan)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """What is written of an item: a tensor of its dtype and its chunk's sizes, or the bytes of an object."""
        return self.transform_object(write_item, self._found(write_item))

    def resolve_source(self, write_item: WriteItem) -> torch.Tensor:
        """As `resolve_data`, but of the dtype that the tensor has: for storage that casts as it writes."""
        return self._found(write_item)  # type: ignore[no-any-return]

    def resolve_sources(self, columns: SaveColumns) -> list[torch.Tensor | None]:
        """`resolve_source` of all items at once, for storage that knows columns; None for objects."""
        local = self._local
        if local is None or not local.is_of(self.state_dict):
            return [self._source(item) for item in WriteItems(columns)]
        fqns = columns.names.fqns
        found = [local.tensors.get(fqns[name]) for name in columns.name_ids.tolist()]
        lengths = columns.templates.boxes[:, 2].tolist()
        kinds_and_ndims = columns.templates.heads[:, ::2].tolist()
        shapes = [
            None if kind == OBJECT else tuple(n[:ndim])
            for n, (kind, ndim) in zip(lengths, kinds_and_ndims, strict=True)
        ]
        items = WriteItems(columns)
        for row, (tensor, template) in enumerate(zip(found, columns.template_ids.tolist(), strict=True)):
            shape = shapes[template]
            if shape is not None and (tensor is None or tensor.shape != shape):
                found[row] = self._source(items[row])
        return found

    def _source(self, item: WriteItem) -> torch.Tensor | None:
        return None if item.type == WriteItemType.BYTE_IO else self._found(item)

    def _found(self, item: WriteItem) -> Any:
        """The value of an item, and of a piece its rows alone."""
        value = self.lookup_object(item.index)
        if item.tensor_data is not None and isinstance(value, torch.Tensor) and self._finds_pieces():
            sizes = item.tensor_data.chunk.sizes
            if len(sizes) == value.dim() and len(sizes) and sizes[0] < value.shape[0] and sizes[1:] == value.shape[1:]:
                return value[: sizes[0]]
        return value

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value, or the shard of it, that an index names: of a tensor, what begins at its offset."""
        if index.fqn not in self.state_dict:
            raise PlanError(f"{index.fqn}: the state dict has no such key")
        value = self.state_dict[index.fqn]
        if self._local is not None and (known := self._local.rows_of(value, index)) is not None:
            return known
        return find_rows(value, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """What is written of a value: a tensor of the item's dtype; of an object, the bytes of its dump."""
        if write_item.type != WriteItemType.BYTE_IO:
            data = write_item.tensor_data
            if data is None or not isinstance(object, torch.Tensor) or object.dtype == data.properties.dtype:
                return object
            dtype, tensor = data.properties.dtype, object.detach()
            return (in_range_of(dtype, tensor) if tensor.is_floating_point() else tensor).to(dtype)
        try:
            return DumpedObject(object)
        except MemoryError:
            raise
        # What a value's own pickling raises can be anything.
        except Exception as err:
            raise PlanError(
                f"{write_item.index.fqn}: a {type(object).__qualname__} cannot be pickled: {type(err).__name__}: {err}"
            ) from err
