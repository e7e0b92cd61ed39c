"""Where a load planner wants bytes: its tensors, and its objects."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from gpudcp._dcp import ExtensionRegistry, StreamTransformExtension
from gpudcp.errors import CorruptCheckpointError, PlanError
from gpudcp.files.posix import PosixReader
from gpudcp.formats.checksum import crc32
from gpudcp.options import Options
from gpudcp.storage.stored import StoredItem, is_object


class PlannerTarget:
    """The executor's view of a load planner: destinations by position, checked against their items."""

    def __init__(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        self._items = items
        self._planner = planner

    def resolve(self, position: int) -> torch.Tensor:
        """The destination of a read item.

        Raises:
            PlanError: the planner resolved to something of another shape.
        """
        item = self._items[position]
        tensor = self._planner.resolve_tensor(item)
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.shape != item.lengths:
            raise PlanError(
                f"{item.dest_index.fqn}: the destination has shape {tuple(tensor.shape)}, "
                f"its read item has {tuple(item.lengths)}"
            )
        return tensor

    def commit(self, position: int, tensor: torch.Tensor) -> None:
        """Hand the filled tensor back."""
        self._planner.commit_tensor(self._items[position], tensor)


def load_whole_item(
    item: ReadItem, stored: StoredItem, file: PosixReader, planner: LoadPlanner, options: Options
) -> None:
    """Read an item whole and give it to the planner: objects as bytes, what no box describes through torch.load.

    Raises:
        CorruptCheckpointError: its bytes have another CRC-32, or torch.load cannot read them.
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
    if is_object(item):
        planner.load_bytes(item, raw)
        return
    tensor = _load_tensor(raw, stored, file)
    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    destination = planner.resolve_tensor(item).detach()
    if tensor[box].shape != destination.shape:
        raise PlanError(
            f"{stored.fqn}: the destination has shape {tuple(destination.shape)}, "
            f"the saved box {tuple(tensor[box].shape)}"
        )
    destination.copy_(tensor[box])
    planner.commit_tensor(item, destination)


def _load_tensor(raw: io.BytesIO, stored: StoredItem, file: PosixReader) -> torch.Tensor:
    try:
        tensor = torch.load(raw, map_location="cpu", weights_only=True)
    # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError... for bytes that it cannot read.
    except Exception as err:
        raise CorruptCheckpointError(
            f"{file.path}: {stored.fqn}: torch.load cannot read it: {err}", path=file.path, fqn=stored.fqn
        ) from err
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
