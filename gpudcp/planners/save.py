"""The default save planner: torch's contract, in columns from the local plan to the metadata."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import find_state_dict_object

from gpudcp.arrays import Path
from gpudcp.columns import OBJECT, CheckpointColumns, SaveColumns
from gpudcp.errors import PlanError
from gpudcp.formats.objects import DumpedObject
from gpudcp.items import WriteItems, columns_of
from gpudcp.names import Names
from gpudcp.planners.casts import CastRule, DtypeRequest
from gpudcp.planners.coordinate import coordinate
from gpudcp.planners.local import LocalItems, LocalItemsMaker, flattened
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
        self._maker = LocalItemsMaker(self.casts)
        self._takes_columns = False
        self._local: LocalItems | None = None
        self._cache = _PlanCache() if enable_plan_caching else None

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
            local = [_columns_of_plan(plan) for plan in all_plans]
            columns, checkpoint = self._coordinated(local)
            self.global_plan = [_replaced(plan, own) for plan, own in zip(all_plans, columns, strict=True)]
        else:
            self.global_plan, checkpoint = self._cache.coordinated(all_plans, self._coordinated)
        metadata = ColumnMetadata(checkpoint)
        self.metadata = metadata if self._takes_columns else metadata.plain()
        return self.global_plan, self.metadata

    def _coordinated(self, local: list[SaveColumns]) -> tuple[list[SaveColumns], CheckpointColumns]:
        # An override may find a tensor by its key alone, and would then write its first rows for every piece.
        finds_pieces = type(self).lookup_object is DefaultSavePlanner.lookup_object
        plans, checkpoint = coordinate(
            local,
            split_replicas=self.split_replicas and finds_pieces,
            to_lowest_rank=self.dedup_save_to_lowest_rank,
            is_flattened=self.flatten_state_dict,
        )
        return plans, checkpoint

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
        if local is None:
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
        if item.tensor_data is not None and isinstance(value, torch.Tensor):
            sizes = item.tensor_data.chunk.sizes
            if len(sizes) == value.dim() and len(sizes) and sizes[0] < value.shape[0] and sizes[1:] == value.shape[1:]:
                return value[: sizes[0]]
        return value

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value, or the shard of it, that an index names: of a tensor, what begins at its offset."""
        local = self._local
        tensor = None if local is None else local.tensors.get(index.fqn)
        if local is None or tensor is None:
            return find_state_dict_object(self.state_dict, index)
        start = local.offsets[index.fqn]
        offset = start if index.offset is None else tuple(index.offset)
        if offset == start:
            return tensor
        first_row = offset[0] - start[0] if len(offset) == len(start) and offset[1:] == start[1:] else -1
        if not 0 <= first_row <= tensor.shape[0]:
            raise PlanError(
                f"{index.fqn}: this rank has a chunk of {tuple(tensor.shape)} at {start}, and none at {offset}"
            )
        return tensor[first_row:]

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """What is written of a value: a tensor of the item's dtype; of an object, the bytes of its dump."""
        if write_item.type != WriteItemType.BYTE_IO:
            data = write_item.tensor_data
            if data is None or not isinstance(object, torch.Tensor) or object.dtype == data.properties.dtype:
                return object
            return object.detach().to(data.properties.dtype)
        try:
            return DumpedObject(object)
        except MemoryError:
            raise
        # What a value's own pickling raises can be anything.
        except Exception as err:
            raise PlanError(
                f"{write_item.index.fqn}: a {type(object).__qualname__} cannot be pickled: {type(err).__name__}: {err}"
            ) from err


def _columns_of_plan(plan: SavePlan) -> SaveColumns:
    """The columns of a rank's plan, which it, or its storage, may have changed.

    Raises:
        PlanError: ``planner_data`` is a mapping, but not one of keys to paths.
    """
    paths = plan.planner_data if isinstance(plan.planner_data, Mapping) else None
    columns = columns_of(plan.items, paths)
    is_own = isinstance(paths, Paths) and paths.is_unchanged and paths.names is columns.names
    if paths is None or is_own:
        return columns
    for fqn, path in paths.items():
        if not (isinstance(fqn, str) and isinstance(path, tuple) and all(type(part) in (str, int) for part in path)):
            raise PlanError(f"planner_data: {fqn!r}: {path!r} is no path in a state dict, a tuple of str and int")
    if paths == columns.names.paths:
        return columns
    return dataclasses.replace(columns, names=Names(columns.names.fqns, dict(paths)))


