"""Columns seen as torch's objects: made when asked for, and lists from the first change on."""

from __future__ import annotations

import dataclasses
import pickle

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, WriteItem

from gpudcp.items import ReadItems, WriteItems, columns_of
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.views import ANNOUNCEMENT, ColumnMetadata

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
