"""A rank's own part of a save plan, in columns: a name and a template for each value, at a few microseconds each."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.tensor import DTensor

from gpudcp._dcp import ShardedTensor, dtensor_parts, flatten_sharded_tensors, flatten_state_dict, local_box
from gpudcp.arrays import Path
from gpudcp.columns import OBJECT, SHARD, TENSOR, SaveColumns, Sizes, TemplateTable
from gpudcp.errors import PlanError
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable
from gpudcp.items import template_number
from gpudcp.names import Names
from gpudcp.planners.casts import CastRule
from gpudcp.planners.facts import PLAIN_TYPES, SIMPLE_TYPES, Facts, facts_of
from gpudcp.planners.values import row_at, write_items_for

_CONTAINERS = (Mapping, list, tuple)
# Neither containers nor ShardedTensors: what most values are is decided by type, once.
_LEAVES = PLAIN_TYPES | SIMPLE_TYPES | {DTensor}


def flattened(
    state_dict: Mapping[str, Any], *, nested: bool, sharded_tensors: bool
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The state dict as a flat one, and the path of each key; torch's rules, and nothing to do for most dicts.

    Args:
        state_dict: values may be nested dicts and lists.
        nested: flatten those.
        sharded_tensors: undo FSDP's nesting of ShardedTensors.
    """
    kinds = set(map(type, state_dict.values())) - _LEAVES
    if set(map(type, state_dict)) <= {str} and not any(issubclass(kind, _CONTAINERS) for kind in kinds):
        flat = dict(state_dict)
        paths: dict[str, Path] = dict(zip(state_dict, zip(state_dict, strict=True), strict=True)) if nested else {}
        if not kinds:
            return flat, paths
    elif nested:
        flat, paths = flatten_state_dict(dict(state_dict))
    else:
        flat, paths = dict(state_dict), {}
    if sharded_tensors and any(isinstance(value, ShardedTensor) for value in flat.values()):
        flat = flatten_sharded_tensors(flat)
    return flat, paths


_FEW = 1000


