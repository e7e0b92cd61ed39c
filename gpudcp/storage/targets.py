"""Where a load planner wants bytes: its tensors, and its objects."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from gpudcp._dcp import ExtensionRegistry, StreamTransformExtension
from gpudcp.errors import CorruptCheckpointError, PlanError
from gpudcp.files.base import FileReader
from gpudcp.formats.archive import check_records
from gpudcp.formats.checksum import crc32
from gpudcp.formats.objects import load_object
from gpudcp.items import ReadItems
from gpudcp.options import Options
from gpudcp.planners import DefaultLoadPlanner
from gpudcp.planners.overrides import are_untouched
from gpudcp.storage.stored import StoredItem, is_object


class PlannerTarget:
    """The executor's view of a load planner: destinations by position, checked against their items."""

    def __init__(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        self._items = items
        self._planner = planner
        self._wrappers: dict[int, torch.Tensor] = {}
        self._found = _all_destinations(items, planner)
        self._tensors = _usable(self._found)
        self._hears_commits = not are_untouched(planner, ("commit_tensor",), DefaultLoadPlanner)

    def devices(self) -> set[torch.device] | None:
        """Of all destinations, as far as they are known; None: the planner has to be asked for each."""
        return None if self._found is None else {tensor.device for tensor in self._found if tensor is not None}

    def device_of(self, position: int) -> torch.device | None:
        """Where an item's destination is; None: the planner has to be asked for it."""
        found = None if self._found is None else self._found[position]
        return None if found is None else found.device

    def resolve(self, position: int) -> torch.Tensor:
        """The destination of a read item; for one without memory of its own, memory to copy into it from.

        Raises:
            PlanError: the planner resolved to something of another shape, or to no dense tensor.
        """
        if self._tensors is not None and (known := self._tensors[position]) is not None:
            return known
        item = self._items[position]
        tensor = self._planner.resolve_tensor(item)
        if type(tensor) is torch.Tensor and tensor.shape == item.lengths and _is_plain(tensor):
            return tensor  # nearly always; below, every way in which it can be otherwise
        tensor = _checked_destination(item, tensor)
        if type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            return tensor
        self._wrappers[position] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def commit(self, position: int, tensor: torch.Tensor) -> None:
        """Hand the filled tensor back."""
        if (wrapper := self._wrappers.pop(position, None)) is not None:
            tensor = wrapper.copy_(tensor)
        if self._hears_commits:
            self._planner.commit_tensor(self._items[position], tensor)


def _all_destinations(items: Sequence[ReadItem], planner: LoadPlanner) -> list[torch.Tensor | None] | None:
    """What our own planner resolves all items to, None for objects; no list: another one is asked when it is time."""
    names = ("resolve_tensor", "lookup_tensor", "transform_tensor", "resolve_tensors")
    if not (isinstance(planner, DefaultLoadPlanner) and are_untouched(planner, names, DefaultLoadPlanner)):
        return None
    if isinstance(items, ReadItems) and items.is_unchanged:
        return planner.resolve_tensors(items)
    found = [None if is_object(item) else planner.resolve_tensor(item) for item in items]
    # What has another shape is refused where it is resolved.
    return [
        tensor if tensor is not None and tensor.shape == item.lengths else None
        for item, tensor in zip(items, found, strict=True)
    ]


def _usable(found: list[torch.Tensor | None] | None) -> list[torch.Tensor | None] | None:
    """Those that are taken as they are; None for those that are asked for, and checked, one by one."""
    if found is None:
        return None
    return [tensor if type(tensor) is torch.Tensor and _is_plain(tensor) else None for tensor in found]


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.requires_grad or tensor.is_meta)


