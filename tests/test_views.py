"""Columns seen as torch's objects: made when asked for, and lists from the first change on."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem

import gpudcp
from gpudcp.items import ReadItems, WriteItems, columns_of
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.views import ANNOUNCEMENT, ColumnMetadata, Paths

STATE = {"a": {"b": torch.zeros(2, 3)}, "c": torch.tensor(1), "d": "text"}


def write_items() -> WriteItems:
    planner = DefaultSavePlanner()
    planner.set_up_planner(STATE)
    items = planner.create_local_plan().items
    assert isinstance(items, WriteItems)
    return items


def metadata() -> ColumnMetadata:
    planner = DefaultSavePlanner()
    planner.set_up_planner(STATE, StorageMeta(modules=[ANNOUNCEMENT]), True)
    _, found = planner.create_global_plan([planner.create_local_plan()])
    assert isinstance(found, ColumnMetadata)
    return found


def read_items() -> ReadItems:
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"a": {"b": torch.zeros(2, 3)}, "c": torch.tensor(1), "d": ""}, metadata())
    items = planner.create_local_plan().items
    assert isinstance(items, ReadItems)
    return items


def test_items_are_what_a_list_of_them_is() -> None:
    """Length, index, slice, iteration, equality, addition."""
    for items in (write_items(), read_items()):
        plain = list(items)
        assert len(items) == 3
        assert items == plain
        assert [items[0], items[-1]] == [plain[0], plain[-1]]
        assert items[1:] == plain[1:]
        assert [*items, "x"] == items + ["x"]  # noqa: RUF005
        assert ["x", *items] == ["x"] + items  # noqa: RUF005
        assert pickle.loads(pickle.dumps(items)) == plain


def test_changed_items_are_a_list_from_then_on() -> None:
    """Columns say nothing of them any more; they pickle as they are."""
    items = write_items()
    columns = items.columns
    assert columns is not None
    assert columns_of(items, None) is columns
    first: WriteItem = items[0]
    del items[1]
    items.append(first)
    assert items.columns is None
    assert len(items) == 3
    assert items[2] == first
    assert pickle.loads(pickle.dumps(items)) == list(items)
    again = columns_of(items, None)
    assert list(WriteItems(again)) == list(items)


def test_what_is_changed_inside_an_item_is_changed_in_that_item_alone() -> None:
    """As in torch: items of one shape share nothing that can be changed, not with those of a later plan either."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": torch.zeros(3), "b": torch.zeros(3)})
    items = planner.create_local_plan().items
    assert isinstance(items, WriteItems)
    (data,) = [item.tensor_data for item in items if item.index.fqn == "a"]
    assert data is not None
    data.properties.dtype = torch.float16
    assert items.columns is None
    for each in (items, pickle.loads(pickle.dumps(items)), list(WriteItems(columns_of(items, None)))):
        dtypes = [item.tensor_data.properties.dtype for item in each if item.tensor_data is not None]
        assert dtypes == [torch.float16, torch.float32]
    assert [item.tensor_data.properties.dtype for item in planner.create_local_plan().items if item.tensor_data] == [
        torch.float32,
        torch.float32,
    ]


def test_items_that_somebody_only_looks_at_stay_columns() -> None:
    """What is handed out is kept, and compared."""
    items = write_items()
    assert items[0] is items[0]
    assert len(list(items)) == 3
    assert items.columns is not None


def test_items_are_sorted_and_copied_as_a_list_is() -> None:
    """The two methods of a list that a MutableSequence lacks and planners use."""
    items = write_items()
    copied = items.copy()
    assert type(copied) is list
    items.sort(key=lambda item: item.index.fqn, reverse=True)
    assert [item.index.fqn for item in items] == ["d", "c", "a.b"]
    assert [item.index.fqn for item in copied] == ["a.b", "c", "d"]


def test_items_travel_as_columns() -> None:
    """And names that are known on the other side are not made twice."""
    one, other = (pickle.loads(pickle.dumps(write_items())) for _ in range(2))
    assert one == write_items()
    assert one.columns.names is other.columns.names


def test_a_metadata_of_columns_is_torchs_in_all_that_torch_does_with_it() -> None:
    """Equality both ways, pickling, dataclasses.replace, fields that somebody sets."""
    found = metadata()
    plain = found.plain()
    assert type(plain) is Metadata
    assert type(plain.state_dict_metadata) is dict
    assert found == plain
    assert plain == found
    assert pickle.loads(pickle.dumps(found)) == plain
    with_data = dataclasses.replace(found, planner_data={"more": 1})
    assert with_data.planner_data == {"more": 1}
    assert with_data.state_dict_metadata == plain.state_dict_metadata
    with_entries = dataclasses.replace(found, state_dict_metadata={})
    assert type(with_entries) is Metadata
    found.planner_data = {"changed": 2}
    assert not found.is_unchanged
    assert pickle.loads(pickle.dumps(found)).planner_data == {"changed": 2}


def test_read_items_survive_in_a_plan_that_is_pickled() -> None:
    """As torch's own list: who sends a load plan to another rank gets objects there."""
    items = read_items()
    plan = pickle.loads(pickle.dumps(LoadPlan(items)))  # type: ignore[arg-type]
    assert type(plan.items) is list
    assert plan.items == list(items)


def test_planner_data_is_changed_as_a_dict_is() -> None:
    """It travels as a dict from then on; the names, which other plans share, stay as they are."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(STATE)
    paths: Any = planner.create_local_plan().planner_data
    assert type(pickle.loads(pickle.dumps(paths))) is Paths
    paths["c"] = ("e", "c")
    del paths["d"]
    expected = {"a.b": ("a", "b"), "c": ("e", "c")}
    assert paths == expected
    assert pickle.loads(pickle.dumps(paths)) == expected
    assert paths.names.paths == {"a.b": ("a", "b"), "c": ("c",), "d": ("d",)}


def test_entries_are_changed_as_those_of_a_dict_are() -> None:
    """Put in, taken out, or changed in place, and each by itself; then the columns say nothing any more."""

    def put(entries: Any) -> None:
        entries["e"] = entries["c"]

    def take_out(entries: Any) -> None:
        del entries["c"]

    def change(entries: Any) -> None:
        entries["c"].properties.requires_grad = True

    def change_chunk(entries: Any) -> None:
        entries["a.b"].chunks[0].sizes = torch.Size([1, 3])

    for act in (put, take_out, change, change_chunk):
        found = metadata()
        expected = found.plain()
        assert found.is_unchanged
        act(found.state_dict_metadata)
        act(copied := copy.deepcopy(expected.state_dict_metadata))
        assert not found.is_unchanged
        assert found.state_dict_metadata == copied
        assert len(found.state_dict_metadata) == len(copied)
        assert pickle.loads(pickle.dumps(found)).state_dict_metadata == copied


def test_the_parts_of_a_metadata_are_as_good_as_dicts(tmp_path: Path) -> None:
    """Printed, copied and joined as torch's are."""
    metadata = gpudcp.save({"a": torch.ones(2), "b": {"c": 1}}, tmp_path)
    for part in (metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data):
        assert part is not None
        assert repr(part) == repr(dict(part))
        assert part.copy() == dict(part)
        assert part | {"x": 1} == {**part, "x": 1}
        assert {"x": 1} | part == {"x": 1, **part}
