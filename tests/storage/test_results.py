"""Write results and storage data: columns that look like the lists and dicts that DCP passes around."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from storage_cases import state_of
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

import gpudcp
from gpudcp._dcp import StorageInfo, item_extras
from gpudcp.records import ItemRecords
from gpudcp.storage.results import WriteResults
from gpudcp.views import StorageData


class Listening(gpudcp.GpuStorageWriter):
    """Keeps what write_data returned."""

    results: Any = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        future = super().write_data(plan, planner)
        self.results = future.wait()
        return future


@pytest.fixture
def results(tmp_path: Path) -> WriteResults:
    """Those of a save of ``state_of(1.0)``."""
    writer = Listening(tmp_path)
    gpudcp.save(state_of(1.0), storage_writer=writer)
    assert isinstance(writer.results, WriteResults)
    return writer.results


def test_write_results_are_a_sequence_of_write_results(results: WriteResults, tmp_path: Path) -> None:
    """Each says what DCP's own says: the index, the length, and the record of the item."""
    assert len(results) == 4
    made = list(results)
    assert all(type(result) is WriteResult for result in made)
    assert {result.index.fqn for result in made} == set(state_of(1.0))
    (path,) = tmp_path.glob("*.distcp")
    for result in made:
        info = result.storage_data
        assert type(info) is StorageInfo
        assert info.relative_path == path.name
        assert result.size_in_bytes == info.length > 0
        assert info.transform_descriptors is None
    assert min(result.storage_data.offset for result in made) == 0
    assert sum(result.size_in_bytes for result in made) <= path.stat().st_size


def test_write_results_are_indexed_and_sliced_as_lists_are(results: WriteResults) -> None:
    """From both ends, with steps, and past the end."""
    made = list(results)
    for row in range(-4, 4):
        assert results[row] == made[row]
    for part in (slice(None), slice(1, 3), slice(None, None, -1), slice(2, 99), slice(-2, None, 2)):
        assert results[part] == made[part]
    for row in (4, -5):
        with pytest.raises(IndexError):
            results[row]


def test_write_results_travel_between_ranks(results: WriteResults) -> None:
    """torch's driver pickles them."""
    copy: WriteResults = pickle.loads(pickle.dumps(results))
    assert type(copy) is WriteResults
    assert list(copy) == list(results)
    assert [item_extras(a.storage_data) for a in copy] == [item_extras(b.storage_data) for b in results]


def test_storage_data_is_a_dict_in_all_that_matters(results: WriteResults) -> None:
    """Length, order, look-up with and without a hint, equality both ways."""
    data = StorageData(results.records)
    expected = {result.index: result.storage_data for result in results}
    assert dict(data) == expected
    assert data == expected
    assert expected == data
    assert len(data) == 4
    assert list(data) == list(expected)
    assert [*data.items()] == [*expected.items()]
    for index, info in expected.items():
        assert data[index] == info
        assert index in data
    assert data != {}
    with pytest.raises(TypeError):
        hash(data)


def test_storage_data_travel_as_columns(results: WriteResults) -> None:
    """And are the same mapping on the other side."""
    copy = pickle.loads(pickle.dumps(StorageData(results.records)))
    assert copy == dict(StorageData(results.records))


def test_the_results_of_several_ranks_are_joined_in_order(tmp_path: Path) -> None:
    """Paths and dtypes are numbered anew; ranks without items, and items without a payload, stay what they are."""
    parts: list[WriteResults] = []
    states: list[dict[str, Any]] = [
        {"a": torch.ones(2), "b": "text"},
        {},
        {"c": torch.ones(3, dtype=torch.int8), "d": torch.ones(4)},
        {"e": "text"},
    ]
    for number, state in enumerate(states):
        writer = Listening(tmp_path / str(number))
        gpudcp.save(state, storage_writer=writer)
        parts.append(writer.results)
    joined = WriteResults(ItemRecords.concatenated(part.records for part in parts))
    expected = [result for part in parts for result in part]
    assert list(joined) == expected
    assert [item_extras(a.storage_data) for a in joined] == [item_extras(b.storage_data) for b in expected]
    assert len(WriteResults(ItemRecords.concatenated([]))) == 0