def _checked_destination(item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
    # Not where it is not needed: copy_ gives a quantized tensor its new scale, and would give it to the detached one.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise PlanError(
            f"{item.dest_index.fqn}: the destination is a {tensor.layout} tensor on {tensor.device}; "
            "the checkpoint holds a dense one, which needs memory to go to"
        )
    if tensor.shape != item.lengths:
        raise PlanError(
            f"{item.dest_index.fqn}: the destination has shape {tuple(tensor.shape)}, "
            f"its read item has {tuple(item.lengths)}"
        )
    return tensor


def load_whole_item(
    item: ReadItem, stored: StoredItem, file: FileReader, planner: LoadPlanner, options: Options
) -> None:
    """Read an item whole and give it to the planner: objects as bytes, what no box describes through torch.load.

    Raises:
        CorruptCheckpointError: its bytes have another CRC-32, or torch.load cannot read them.
        UnsafeCheckpointError: loading them would run code.
        PlanError: the destination cannot take the tensor.
    """
    data = bytearray(stored.nbytes)
    file.read(memoryview(data), stored.byte_offset)
    expected = stored.extras.crc32 if stored.extras.payload_offset is None else None
    if options.verify != "off" and expected is not None and (found := crc32(data)) != expected:
        raise CorruptCheckpointError(
            f"{file.path}: {stored.fqn}: the {stored.nbytes} bytes at {stored.byte_offset} have CRC-32 {found:#010x}, "
            f"{expected:#010x} was saved",
            path=file.path,
            fqn=stored.fqn,
            expected_crc32=expected,
            found_crc32=found,
        )
    raw = _untransformed(io.BytesIO(data), stored)
    if options.verify != "off" and expected is None:
        _check_archive(raw, stored, file)
    if is_object(item):
        planner.load_bytes(item, raw)
        return
    tensor = _load_tensor(raw, stored, file, options)
    box = tensor[tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))]
    if box.shape != item.lengths:
        raise CorruptCheckpointError(
            f"{file.path}: {stored.fqn}: the file holds shape {tuple(tensor.shape)}, its read item has "
            f"{tuple(item.lengths)} at {tuple(item.storage_offsets)}",
            path=file.path,
            fqn=stored.fqn,
        )
    destination = _checked_destination(item, planner.resolve_tensor(item))
    try:
        destination.copy_(box)
    except RuntimeError as err:
        raise PlanError(
            f"{item.dest_index.fqn}: a saved {box.dtype} tensor cannot be copied into a {destination.dtype} one: {err}"
        ) from err
    planner.commit_tensor(item, destination)


def _check_archive(raw: io.BytesIO, stored: StoredItem, file: FileReader) -> None:
    data = raw.getbuffer()
    check_records(
        lambda start, nbytes: data[start : start + nbytes],
        byte_offset=0,
        nbytes=len(data),
        path=file.path,
        fqn=stored.fqn,
    )


def _load_tensor(raw: io.BytesIO, stored: StoredItem, file: FileReader, options: Options) -> torch.Tensor:
    try:
        tensor = load_object(raw, fqn=stored.fqn, trust_pickle=options.trust_pickle)
    except CorruptCheckpointError as err:
        raise CorruptCheckpointError(f"{file.path}: {err}", path=file.path, fqn=stored.fqn) from err
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpointError(
            f"{file.path}: {stored.fqn}: holds a {type(tensor).__name__}, not a tensor", path=file.path, fqn=stored.fqn
        )
    return tensor


def _untransformed(raw: io.BytesIO, stored: StoredItem) -> io.BytesIO:
    """Undo the stream transforms (compression) that stock's extension wrote, by torch's own extension."""
    if not stored.transforms:
        return raw
    try:
        extensions = ExtensionRegistry().from_descriptor_list(stored.transforms)
        stream: IO[bytes] = raw
        for extension in extensions:
            if not isinstance(extension, StreamTransformExtension):
                raise ValueError(f"{extension} transforms no streams")
            stream = extension.transform_from(stream)
        return io.BytesIO(stream.read())
    except Exception as err:
        raise PlanError(
            f"{stored.fqn}: was written through {', '.join(stored.transforms)}, which cannot be undone: {err}"
        ) from err
