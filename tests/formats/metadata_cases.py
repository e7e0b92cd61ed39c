"""Checkpoint metadata of many forms, and a comparison that sees every field, type and attribute of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gpudcp.records import Indices, ItemRecords


class Row(NamedTuple):
    """One item of a checkpoint, and where it lies."""

    index: MetadataIndex
    path: str
    byte_offset: int
    nbytes: int
    payload: tuple[int, torch.dtype] | None
    crc: int | None


def records_of(rows: list[Row]) -> ItemRecords:
    """The rows as columns."""
    paths = list(dict.fromkeys(row.path for row in rows))
    dtypes = list(dict.fromkeys(row.payload[1] for row in rows if row.payload))

    def column(values: list[int]) -> Any:
        return np.array(values, dtype=np.int64)

    return ItemRecords(
        indices=Indices.of(row.index for row in rows),
        paths=paths,
        path_ids=column([paths.index(row.path) for row in rows]).astype(np.int32),
        byte_offsets=column([row.byte_offset for row in rows]),
        nbytes=column([row.nbytes for row in rows]),
        payload_offsets=column([row.payload[0] if row.payload else -1 for row in rows]),
        dtypes=dtypes,
        dtype_ids=column([dtypes.index(row.payload[1]) if row.payload else -1 for row in rows]).astype(np.int32),
        crcs=column([-1 if row.crc is None else row.crc for row in rows]),
    )


def with_records(metadata: Metadata, records: ItemRecords) -> Metadata:
    """The metadata with the records as the plain dict that stock has."""
    data = {index: records.info(row) for row, index in enumerate(records.indices)}
    return dataclasses.replace(metadata, storage_data=data)


def described(value: Any) -> Any:
    """Everything that two values can differ in, as plain tuples: types, attributes, hints that == leaves out."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if dataclasses.is_dataclass(value):
        return kind, sorted((name, described(each)) for name, each in vars(value).items())
    if isinstance(value, dict):
        return kind, sorted(((described(key), described(each)) for key, each in value.items()), key=repr)
    if isinstance(value, list | tuple):
        return kind, [described(each) for each in value]
    return kind, repr(value)


def example() -> tuple[Metadata, ItemRecords]:
    """A small checkpoint with an entry of every kind."""
    metadata = Metadata(
        state_dict_metadata={
            "model.weight": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16, requires_grad=True),
                torch.Size([8, 4]),
                [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([4, 4])) for row in (0, 4)],
            ),
            "model.scalar": TensorStorageMetadata(
                TensorProperties(dtype=torch.float32, memory_format=torch.channels_last, pin_memory=True),
                torch.Size([]),
                [ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
            ),
            "ключ": BytesStorageMetadata(),
        },
        planner_data={"model.weight": ("model", "weight"), "ключ": ("a", 0, "b")},
        storage_meta=StorageMeta(checkpoint_id="some/where", save_id="0123"),
        version="1.0.0",
    )
    rows = [
        Row(MetadataIndex("model.weight", [0, 0], 0), "__0_0_ab.distcp", 0, 900, (704, torch.bfloat16), 0xFFFFFFFF),
        Row(MetadataIndex("model.weight", [4, 0], 1), "__1_0_ab.distcp", 1 << 40, 900, (704, torch.bfloat16), None),
        Row(MetadataIndex("model.scalar", []), "__0_0_ab.distcp", 900, 800, (1536, torch.float32), 0),
        Row(MetadataIndex("ключ"), "__0_0_ab.distcp", 1700, 50, None, 7),
    ]
    return metadata, records_of(rows)


_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16, torch.complex64]
_LENGTHS = st.one_of(st.integers(0, 5), st.integers(0, 1 << 40))
_SIZES = st.lists(_LENGTHS, max_size=5).map(torch.Size)
_FQNS = st.text(st.characters(codec="utf-8"), max_size=12)
_PATHS = st.sampled_from(["__0_0_ab.distcp", "__1_0_ab.distcp", "дата/文.distcp", ""])
_PROPERTIES = st.builds(
    TensorProperties,
    dtype=st.sampled_from(_DTYPES),
    layout=st.sampled_from([torch.strided, torch.sparse_coo]),
    requires_grad=st.booleans(),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last, torch.preserve_format]),
    pin_memory=st.booleans(),
)
_CHUNKS = st.builds(ChunkStorageMetadata, offsets=_SIZES, sizes=_SIZES)
_ENTRIES = st.one_of(
    st.builds(TensorStorageMetadata, properties=_PROPERTIES, size=_SIZES, chunks=st.lists(_CHUNKS, max_size=7)),
    st.builds(BytesStorageMetadata),
)
_INDICES = st.builds(
    MetadataIndex, fqn=_FQNS, offset=st.none() | _SIZES, index=st.none() | st.integers(0, 300) | st.just(1 << 40)
)
_ROWS = st.builds(
    Row,
    index=_INDICES,
    path=_PATHS,
    byte_offset=st.integers(0, (1 << 62)),
    nbytes=st.integers(0, (1 << 62)),
    payload=st.none() | st.tuples(st.integers(0, 1 << 62), st.sampled_from(_DTYPES)),
    crc=st.none() | st.integers(0, (1 << 32) - 1),
)
_PLANNER_DATA = st.none() | st.dictionaries(
    _FQNS, st.lists(st.one_of(_FQNS, st.integers(0, 9)), max_size=3).map(tuple), max_size=4
)
_STORAGE_META = st.none() | st.builds(StorageMeta, checkpoint_id=st.none() | _FQNS, save_id=st.none() | _FQNS)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Metadata, ItemRecords]:
    """Metadata and records of any form that planners and storage can give; not always of one checkpoint."""
    metadata = Metadata(
        state_dict_metadata=draw(st.dictionaries(_FQNS, _ENTRIES, max_size=6)),
        planner_data=draw(_PLANNER_DATA),
        storage_meta=draw(_STORAGE_META),
        version=draw(st.sampled_from([None, "1.0.0"])),
    )
    rows = draw(st.lists(_ROWS, max_size=10, unique_by=lambda row: (row.index.fqn, row.index.offset)))
    return metadata, records_of(rows)
