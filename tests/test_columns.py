"""Items and their records as columns: every row says what it was made of, alone and after joining."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from gpudcp._dcp import ItemExtras, StorageInfo, item_extras, storage_info
from gpudcp.columns import TENSOR, TemplateTable
from gpudcp.records import Indices, ItemRecords

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e5m2]


class Row(NamedTuple):
    """One item: its place, the payload's place and dtype if it has one, its CRC-32 if one was computed."""

    path: str
    byte_offset: int
    nbytes: int
    payload: tuple[int, torch.dtype] | None
    crc: int | None

    def info(self) -> StorageInfo:
        offset, dtype = self.payload or (None, None)
        return storage_info(self.path, self.byte_offset, self.nbytes, ItemExtras(offset, dtype, self.crc))


def columns_of(rows: list[Row], first: int, extra_paths: list[str]) -> ItemRecords:
    """The rows as one rank makes them: its own numbering of paths and dtypes, some paths without a row."""
    paths = [*extra_paths, *dict.fromkeys(row.path for row in rows if row.path not in extra_paths)]
    dtypes = list(dict.fromkeys(row.payload[1] for row in rows if row.payload))

    def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array(values, dtype=np.int64)

    return ItemRecords(
        indices=Indices.of(MetadataIndex(f"item {first + number}") for number in range(len(rows))),
        paths=paths,
        path_ids=column([paths.index(row.path) for row in rows]).astype(np.int32),
        byte_offsets=column([row.byte_offset for row in rows]),
        nbytes=column([row.nbytes for row in rows]),
        payload_offsets=column([row.payload[0] if row.payload else -1 for row in rows]),
        dtypes=dtypes,
        dtype_ids=column([dtypes.index(row.payload[1]) if row.payload else -1 for row in rows]).astype(np.int32),
        crcs=column([-1 if row.crc is None else row.crc for row in rows]),
    )


BYTES = st.integers(0, 1 << 62)
ROWS = st.builds(
    Row,
    path=st.sampled_from(["one", "two", "three", "four"]),
    byte_offset=BYTES,
    nbytes=BYTES,
    payload=st.none() | st.tuples(BYTES, st.sampled_from(DTYPES)),
    crc=st.none() | st.integers(0, (1 << 32) - 1),
)
PARTS = st.lists(
    st.tuples(st.lists(ROWS, max_size=6), st.lists(st.sampled_from(["two", "five"]), unique=True)), max_size=5
)


@given(parts=PARTS)
@settings(max_examples=200, deadline=None)
def test_rows_say_the_same_before_and_after_joining(parts: list[tuple[list[Row], list[str]]]) -> None:
    """Ranks number their paths and dtypes each for itself; joined, every row still names its own."""
    columns, first = [], 0
    for rows, extra_paths in parts:
        columns.append(columns_of(rows, first, extra_paths))
        first += len(rows)
        assert [columns[-1].info(row) for row in range(len(rows))] == [row.info() for row in rows]
    joined = ItemRecords.concatenated(iter(columns))
    every = [row for rows, _ in parts for row in rows]
    assert len(joined) == len(every)
    assert joined.indices == [MetadataIndex(f"item {number}") for number in range(len(every))]
    for number, row in enumerate(every):
        info = joined.info(number)
        assert info == row.info()
        assert item_extras(info) == item_extras(row.info())
    assert len(set(joined.dtypes)) == len(joined.dtypes)
    for name in ("byte_offsets", "nbytes", "payload_offsets", "crcs"):
        assert getattr(joined, name).dtype == np.int64
    for name in ("path_ids", "dtype_ids"):
        assert getattr(joined, name).dtype == np.int32


def test_a_table_does_not_change_with_whoever_gave_it_its_properties() -> None:
    """They may be the caller's own, and shared by all tensors of equal ones."""
    table, given = TemplateTable(), TensorProperties(dtype=torch.float32)
    number = table.number(TENSOR, given, (2,), (0,), (2,))
    given.dtype = torch.bfloat16
    assert table.templates().properties[table.templates().property_ids[number]].dtype is torch.float32
    assert table.number(TENSOR, given, (2,), (0,), (2,)) != number


def test_templates_go_back_as_they_came() -> None:
    """Pickled again without being packed again, and changed ones are packed anew."""
    table = TemplateTable()
    table.number(TENSOR, TensorProperties(dtype=torch.float32), (2,), (0,), (2,))
    sent = pickle.loads(pickle.dumps(table.templates()))
    assert sent.packed is not None
    assert pickle.loads(pickle.dumps(sent)).packed == sent.packed
    changed = replace(sent, boxes=sent.boxes + 1)
    assert pickle.loads(pickle.dumps(changed)).boxes.tolist() == changed.boxes.tolist()


def test_a_row_gives_plain_python_integers() -> None:
    """A NumPy integer in the record would be pickled as one, and no stock reader expects it."""
    info = columns_of([Row("one", 1, 2, (3, torch.int8), 4)], 0, []).info(0)
    for number in (info.offset, info.length, *(item_extras(info)[each] for each in (0, 2))):
        assert type(number) is int


def test_nothing_joined_is_nothing() -> None:
    """A save of no rank, or of ranks without items, has columns of length 0."""
    for parts in ([], [columns_of([], 0, [])], [columns_of([], 0, ["path"])] * 2):
        joined = ItemRecords.concatenated(parts)
        assert len(joined) == len(joined.path_ids) == len(joined.crcs) == 0
        assert joined.path_ids.dtype == np.int32
