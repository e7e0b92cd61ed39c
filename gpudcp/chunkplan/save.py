"""Turn DCP write items into a save chunk plan. Pure: no I/O, no device, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.planner import WriteItem

from gpudcp.arrays import NONE
from gpudcp.errors import PlanError
from gpudcp.formats.dtypes import is_savable
from gpudcp.formats.envelope import Envelope, envelope_at
from gpudcp.items import WriteItems

FULL_FILE_NBYTES = 64 << 20
"""Each file of several has about this much at least: a save below it is not worth a second one."""


class ChunkWrite(NamedTuple):
    """One chunk of one tensor: an envelope around its elements, row-major, in the file's dtype."""

    position: int
    """Of its write item in the SavePlan."""
    byte_offset: int
    nbytes: int
    """Of the envelope and the payload."""
    payload_offset: int
    """In the file."""
    envelope: Envelope
    dtype: torch.dtype
    sizes: tuple[int, ...]


class LiteralWrite(NamedTuple):
    """Bytes that are known before the transfer: an object, or a tensor that no box describes."""

    position: int
    byte_offset: int
    nbytes: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFilePlan:
    """One file: its writes in file order, with zeros between them, cut into slabs of ``slab_nbytes``."""

    path: str
    """Relative to the checkpoint's directory."""
    nbytes: int
    slab_nbytes: int
    writes: tuple[ChunkWrite | LiteralWrite, ...]
    group: int = 0
    """Files of one group are packed on one device: those of group n on the n-th that an executor has."""

    def __post_init__(self) -> None:
        end = 0
        for write in self.writes:
            start, nbytes = write.byte_offset, write.nbytes
            if start < end:
                raise PlanError(
                    f"{self.path}: item {write.position} starts at byte {start}, the one before it ends at byte {end}"
                )
            end = start + nbytes
        if end > self.nbytes:
            raise PlanError(f"{self.path}: items need {end} bytes, the file has {self.nbytes}")

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Byte offset and length of each slab, in file order: they tile the file without a gap."""
        for start in range(0, self.nbytes, self.slab_nbytes):
            yield start, min(self.slab_nbytes, self.nbytes - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveChunkPlan:
    """Everything that one rank writes: the files, and every byte's place in them."""

    files: tuple[SaveFilePlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def payload_nbytes(self) -> int:
        return sum(
            write.envelope.payload_nbytes if isinstance(write, ChunkWrite) else write.nbytes
            for file in self.files
            for write in file.writes
        )


def plan_save(
    items: Sequence[WriteItem],
    literals: Mapping[int, bytes],
    *,
    paths: Sequence[str],
    slab_nbytes: int,
    groups: Sequence[int] | None = None,
) -> SaveChunkPlan:
    """Lay the items into files, one after the other, each payload aligned; no items, no file.

    An item goes to the file with the fewest bytes; another file is begun when each of those begun has
    `FULL_FILE_NBYTES`, so that small saves make one file.

    Args:
        items: what to write; tensor items give the chunk's sizes and the file's dtype.
        literals: ready bytes by position in ``items``, for those that are not tensor chunks.
        paths: of as many files as may be made, relative to the checkpoint's directory.
        slab_nbytes: bytes of one slab, a multiple of 4096.
        groups: a number for each item, from 0 on: items of two groups share no file, and the groups take turns in
            taking paths. None: all items are of one group.

    Raises:
        PlanError: an item has neither literal bytes nor a tensor's description, or a dtype that stock DCP cannot save;
            there are fewer paths than groups.
    """
    described = _described(items, literals)
    of_groups: Sequence[_Numbered] = [enumerate(described)] if groups is None else _divided(described, groups)
    if len(paths) < len(of_groups):
        raise PlanError(f"{len(of_groups)} groups of items need a file each, {len(paths)} paths are given")
    return SaveChunkPlan(
        files=tuple(
            file
            for group, numbered in enumerate(of_groups)
            for file in _files(
                numbered, literals, paths=paths[group :: len(of_groups)], slab_nbytes=slab_nbytes, group=group
            )
        )
    )


_Described = tuple[torch.dtype, tuple[int, ...]]
_Numbered = Iterable[tuple[int, _Described | None]]
"""Items by position."""


def _divided(described: Iterable[_Described | None], groups: Sequence[int]) -> Sequence[_Numbered]:
    of_groups: list[list[tuple[int, _Described | None]]] = [[] for _ in range(max(groups, default=0) + 1)]
    for group, numbered in zip(groups, enumerate(described), strict=True):
        of_groups[group].append(numbered)
    return of_groups


def _files(
    numbered: _Numbered,
    literals: Mapping[int, bytes],
    *,
    paths: Sequence[str],
    slab_nbytes: int,
    group: int,
) -> list[SaveFilePlan]:
    """The files of one group."""
    files: list[list[ChunkWrite | LiteralWrite]] = [[]]
    cursors = [0]
    number, cursor = 0, 0
    for position, described in numbered:
        if described is None:
            data = literals[position]
            files[number].append(LiteralWrite(position, cursor, len(data), data))
            cursor += len(data)
        else:
            dtype, sizes = described
            envelope = envelope_at(cursor, dtype, sizes)
            payload_offset = cursor + len(envelope.prefix)
            end = payload_offset + envelope.payload_nbytes + len(envelope.suffix)
            files[number].append(ChunkWrite(position, cursor, end - cursor, payload_offset, envelope, dtype, sizes))
            cursor = end
        if cursor >= FULL_FILE_NBYTES and len(paths) > 1:
            cursors[number] = cursor
            if len(files) < len(paths) and min(cursors) >= FULL_FILE_NBYTES:
                files.append([])
                cursors.append(0)
            cursor = min(cursors)
            number = cursors.index(cursor)
    cursors[number] = cursor
    return [
        SaveFilePlan(path=path, nbytes=nbytes, slab_nbytes=slab_nbytes, writes=tuple(writes), group=group)
        for path, nbytes, writes in zip(paths, cursors, files, strict=False)
        if writes
    ]


def _described(items: Sequence[WriteItem], literals: Mapping[int, bytes]) -> Iterable[_Described | None]:
    """Dtype and sizes of each item's chunk; None where there are ready bytes."""
    columns = items.columns if isinstance(items, WriteItems) else None
    if columns is None:
        return [None if position in literals else _described_item(item) for position, item in enumerate(items)]
    templates = columns.templates
    table: list[_Described | None] = [
        None if property_id == NONE else (templates.properties[property_id].dtype, tuple(lengths[:ndim]))
        for (_, property_id, ndim), lengths in zip(
            templates.heads.tolist(), templates.boxes[:, 2].tolist(), strict=True
        )
    ]
    unsavable = {each.dtype for each in templates.properties if not is_savable(each.dtype)}
    described = [table[number] for number in columns.template_ids.tolist()]
    for position, each in enumerate(described):
        if (each is None or each[0] in unsavable) and position not in literals:
            _described_item(items[position])
    for position in literals:
        described[position] = None
    return described


def _described_item(item: WriteItem) -> _Described:
    if item.tensor_data is None or item.tensor_data.chunk is None:
        raise PlanError(f"{item.index.fqn}: the write item has no tensor_data with a chunk, and no bytes were resolved")
    dtype = item.tensor_data.properties.dtype
    if not is_savable(dtype):
        raise PlanError(f"{item.index.fqn}: dtype {dtype} cannot be saved: stock DCP has no such tensors")
    # The chunk, not tensor_data.size: that is the size of the whole tensor.
    return dtype, item.tensor_data.chunk.sizes