class LocalItems(NamedTuple):
    """A rank's items, and the memory of those keys that are one tensor."""

    columns: SaveColumns
    tensors: dict[str, torch.Tensor]
    offsets: dict[str, Sizes]
    values: dict[str, Any]
    """What the items were made of: a planner may put other values in their places before they are resolved."""

    def is_of(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether the state dict still has these very values, whatever else it has."""
        if len(state_dict) == len(self.values):
            return all(map(is_, state_dict.values(), self.values.values()))
        return all(state_dict.get(fqn) is value for fqn, value in self.values.items())

    def tensor_of(self, fqn: str, value: Any) -> torch.Tensor | None:
        """The memory of a value; None where it is not one tensor, or not what was planned."""
        tensor = self.tensors.get(fqn)
        return tensor if tensor is not None and self.values[fqn] is value else None

    def rows_of(self, value: Any, index: MetadataIndex) -> torch.Tensor | None:
        """As `tensor_of`, from an offset on.

        Raises:
            PlanError: this rank has no row there.
        """
        if (tensor := self.tensor_of(index.fqn, value)) is None:
            return None
        start = self.offsets[index.fqn]
        if index.offset is None or index.offset == start:
            return tensor
        if (row := row_at(index.offset, start, tensor.shape)) is None:
            raise PlanError(
                f"{index.fqn}: this rank has a chunk of {tuple(tensor.shape)} at {start}, and none at "
                f"{tuple(index.offset)}"
            )
        return tensor[row:]


class _Remembered(NamedTuple):
    """What equal facts make, without the memory, which is the caller's to free."""

    facts: Facts
    columns: SaveColumns
    offsets: dict[str, Sizes]
    tensors: tuple[str, ...]
    """Those keys that are one tensor."""


class LocalItemsMaker:
    """Makes a rank's items; what it has seen once, such as a DTensor's place in its mesh, is not computed again."""

    def __init__(self, casts: CastRule | None, *, remembers: bool = False) -> None:
        """``remembers``: most state dicts are as the one before, and then only what decides the items is looked at."""
        self._casts = casts
        # A rule may be anybody's function of the keys, and is asked every time.
        self._remembers = remembers and casts is None
        self._last: _Remembered | None = None
        self._has_accelerator = False
        self._names = Names((), None)
        self._forget()

    def _forget(self) -> None:
        self._table = TemplateTable()
        self._numbers: dict[Any, tuple[int, Sizes]] = {}
        self._specs: dict[int, tuple[Any, tuple[Sizes, Sizes] | None]] = {}
        self._boxes: dict[Any, tuple[Sizes, Sizes] | None] = {}
        self._meshes: dict[int, Any] = {}

    def make(self, state_dict: Mapping[str, Any], paths: Mapping[str, Path] | None) -> LocalItems:
        """The items of a flat state dict.

        Raises:
            PlanError: a value cannot be saved; it names the key.
        """
        # Without one, nothing is pinned, and each tensor need not be asked.
        self._has_accelerator = torch.accelerator.is_available()
        if not self._remembers or (found := facts_of(state_dict, has_accelerator=self._has_accelerator)) is None:
            return self._made(state_dict, paths)
        facts, tensors = found
        if (last := self._last) is not None and last.facts == facts and last.columns.names.paths == paths:
            own = {fqn: tensors[fqn] for fqn in last.tensors}
            return LocalItems(last.columns, own, last.offsets, dict(state_dict))
        made = self._made(state_dict, paths)
        self._last = _Remembered(facts, made.columns, made.offsets, tuple(made.tensors))
        return made

    def _made(self, state_dict: Mapping[str, Any], paths: Mapping[str, Path] | None) -> LocalItems:
        if max(len(self._table), len(self._specs)) > 4 * len(state_dict) + _FEW:
            self._forget()  # shapes, or meshes, that change with every save
        names: list[str] = []
        name_ids: list[int] = []
        numbers: list[int] = []
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, Sizes] = {}
        for fqn, value in state_dict.items():
            kind = type(value)
            if kind in PLAIN_TYPES and value.layout is torch.strided and not value.is_nested:
                number, start = self._plain(fqn, value)
                tensors[fqn] = value
            elif kind is DTensor and type((parts := dtensor_parts(value))[0]) is torch.Tensor:
                found = self._distributed(fqn, value, *parts)
                if found is None:
                    continue
                number, start = found
                tensors[fqn] = parts[0]
            else:
                own_ids: dict[str, int] = {}
                for own, number in self._others(fqn, value):
                    if own not in own_ids:
                        own_ids[own] = len(names)
                        names.append(own)
                    name_ids.append(own_ids[own])
                    numbers.append(number)
                continue
            offsets[fqn] = start
            name_ids.append(len(names))
            numbers.append(number)
            names.append(fqn)
        if tuple(names) != self._names.fqns or paths != self._names.paths:
            self._names = Names(names, paths)
        columns = SaveColumns(
            names=self._names,
            name_ids=np.array(name_ids, dtype=np.int32),
            template_ids=np.array(numbers, dtype=np.int32),
            templates=self._table.templates(),
        )
        return LocalItems(columns, tensors, offsets, dict(state_dict))

    def _others(self, fqn: str, value: Any) -> list[tuple[str, int]]:
        """Names and templates of what is neither a plain tensor nor a DTensor of one; it may choose the names."""
        if is_whole(value) or not has_items(value):
            return [(fqn, self._table.number(OBJECT, None, (), (), ()))]
        items = write_items_for(fqn, value)
        for item in items:
            if item.tensor_data is not None:
                self._check_dtype(fqn, item.tensor_data.properties.dtype)
                if self._casts is not None and isinstance(value, ShardedTensor):
                    item.tensor_data.properties.dtype = self._casts.dtype_of(fqn, value)
        return [(item.index.fqn, template_number(self._table, item)) for item in items]

    def _plain(self, fqn: str, tensor: torch.Tensor) -> tuple[int, Sizes]:
        dtype = tensor.dtype
        if self._casts is not None:
            dtype = self._casts.dtype_for(fqn, dtype)
        key = (tensor.shape, dtype, tensor.requires_grad, self._has_accelerator and tensor.is_pinned())
        found = self._numbers.get(key)
        if found is None:
            size = tuple(tensor.shape)
            start = (0,) * len(size)
            number = self._table.number(TENSOR, self._properties(fqn, tensor, dtype), size, start, size)
            found = self._numbers[key] = (number, start)
        return found

    def _distributed(self, fqn: str, tensor: DTensor, local: torch.Tensor, spec: Any) -> tuple[int, Sizes] | None:
        known = self._specs.get(id(spec))
        if known is None:
            # The spec is kept, so that no other one gets its id.
            known = self._specs[id(spec)] = (spec, self._box(fqn, tensor))
        if known[1] is None:
            return None
        start, lengths = known[1]
        if local.shape != lengths:
            raise PlanError(
                f"{fqn}: the DTensor's placements make a local shard of {tuple(lengths)}, it has {tuple(local.shape)}"
            )
        dtype = local.dtype
        if self._casts is not None:
            dtype = self._casts.dtype_for(fqn, dtype)
        key = (id(spec), dtype, tensor.requires_grad, self._has_accelerator and local.is_pinned())
        found = self._numbers.get(key)
        if found is None:
            properties = self._properties(fqn, local, dtype)
            properties.requires_grad = tensor.requires_grad
            number = self._table.number(SHARD, properties, tuple(tensor.shape), start, lengths)
            found = self._numbers[key] = (number, start)
        return found

    def _box(self, fqn: str, tensor: DTensor) -> tuple[Sizes, Sizes] | None:
        """Offsets and lengths of the local shard; None: this rank is not of the tensor's mesh."""
        mesh, placements = tensor.device_mesh, tensor.placements
        self._meshes[id(mesh)] = mesh
        key = (id(mesh), placements, tensor.shape)
        if key not in self._boxes:
            if any(placement.is_partial() for placement in placements):
                raise PlanError(f"{fqn}: a DTensor with the placements {placements} holds no values to save yet")
            try:
                self._boxes[key] = local_box(tensor)
            except PlanError as err:
                raise PlanError(f"{fqn}: {err}") from err
        return self._boxes[key]

    def _properties(self, fqn: str, tensor: torch.Tensor, dtype: torch.dtype) -> TensorProperties:
        self._check_dtype(fqn, tensor.dtype)
        properties = TensorProperties.create_from_tensor(tensor)
        properties.dtype = dtype
        return properties

    def _check_dtype(self, fqn: str, dtype: torch.dtype) -> None:
        if not (is_savable(dtype) or dtype in QUANTIZED_DTYPES):
            raise PlanError(f"{fqn}: dtype {dtype} cannot be saved: torch.load reads no such tensor back")


def has_items(value: object) -> bool:
    """Whether a value is a tensor of some kind, or says itself what its items are."""
    return isinstance(value, (torch.Tensor, ShardedTensor)) or hasattr(value, "__create_write_items__")


def is_whole(value: object) -> bool:
    """Whether a value is a tensor that no box of plain memory describes: sparse, nested, or of a subclass.

    DTensor and what else implements torch's `_Checkpointable` describe themselves, and so does ShardedTensor.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, ShardedTensor):
        return False
    if hasattr(value, "__create_write_items__"):
        return False
    if type(value) in PLAIN_TYPES:
        return value.layout != torch.strided or value.is_nested
    return True
