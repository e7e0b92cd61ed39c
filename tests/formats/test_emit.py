"""The metadata's pickle, emitted from columns: loaded, it is what pickle.dumps of the same objects gives."""

from __future__ import annotations

import io
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from metadata_cases import Row, checkpoints, described, example, records_of, with_records
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedTensorProperties
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gpudcp.formats.emit import emit_metadata
from gpudcp.formats.metadata import decode_metadata, encode_metadata
from gpudcp.records import ItemRecords


def pickled(metadata: Metadata, records: ItemRecords) -> bytes:
    return pickle.dumps(with_records(metadata, records))


def emitted_bytes(metadata: Metadata, records: ItemRecords) -> bytes | None:
    emitted = emit_metadata(metadata, records)
    if emitted is None:
        return None
    data = b"".join(emitted.parts)
    assert len(data) == emitted.nbytes
    return data


@given(checkpoint=checkpoints())
@settings(max_examples=250, deadline=None)
def test_what_is_emitted_loads_as_what_pickle_dumps(checkpoint: tuple[Metadata, ItemRecords]) -> None:
    """Equal in every field, type, hint and extra attribute, whatever the names, sizes, chunks and records."""
    metadata, records = checkpoint
    emitted = emitted_bytes(metadata, records)
    assert emitted is not None
    ours, theirs = pickle.loads(emitted), pickle.loads(pickled(metadata, records))
    assert ours == theirs
    assert described(ours) == described(theirs)
    assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)


@given(checkpoint=checkpoints())
@settings(max_examples=60, deadline=None)
def test_no_two_entries_of_a_loaded_metadata_share_an_object_that_can_change(
    checkpoint: tuple[Metadata, ItemRecords],
) -> None:
    """Whoever edits one chunk, one tensor's properties or one record edits that one alone."""
    emitted = emitted_bytes(*checkpoint)
    assert emitted is not None
    loaded = pickle.loads(emitted)
    entries = list(loaded.state_dict_metadata.values())
    tensors = [entry for entry in entries if isinstance(entry, TensorStorageMetadata)]
    mutable: list[object] = [*entries, *loaded.storage_data.values()]
    mutable += [tensor.properties for tensor in tensors]
    mutable += [tensor.chunks for tensor in tensors]
    mutable += [chunk for tensor in tensors for chunk in tensor.chunks]
    assert len({id(each) for each in mutable}) == len(mutable)


def test_the_extra_attribute_of_a_record_is_emitted() -> None:
    """Payload offset, dtype and CRC-32, the last one unsigned: what the reader plans with."""
    emitted = emitted_bytes(*example())
    assert emitted is not None
    assert {index: vars(info)["gpudcp"] for index, info in pickle.loads(emitted).storage_data.items()} == {
        MetadataIndex("model.weight", [0, 0]): (704, torch.bfloat16, 0xFFFFFFFF),
        MetadataIndex("model.weight", [4, 0]): (704, torch.bfloat16, None),
        MetadataIndex("model.scalar", []): (1536, torch.float32, 0),
        MetadataIndex("ключ"): (None, None, 7),
    }


def test_an_empty_checkpoint_is_emitted() -> None:
    """No tensor, no object, no record, no planner data."""
    metadata, records = Metadata(state_dict_metadata={}), records_of([])
    emitted = emitted_bytes(metadata, records)
    assert emitted is not None
    assert described(pickle.loads(emitted)) == described(pickle.loads(pickled(metadata, records)))


def test_an_item_recorded_twice_is_what_its_last_record_says() -> None:
    """As in a dict that is filled row by row: two ranks may have written the same object."""
    metadata, _ = example()
    rows = [Row(MetadataIndex("ключ"), path, 5, 6, None, crc) for path, crc in (("one", 1), ("two", 2), ("three", 3))]
    emitted = emitted_bytes(metadata, records_of(rows))
    assert emitted is not None
    loaded = pickle.loads(emitted)
    assert described(loaded) == described(pickle.loads(pickled(metadata, records_of(rows))))
    assert loaded.storage_data[MetadataIndex("ключ")].relative_path == "three"


@pytest.mark.parametrize("name", ["", "a", "offset", "torch", "model.weight", "__0_0_ab.distcp"])
def test_names_may_be_the_same_object_as_anything_else_that_is_written(name: str) -> None:
    """Python keeps one empty string and one of each letter: a key, a path and a version may be one object."""
    name = sys.intern(name)
    for places in itertools.product([False, True], repeat=3):
        in_path, in_meta, in_planner_data = places
        metadata = Metadata(
            {name: tensor_of(), "b": BytesStorageMetadata()},
            planner_data={name: (name, "b")} if in_planner_data else None,
            storage_meta=StorageMeta(checkpoint_id=name if in_meta else "c"),
            version=name if in_meta else None,
        )
        rows = [Row(MetadataIndex(each, [0]), name if in_path else "d", 1, 2, None, None) for each in ("b", name, "e")]
        emitted = emitted_bytes(metadata, records_of(rows))
        assert emitted is not None
        assert described(pickle.loads(emitted)) == described(pickle.loads(pickled(metadata, records_of(rows))))