def _replaced(plan: SavePlan, columns: SaveColumns) -> SavePlan:
    return dataclasses.replace(plan, items=WriteItems(columns))  # type: ignore[arg-type]


class _Known(NamedTuple):
    """What the coordinator remembers of one rank."""

    digest: bytes | None
    """Of what the rank's planner made. None: of a plan that was changed after that, so it is not known here."""
    local: SaveColumns
    plan: SavePlan

    def is_said_by(self, plan: SavePlan) -> bool:
        """Whether a rank that sends this plan says that it has not changed."""
        return not plan.usable and self.digest in (None, plan.planner_data)


class _PlanCache:
    """Plans of the last save whose global plan succeeded: each rank's own, and on the coordinator everybody's.

    A rank whose plan has not changed sends its digest, and gets word that its final plan has not changed either. A
    rank whose last save failed on the way forgets, and sends all.
    """

    def __init__(self) -> None:
        self._sent: bytes | None = None
        self._final: SavePlan | None = None
        self._is_open = False
        self._everybody: list[_Known] = []
        self._checkpoint: CheckpointColumns | None = None

    def begin(self, columns: SaveColumns) -> bytes | None:
        """The digest to send instead of an unchanged plan."""
        if self._is_open:  # the last save ended before `finish`
            self._sent = self._final = None
        self._is_open = True
        digest = digest_of(columns)
        if self._final is not None and digest == self._sent:
            return digest
        self._sent, self._final = digest, None
        return None

    def coordinated(self, plans: list[SavePlan], coordinate: Any) -> tuple[list[SavePlan], CheckpointColumns]:
        """The plans to send back: unusable ones stand for "as last time"."""
        known = self._everybody
        is_known = len(known) == len(plans) and all(map(_Known.is_said_by, known, plans))
        if self._checkpoint is not None and is_known:
            return [SavePlan([], usable=False)] * len(plans), self._checkpoint
        local = [self._local_of(rank, plan) for rank, plan in enumerate(plans)]
        columns, checkpoint = coordinate([own for _, own in local])
        made: list[_Known] = []
        sent: list[SavePlan] = []
        for rank, (plan, (digest, own), final) in enumerate(zip(plans, local, columns, strict=True)):
            full = _replaced(plan if plan.usable else known[rank].plan, final)
            is_same = not plan.usable and digest_of(final) == digest_of(_columns_of_plan(known[rank].plan))
            sent.append(SavePlan([], usable=False) if is_same else full)
            made.append(_Known(digest, own, full))
        self._everybody, self._checkpoint = made, checkpoint
        return sent, checkpoint

    def _local_of(self, rank: int, plan: SavePlan) -> tuple[bytes | None, SaveColumns]:
        if plan.usable:
            made = plan.items.columns if isinstance(plan.items, WriteItems) else None
            return None if made is None else digest_of(made), _columns_of_plan(plan)
        own = self._everybody[rank] if rank < len(self._everybody) else None
        if own is None or not own.is_said_by(plan):
            raise PlanError(
                f"rank {rank} says that its plan has not changed, but the coordinator does not know it; "
                "use the same planners for every save, or none of their caching"
            )
        return own.digest, own.local

    def finish(self, plan: SavePlan) -> SavePlan:
        """The final plan, whether it was sent or is the last one's."""
        if not plan.usable:
            if self._final is None:
                raise PlanError("the coordinator says that this rank's plan has not changed, but it has none")
            # What the storage says of this save is new all the same.
            plan = dataclasses.replace(self._final, storage_data=plan.storage_data)
        self._final = plan
        self._is_open = False
        return plan


def digest_of(columns: SaveColumns) -> bytes:
    """16 bytes that no plan with another item has: names, shapes, dtypes, hints and all other properties count."""
    digest = blake2b(columns.names.digest, digest_size=16)
    for column in (columns.name_ids, columns.template_ids, columns.templates.heads, columns.templates.boxes):
        digest.update(repr(column.shape).encode())
        digest.update(column.tobytes())
    digest.update(repr(columns.templates.properties).encode())
    digest.update(b"" if columns.hints is None else columns.hints.tobytes())
    return digest.digest()
