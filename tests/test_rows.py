"""Records in the order of a checkpoint's rows: every row gets its own, or nobody does."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from gpudcp.arrays import NONE
from gpudcp.columns import CheckpointColumns
from gpudcp.names import Names
from gpudcp.records import Indices, ItemRecords
from gpudcp.rows import RowIndices, by_row

INDICES = [
    MetadataIndex("matrix", [0, 0], 0),
    MetadataIndex("matrix", [4, 0], 1),
    MetadataIndex("object"),
    MetadataIndex("vector", [0], 0),
    MetadataIndex("vector", [7], 1),
    MetadataIndex("vector", [9], 2),
    MetadataIndex("scalar", [], 0),
]


def columns() -> CheckpointColumns:
    boxes = [[[0, 0], [4, 3]], [[4, 0], [4, 3]], [[0, 0], [7, 1]], [[7, 0], [2, 1]], [[9, 0], [1, 1]], [[0, 0], [1, 1]]]
    return CheckpointColumns(
        names=Names(["matrix", "object", "vector", "scalar"], None),
        first_rows=np.array([0, 2, 3, 6, 7]),
        property_ids=np.array([0, NONE, 0, 0], dtype=np.int32),
        properties=(TensorProperties(dtype=torch.float32),),
        ndims=np.array([2, 0, 1, 0], dtype=np.int32),
        sizes=np.array([[8, 3], [1, 1], [10, 1], [1, 1]]),
        boxes=np.array(boxes),
        row_boxes=np.array([0, 1, 0, 2, 3, 4, 5], dtype=np.int32),
    )


def records_of(indices: list[MetadataIndex], starts: list[int]) -> ItemRecords:
    none = np.full(len(indices), NONE, dtype=np.int32)
    return ItemRecords(
        indices=Indices.of(indices),
        paths=["file"],
        path_ids=none + 1,
        byte_offsets=np.array(starts, dtype=np.int64),
        nbytes=np.full(len(indices), 5, dtype=np.int64),
        payload_offsets=none.astype(np.int64),
        dtypes=[],
        dtype_ids=none,
        crcs=none.astype(np.int64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_row_gets_its_own_record(seed: int) -> None:
    """Whatever the order in which the ranks wrote them."""
    own = columns()
    order = np.random.default_rng(seed).permutation(len(INDICES)).tolist()
    found = by_row(records_of([INDICES[row] for row in order], order), own)
    assert found is not None
    assert found.byte_offsets.tolist() == list(range(len(INDICES)))
    assert list(found.indices) == INDICES
    assert [index.index for index in found.indices] == [index.index for index in INDICES]
    assert by_row(found, own) is found


def test_indices_of_rows_travel_as_the_columns() -> None:
    """The other side works them out again."""
    own = columns()
    found = by_row(records_of(INDICES, list(range(7))), own)
    assert found is not None
    assert len(found.indices) == 7
    sent = pickle.loads(pickle.dumps(found))
    assert isinstance(sent.indices, RowIndices)
    assert list(sent.indices) == INDICES
    assert sent.byte_offsets.tolist() == found.byte_offsets.tolist()


WRONG: dict[str, Any] = {
    "one too few": lambda: INDICES[:-1],
    "one twice": lambda: [*INDICES[:-1], INDICES[0]],
    "an unknown name": lambda: [*INDICES[:-1], MetadataIndex("other", [], 0)],
    "another offset": lambda: [MetadataIndex("matrix", [1, 0], 0), *INDICES[1:]],
    "an offset of more dimensions": lambda: [MetadataIndex("matrix", [0, 0, 0], 0), *INDICES[1:]],
    "no offset": lambda: [MetadataIndex("matrix", None, 0), *INDICES[1:]],
    "an offset of fewer dimensions": lambda: [MetadataIndex("matrix", [0], 0), *INDICES[1:]],
    "an offset of an object": lambda: [*INDICES[:2], MetadataIndex("object", [0, 0]), *INDICES[3:]],
    "no hint": lambda: [MetadataIndex("matrix", [0, 0]), *INDICES[1:]],
    "a hint beyond its tensor": lambda: [*INDICES[:5], MetadataIndex("vector", [9], 3), INDICES[6]],
    "a negative hint": lambda: [*INDICES[:5], MetadataIndex("vector", [9], -2), INDICES[6]],
}


@pytest.mark.parametrize("case", WRONG)
def test_records_of_anything_else_have_no_order(case: str) -> None:
    """They are left as they are, to whoever can say what is wrong."""
    indices = WRONG[case]()
    assert by_row(records_of(indices, list(range(len(indices)))), columns()) is None


def test_the_order_is_of_these_columns_alone() -> None:
    """Rows of another checkpoint are other rows."""
    found = by_row(records_of(INDICES, list(range(7))), columns())
    assert found is not None
    assert by_row(found, replace(columns(), row_boxes=np.array([0, 1, 0, 3, 2, 4, 5], dtype=np.int32))) is None