def test_bytes_that_look_like_opcodes_harm_nothing() -> None:
    """Where sizes are memorised is told by counting bytes; text may have them too."""
    path = ("\u0414" * 700, 0)  # in UTF-8 half of it are bytes of MEMOIZE
    metadata = Metadata({"a": tensor_of()}, planner_data={"a": path}, version="1.0.0")
    rows = [Row(MetadataIndex("a", [0], 0), "path", 1, 9, (5, torch.int8), 3)]
    emitted = b"".join(encode_metadata(metadata, records_of(rows)).parts())
    loaded = decode_metadata(emitted, path="path", trust_pickle=False)
    assert described(loaded) == described(pickle.loads(pickled(metadata, records_of(rows))))


class _NoPeek:
    """A file object with nothing but what unpickling needs, which counts its reads."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.nreads = 0

    def read(self, nbytes: int) -> bytes:
        self.nreads += 1
        return self._file.read(nbytes)

    def readline(self) -> bytes:
        self.nreads += 1
        return self._file.readline()


def test_a_file_object_without_peek_is_read_in_a_few_calls() -> None:
    """What is emitted stands in a frame, else every opcode of every record would be a read."""
    metadata, _ = example()
    rows = [Row(MetadataIndex("model.weight", [row, 0]), "path", row, 9, (5, torch.int8), 3) for row in range(2000)]
    emitted = emitted_bytes(metadata, records_of(rows))
    assert emitted is not None
    file = _NoPeek(emitted)
    loaded = pickle.Unpickler(file).load()
    assert described(loaded) == described(pickle.loads(emitted))
    assert len(loaded.storage_data) == 2000
    assert file.nreads < 200


class _OwnMetadata(Metadata):
    """Of a planner that keeps more than torch does."""


class _OwnTensor(TensorStorageMetadata):
    """The same for one tensor."""


class _OwnBytes(BytesStorageMetadata):
    """The same for one object."""


class _OwnChunk(ChunkStorageMetadata):
    """The same for one chunk."""


class _OwnProperties(TensorProperties):
    """The same for a tensor's properties."""


class _OwnName(str):
    """A key that is more than text."""


PROPERTIES = TensorProperties(dtype=torch.int8)
SIZE, ORIGIN = torch.Size([2]), torch.Size([0])


def tensor_of(properties: Any = PROPERTIES, size: Any = SIZE, chunks: Any = None) -> TensorStorageMetadata:
    return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(ORIGIN, SIZE)] if chunks is None else chunks)


def _with_more(value: Any) -> Any:
    value.more = 5
    return value


UNUSUAL: dict[str, Callable[[], Metadata]] = {
    "metadata of another class": lambda: _OwnMetadata({"a": tensor_of()}),
    "metadata that holds more": lambda: _with_more(Metadata({"a": tensor_of()})),
    "a tensor that holds more": lambda: Metadata({"a": _with_more(tensor_of())}),
    "a tensor of another class": lambda: Metadata({"a": _OwnTensor(PROPERTIES, SIZE, [])}),
    "an object of another class": lambda: Metadata({"a": _OwnBytes()}),
    "a chunk of another class": lambda: Metadata({"a": tensor_of(chunks=[_OwnChunk(ORIGIN, SIZE)])}),
    "properties of another class": lambda: Metadata({"a": tensor_of(_OwnProperties(dtype=torch.int8))}),
    "properties from their old home": lambda: Metadata({"a": tensor_of(ShardedTensorProperties(dtype=torch.int8))}),
    "a size that is a tuple": lambda: Metadata({"a": tensor_of(size=(2,))}),
    "a size that is an empty tuple": lambda: Metadata({"a": tensor_of(size=())}),
    "offsets that are a tuple": lambda: Metadata({"a": tensor_of(chunks=[ChunkStorageMetadata((), SIZE)])}),  # type: ignore[arg-type]
    "sizes that are a list": lambda: Metadata({"a": tensor_of(chunks=[ChunkStorageMetadata(ORIGIN, [2])])}),  # type: ignore[arg-type]
    "chunks that are a tuple": lambda: Metadata({"a": tensor_of(chunks=(ChunkStorageMetadata(ORIGIN, SIZE),))}),
    "a key that is a number": lambda: Metadata({5: tensor_of()}),  # type: ignore[dict-item]
    "a key of another class": lambda: Metadata({_OwnName("a"): tensor_of()}),
    "storage meta that is a number": lambda: Metadata({"a": tensor_of()}, storage_meta=5),  # type: ignore[arg-type]
    "a version that is a number": lambda: Metadata({"a": tensor_of()}, version=5),  # type: ignore[arg-type]
    "planner data that is a number": lambda: Metadata({"a": tensor_of()}, planner_data=5),
    "planner data that is an empty tuple": lambda: Metadata({"a": tensor_of()}, planner_data=()),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_metadata_is_left_to_the_pickler(case: str) -> None:
    """What emitting would change, or cannot write, is not emitted; encoding it falls back and keeps all of it."""
    metadata, (_, records) = UNUSUAL[case](), example()
    assert emit_metadata(metadata, records) is None
    metadata = with_records(metadata, records)
    loaded = pickle.loads(b"".join(encode_metadata(metadata, records).parts()))
    assert described(loaded) == described(pickle.loads(pickle.dumps(metadata)))
    assert type(loaded) is type(metadata)


def test_the_usual_counterparts_of_unusual_metadata_are_emitted() -> None:
    """What the unusual cases are built of is no reason to fall back."""
    metadata = Metadata({"a": tensor_of(), "b": BytesStorageMetadata()}, planner_data={}, version="1.0.0")
    assert emit_metadata(metadata, example()[1]) is not None
