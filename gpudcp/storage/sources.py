"""What a save planner resolves: the literal bytes of a plan's objects, and the tensors of its chunks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner as TorchSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from gpudcp.errors import PlanError, UnsafeCheckpointError
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, widens_exactly
from gpudcp.formats.objects import DumpedObject, unsafe_reason
from gpudcp.items import WriteItems
from gpudcp.options import Options
from gpudcp.planners import DefaultSavePlanner
from gpudcp.planners.overrides import are_untouched


def literal_data(items: Sequence[WriteItem], planner: SavePlanner, options: Options) -> dict[int, bytes]:
    """The bytes, by position, of all items that are not tensor chunks: objects, and quantized tensors.

    Raises:
        PlanError: the planner resolved something else than an io.BytesIO or a tensor.
        UnsafeCheckpointError: an object that no safe load can read, with ``unsafe_objects="error"``.
    """
    literals: dict[int, bytes] = {}
    unsafe: dict[str, tuple[str, str]] = {}
    for position, item in _candidates(items):
        if item.type is WriteItemType.BYTE_IO:
            data = planner.resolve_data(item)
            if not isinstance(data, io.BytesIO):
                raise PlanError(
                    f"{item.index.fqn}: a BYTE_IO item resolved to a {type(data).__name__}, not an io.BytesIO"
                )
            literals[position] = data.getvalue()
            # What another planner dumped is known by its bytes alone, and tried by loading them.
            value = data.value if isinstance(data, DumpedObject) else data
            if (refusal := unsafe_reason(value, literals[position])) is not None:
                unsafe[item.index.fqn] = refusal
        elif item.tensor_data is not None and item.tensor_data.properties.dtype in QUANTIZED_DTYPES:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, torch.Tensor):
                raise PlanError(f"{item.index.fqn}: a tensor item resolved to a {type(tensor).__name__}")
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save writes the whole storage that a view is of
            buffer = io.BytesIO()
            torch.save(tensor, buffer)
            literals[position] = buffer.getvalue()
    if unsafe:
        _report_unsafe(unsafe, options)
    return literals


def _candidates(items: Sequence[WriteItem]) -> Iterable[tuple[int, WriteItem]]:
    """The items that may not be tensor chunks, and their positions."""
    columns = items.columns if isinstance(items, WriteItems) else None
    if columns is None:
        return enumerate(items)
    templates = columns.templates
    is_quantized = np.array([each.dtype in QUANTIZED_DTYPES for each in templates.properties] + [True], dtype=bool)
    # An object has no properties: their number is -1, which is the last of the table.
    positions = np.nonzero(is_quantized[templates.property_ids][columns.template_ids])[0]
    return ((position, items[position]) for position in positions.tolist())


def _report_unsafe(unsafe: dict[str, tuple[str, str]], options: Options) -> None:
    named = "; ".join(f"{fqn}: {refused} ({reason})" for fqn, (refused, reason) in list(unsafe.items())[:10])
    objects = f"{len(unsafe)} object{'s' * (len(unsafe) > 1)}"
    message = (
        f"{objects} in this checkpoint can be loaded only with Options(trust_pickle=True), or after "
        f"torch.serialization.add_safe_globals([...]) of the types named: {named}"
    )
    if options.unsafe_objects == "error":
        raise UnsafeCheckpointError(message, refused=next(iter(unsafe.values()))[0])
    warnings.warn(message, UserWarning, stacklevel=2)


class PlannerSource:
    """The executor's view of a save planner: tensors by position, checked against their items."""

    def __init__(self, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        self._items = items
        self._found = _all_sources(items, planner)
        self._tensors = _usable(self._found)
        resolve_source = _usable_resolve_source(planner)
        self._may_narrow = resolve_source is not None
        self._ask: Callable[[WriteItem], object] = resolve_source or planner.resolve_data
        self.keeps_memory = _resolves_to_the_state_dict(planner)

    def devices(self) -> set[torch.device] | None:
        """Of all tensors, as far as they are known; None: the planner has to be asked for each."""
        return None if self._found is None else {tensor.device for tensor in self._found if tensor is not None}

    def groups(self, devices: Sequence[torch.device]) -> list[int] | None:
        """For each item the number of its tensor's device among these; 0: on none of them, or not known.

        None: there are not two devices to tell apart.
        """
        if len(devices) < 2 or self._found is None:
            return None
        numbers = {device: number for number, device in enumerate(devices)}
        return [0 if tensor is None else numbers.get(tensor.device, 0) for tensor in self._found]

    def resolve(self, position: int) -> torch.Tensor:
        """The tensor of a write item.

        Raises:
            PlanError: it does not have the item's shape or dtype, or no memory of its own.
        """
        if self._tensors is not None and (known := self._tensors[position]) is not None:
            return known
        item = self._items[position]
        tensor = self._ask(item)
        data = item.tensor_data
        if (
            type(tensor) is torch.Tensor
            and data is not None
            and tensor.shape == data.chunk.sizes
            and tensor.dtype is data.properties.dtype
            and tensor.layout is torch.strided
            and not tensor.is_meta
        ):
            return tensor  # nearly always; below, every way in which it can be otherwise
        if not isinstance(tensor, torch.Tensor) or data is None:
            raise PlanError(f"{item.index.fqn}: a tensor item resolved to a {type(tensor).__name__}")
        if tensor.shape != data.chunk.sizes:
            raise PlanError(
                f"{item.index.fqn}: resolved to shape {tuple(tensor.shape)}, its chunk has {tuple(data.chunk.sizes)}"
            )
        dtype = data.properties.dtype
        if not (tensor.dtype == dtype or self._may_narrow or widens_exactly(tensor.dtype, dtype)):
            raise PlanError(
                f"{item.index.fqn}: resolved to {tensor.dtype}; its item says {dtype}, which cannot hold its values"
            )
        return _with_memory(tensor, item.index.fqn)


def _all_sources(items: Sequence[WriteItem], planner: SavePlanner) -> list[torch.Tensor | None] | None:
    """What our own planner resolves all items to, None for objects; no list: another one is asked when it is time."""
    columns = items.columns if isinstance(items, WriteItems) else None
    names = ("resolve_data", "resolve_source", "lookup_object", "transform_object")
    if columns is None or not isinstance(planner, DefaultSavePlanner):
        return None
    if not are_untouched(planner, names, DefaultSavePlanner):
        return None
    return planner.resolve_sources(columns)


def _usable(found: list[torch.Tensor | None] | None) -> list[torch.Tensor | None] | None:
    """Those that are taken as they are; None for those that are asked for, and checked, one by one."""
    if found is None:
        return None
    return [
        tensor if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta else None
        for tensor in found
    ]


def _with_memory(tensor: torch.Tensor, fqn: str) -> torch.Tensor:
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
        if not tensor.is_meta and tensor.layout is torch.strided:
            return tensor
        raise PlanError(f"{fqn}: a {tensor.layout} tensor on {tensor.device} has no strided memory to save")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise PlanError(
            f"{fqn}: a {type(tensor).__name__} wraps other tensors and has no memory of its own; "
            "gpudcp.DefaultSavePlanner saves it as an object"
        )
    return _with_memory(tensor.as_subclass(torch.Tensor), fqn)


def _resolves_to_the_state_dict(planner: SavePlanner) -> bool:
    """Whether what the planner resolves is memory of the caller's own tensors, which no later call writes to.

    Other planners may cast or gather into a buffer that they use again for the next item.
    """
    names = ("resolve_data", "lookup_object", "transform_object")
    return any(are_untouched(planner, names, each) for each in (DefaultSavePlanner, TorchSavePlanner))


def _usable_resolve_source(planner: SavePlanner) -> Callable[[WriteItem], torch.Tensor] | None:
    """The planner's ``resolve_source``, unless a subclass changed what ``resolve_data`` gives and so must be asked."""
    owner = next((base for base in type(planner).__mro__ if "resolve_source" in vars(base)), None)
    if owner is None or not are_untouched(planner, ("resolve_data", "transform_object"), owner):
        return None
    resolve: Callable[[WriteItem], torch.Tensor] = planner.resolve_source  # type: ignore[attr-defined]
    return resolve
