"""Planners for common wishes, each a small change of a default planner through the calls of DCP's own protocol.

They work under `gpudcp.save` and `gpudcp.load`, and under torch's ``dcp.save`` and ``dcp.load`` with any storage.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem

from gpudcp._dcp import flatten_state_dict, set_element
from gpudcp.errors import PlanError
from gpudcp.planners.load import DefaultLoadPlanner
from gpudcp.planners.save import DefaultSavePlanner
from gpudcp.planners.state_dicts import init_state_dict

Rename: TypeAlias = str | Callable[[str], str]
"""A prefix, or a function from the state dict's fqn to the checkpoint's."""


class RenameSavePlanner(DefaultSavePlanner):
    """Saves under other names than the state dict's.

    Args:
        rename: a prefix for every name; or a callable that is given each flattened fqn (``model.weight``) and returns
            the name in the checkpoint.
        strip: take the prefix away instead, from the names that have it.
        arguments: the default planner's.

    Loaded without a state dict to say otherwise, renamed values are the top level's: ``{"net.weight": ...}``. Only a
    prefix that is put before all names keeps the nesting.
    """

    def __init__(self, rename: Rename, *arguments: Any, strip: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._renaming = _Renaming(rename, strip=strip)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Start a save of the state dict, renamed.

        Raises:
            PlanError: two keys have one name in the checkpoint.
        """
        renamed, _ = self._renaming.apply(state_dict, flatten=self.flatten_state_dict)
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class RenameLoadPlanner(DefaultLoadPlanner):
    """Loads from other names than the state dict's: with the arguments of a `RenameSavePlanner`, what that one saved.

    Args:
        rename: the checkpoint's prefix; or a callable that is given each flattened fqn of the state dict and returns
            the name in the checkpoint.
        strip: the checkpoint's names are the state dict's without the prefix.
        arguments: the default planner's. What it says of missing keys and other sizes is by the checkpoint's names.
    """

    def __init__(self, rename: Rename, *arguments: Any, strip: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._renaming = _Renaming(rename, strip=strip)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Start a load into the state dict.

        Raises:
            PlanError: two keys have one name in the checkpoint.
        """
        renamed, paths = self._renaming.apply(state_dict, flatten=self.flatten_state_dict)
        super().set_up_planner(_WriteThrough(renamed, state_dict, paths), metadata, is_coordinator)


class SaveExtraDataPlanner(DefaultSavePlanner):
    """Saves more top-level entries than the state dict has: the step, a configuration, an RNG state.

    Args:
        extra: the entries; or a callable that returns them, called once for every save on every rank.
        arguments: the default planner's.

    They are ordinary entries, loaded by their names as all others. Of an object, one rank's value is saved.
    """

    def __init__(
        self, extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]], *arguments: Any, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._extra = extra

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Start a save of the state dict and the extra entries.

        Raises:
            PlanError: the state dict has entries of the same names.
        """
        extra = self._extra() if callable(self._extra) else self._extra
        if both := [key for key in extra if key in state_dict]:
            raise PlanError(f"extra entries that the state dict has already: {', '.join(map(repr, both))}")
        super().set_up_planner({**state_dict, **extra}, storage_meta, is_coordinator)


class DDPLoadBalancingPlanner(DefaultSavePlanner):
    """Shares out what several ranks hold alike, whole tensors, so that they write about as many bytes.

    The largest first, each to the rank that has least to write so far (Graham's LPT rule: at most 4/3 of the best
    there is, where all ranks hold all tensors). Sharded tensors stay where they are, and count. An object goes to the
    lowest rank that has it. The default planner balances more finely, by cutting tensors; this one keeps every
    tensor in one piece.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if keywords.get("enable_plan_caching") or arguments[4:5] == (True,):
            # The cache knows a rank's plan by what the rank sent, and the global plan here is made of other ones.
            raise PlanError(
                "DDPLoadBalancingPlanner changes all plans at every save: enable_plan_caching=True cannot be"
            )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Drop all replicas but one, then plan as the default planner does."""
        return super().create_global_plan(_balanced(all_plans))


class FP16Planner(DefaultSavePlanner):
    """Saves floating-point tensors as float16; values beyond its range become infinite. Arguments: the default's."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords, dtype=torch.float16)


class MetaModelMaterialize(DefaultLoadPlanner):
    """Loads into meta tensors, by giving them memory first; and into modules that were made on the meta device.

        with torch.device("meta"):
            model = Model()
        state_dict = {"model": model.state_dict()}
        gpudcp.load(state_dict, path, planner=MetaModelMaterialize("cuda", modules={"model": model}))

    Args:
        device: where the memory is.
        arguments: the default planner's.
        modules: what the state dict's entries are state dicts of; or the one module that the whole of it is. Once the
            plan stands, and before the first byte is read, their meta parameters and buffers are replaced by the
            tensors that are loaded; tied parameters stay tied. With ``allow_partial_load``, what the checkpoint does
            not have stays on the meta device. A load that fails later leaves memory without values.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *arguments: Any,
        modules: torch.nn.Module | Mapping[str, torch.nn.Module] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._device = torch.device(device)
        self._modules = {None: modules} if isinstance(modules, torch.nn.Module) else {**(modules or {})}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Give every meta tensor of the state dict memory, and start a load into it.

        Raises:
            PlanError: the state dict has no entry for one of the modules.
        """
        for key in self._modules:
            if key is not None and not isinstance(state_dict.get(key), dict):
                raise PlanError(
                    f"modules={{{key!r}: ...}}: the state dict has no state dict of a module under this key"
                )
        for key, module in self._modules.items():
            _tie(state_dict if key is None else state_dict[key], module)
        init_state_dict(state_dict, self._device)
        self._given = state_dict
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        """The default plan."""
        plan = super().create_local_plan()
        self._read = {item.dest_index.fqn for item in plan.items} if self._modules else set()
        return plan

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Give the modules their tensors: from here on, reading cannot fail for reasons of planning."""
        for key, module in self._modules.items():
            own = self._given if key is None else self._given[key]
            prefix = "" if key is None else f"{key}."
            _assign(module, own, {name for name in own if f"{prefix}{name}" in self._read})
        return super().finish_plan(new_plan)


# Renaming

_Paths: TypeAlias = dict[str, tuple[str | int, ...]]


class _Renaming:
    """A checked ``rename`` and ``strip``."""

    def __init__(self, rename: Rename, *, strip: bool) -> None:
        if not (isinstance(rename, str) or callable(rename)):
            raise PlanError(f"rename={rename!r}: a prefix or a callable is needed")
        if strip and not isinstance(rename, str):
            raise PlanError("strip=True goes with a prefix, not with a callable")
        self._rename = rename
        self._strip = strip

    def apply(self, state_dict: dict[str, Any], *, flatten: bool) -> tuple[dict[str, Any], _Paths]:
        """The state dict under its new names, and by new name the path of each value in the old one."""
        paths: _Paths
        # A prefix of the top level's keys is one of all fqns, and keeps what is below as it is.
        if flatten and (self._strip or not isinstance(self._rename, str)):
            values, paths = flatten_state_dict(state_dict)
        else:
            values, paths = state_dict, {key: (key,) for key in state_dict}
        renamed: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for fqn, value in values.items():
            name = self._name(fqn)
            if name in sources:
                raise PlanError(f"{sources[name]!r} and {fqn!r} would both have the name {name!r} in the checkpoint")
            sources[name] = fqn
            renamed[name] = value
        return renamed, {name: paths[fqn] for name, fqn in sources.items()}

    def _name(self, fqn: str) -> str:
        if isinstance(self._rename, str):
            return fqn.removeprefix(self._rename) if self._strip else f"{self._rename}{fqn}"
        name: object = self._rename(fqn)
        if not isinstance(name, str):
            raise PlanError(f"{fqn!r} was renamed to {name!r}, which is no str")
        return name


class _WriteThrough(dict[str, Any]):
    """A renamed state dict; what is put in it goes to its place in the original one too."""

    def __init__(self, renamed: dict[str, Any], original: dict[Any, Any], paths: _Paths) -> None:
        super().__init__(renamed)
        self._original = original
        self._paths = paths

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        path = self._paths[key]
        if len(path) == 1:  # any key; set_element takes an int for the place in a list
            self._original[path[0]] = value
        else:
            set_element(self._original, path, value)


# Balancing


def _balanced(plans: list[SavePlan]) -> list[SavePlan]:
    """The plans with every item in one of them alone; items keep their order."""
    holders: dict[MetadataIndex, list[int]] = {}
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(item.index, []).append(rank)
            items.setdefault(item.index, item)
    nbytes = [0] * len(plans)
    writers: dict[MetadataIndex, int] = {}
    # What only one rank has comes first, as nothing is to be decided there; a stable sort, so equal on every rank.
    for index in sorted(items, key=lambda index: (len(holders[index]) > 1, -_nbytes(items[index]))):
        ranks = holders[index]
        writer = ranks[0] if items[index].tensor_data is None else min(ranks, key=nbytes.__getitem__)
        writers[index] = writer
        nbytes[writer] += _nbytes(items[index])
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writers[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    # The chunk, not `tensor_storage_size`: that is the size of the whole tensor.
    return 0 if data is None else prod(data.chunk.sizes) * data.properties.dtype.itemsize


# Modules on the meta device


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tie(own: dict[str, Any], module: torch.nn.Module) -> None:
    """Make the state dict's meta tensors one where the module's are: ``state_dict()`` detaches each by itself."""
    firsts: dict[int, Any] = {}
    for name, tensor in _tensors_of(module):
        if tensor.is_meta and isinstance(own.get(name), torch.Tensor):
            own[name] = firsts.setdefault(id(tensor), own[name])


def _assign(module: torch.nn.Module, own: dict[str, Any], names: set[str]) -> None:
    """Replace the module's meta parameters and buffers of these names by what its state dict has of them."""
    # Without the values, but with the versions of modules that ride on a state dict. A deep copy of those: assign=True
    # leaves a mark in them, by which the driver's own load_state_dict would assign too, and untie what is tied.
    new = copy.copy(own)
    new.clear()
    new = copy.deepcopy(new)
    # By the tensor that is replaced: tied ones get one Parameter, where load_state_dict would make one for each name.
    made: dict[int, torch.Tensor] = {}
    for name, tensor in _tensors_of(module):
        if tensor.is_meta and name in names:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            value = own[name]
            made[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    new.update((name, made[id(tensor)]) for name, tensor in _tensors_of(module) if id(tensor) in made)
    module.load_state_dict(new, strict=False, assign=True)
