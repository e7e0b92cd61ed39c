"""The load planner over a checkpoint's columns: torch's read items, dtype rules, and states rebuilt from nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import default_planner as torch_planners
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import gpudcp
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.formats import index
from gpudcp.items import ReadItems
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner, EmptyStateDictLoadPlanner
from gpudcp.views import ANNOUNCEMENT, ColumnMetadata

Box = tuple[tuple[int, ...], tuple[int, ...]]


class Shards:
    """A value of torch's `_Checkpointable` protocol that has these chunks of a tensor, and no memory."""

    dtype = torch.float32

    def __init__(self, size: tuple[int, ...], boxes: list[Box]) -> None:
        self._size = torch.Size(size)
        self._chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(lengths)) for at, lengths in boxes]

    def size(self) -> torch.Size:
        return self._size

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self._size),
            )
            for chunk in self._chunks
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        raise NotImplementedError


def cut(draw: st.DrawFn, size: tuple[int, ...]) -> list[Box]:
    """A tensor cut along one dimension, or not at all, evenly or not, in any order."""
    if not size:
        return [((), ())]
    dim = draw(st.integers(0, len(size) - 1))
    inner = st.lists(st.integers(1, max(size[dim] - 1, 1)), max_size=4, unique=True)
    bounds = sorted({0, size[dim], *(cut for cut in draw(inner) if cut < size[dim])})
    boxes = []
    for start, stop in pairwise(bounds):
        offsets, lengths = [0] * len(size), list(size)
        offsets[dim], lengths[dim] = start, stop - start
        boxes.append((tuple(offsets), tuple(lengths)))
    return draw(st.permutations(boxes or [((0,) * len(size), size)]))


class Case(NamedTuple):
    saved: dict[str, Shards]
    wanted: dict[str, Any]
    objects: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    saved: dict[str, Shards] = {}
    wanted: dict[str, Any] = {}
    for number in range(draw(st.integers(0, 5))):
        size = tuple(draw(st.lists(st.integers(0, 8), max_size=3)))
        saved[f"t{number}"] = Shards(size, cut(draw, size))
        wanted[f"t{number}"] = Shards(size, cut(draw, size)[: draw(st.integers(1, 3))])
        if draw(st.booleans()):
            wanted[f"t{number}"] = torch.zeros(size)
    objects = draw(st.integers(0, 2))
    wanted.update({f"o{number}": "x" for number in range(objects)})
    return Case(saved, wanted, objects)


def metadata_of(saved: dict[str, Any]) -> ColumnMetadata:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(saved, StorageMeta(modules=[ANNOUNCEMENT]), True)
    plan = planner.create_local_plan()
    assert isinstance(plan, SavePlan)
    _, metadata = planner.create_global_plan([plan])
    assert isinstance(metadata, ColumnMetadata)
    return metadata


@settings(deadline=None, max_examples=200)
@given(cases())
def test_read_items_are_torchs(case: Case) -> None:
    """As a set, with every index and every hint."""
    saved: dict[str, Any] = {**case.saved, **{f"o{number}": "saved" for number in range(case.objects)}}
    metadata = metadata_of(saved)
    expected = torch_planners.create_default_local_load_plan(dict(case.wanted), metadata.plain())
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(case.wanted), metadata)
    items = planner.create_local_plan().items
    assert isinstance(items, ReadItems)
    assert sorted(map(repr, items)) == sorted(map(repr, expected.items))


@pytest.fixture(params=["index", "pickle"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, read through its index or through its pickle."""
    monkeypatch.setattr(index, "LEAST_ROWS", 0 if request.param == "index" else 1 << 30)
    state = {"m": {"weight": torch.ones(2, 3), "bias": torch.zeros(3), "n": [torch.tensor(1), 2]}, "step": 7}
    gpudcp.save(state, tmp_path)
    return tmp_path


def test_another_dtype_is_cast_or_warned_of_or_refused(saved: Path) -> None:
    """As the planner is told; by default it is cast, as torch does."""
    state = {"m": {"weight": torch.zeros(2, 3, dtype=torch.float64)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpudcp.load(state, saved)
    assert state["m"]["weight"].sum() == 6
    message = r"1 tensors have another dtype .*m\.weight: torch\.float32 saved, torch\.float64 wanted"
    with pytest.warns(UserWarning, match=message):
        gpudcp.load(state, saved, planner=DefaultLoadPlanner(on_dtype_mismatch="warn"))
    with pytest.raises(PlanError, match=message):
        gpudcp.load(state, saved, planner=DefaultLoadPlanner(on_dtype_mismatch="error"))
    same = {"m": {"weight": torch.zeros(2, 3)}}
    gpudcp.load(same, saved, planner=DefaultLoadPlanner(on_dtype_mismatch="error"))


def test_a_rule_that_does_not_exist_is_refused() -> None:
    """When the planner is made."""
    with pytest.raises(PlanError, match="on_dtype_mismatch='ignore'"):
        DefaultLoadPlanner(on_dtype_mismatch="ignore")  # type: ignore[arg-type]


def test_all_that_is_wrong_is_said_at_once(saved: Path) -> None:
    """Missing keys with names that come close, and sizes."""
    state = {"m": {"weigth": torch.zeros(2, 3), "bias": torch.zeros(4), "other": torch.zeros(1)}}
    with pytest.raises(MissingKeyError) as told:
        gpudcp.load(state, saved)
    assert "'m.weigth' (it has 'm.weight'" in str(told.value)
    assert "'m.other'" in str(told.value)
    assert "m.bias: size (3,) in the checkpoint, (4,) in the state dict" in str(told.value)


def test_metadata_that_somebody_has_changed_is_what_is_planned_by() -> None:
    """Its columns still say what it was."""
    metadata = metadata_of({"a": torch.zeros(2), "b": torch.zeros(2)})
    del metadata.state_dict_metadata["b"]
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"a": torch.zeros(2), "b": torch.zeros(2)}, metadata)
    with pytest.raises(MissingKeyError, match="'b'"):
        planner.create_local_plan()


def test_an_empty_state_dict_is_rebuilt_whole(saved: Path) -> None:
    """Nested as it was saved."""
    state: dict[str, Any] = {}
    gpudcp.load(state, saved, planner=EmptyStateDictLoadPlanner())
    assert torch.equal(state["m"]["weight"], torch.ones(2, 3))
    assert state["m"]["n"] == [torch.tensor(1), 2]
    assert state["step"] == 7


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["m"], lambda state: set(state) == {"m"} and set(state["m"]) == {"weight", "bias", "n"}),
        (["m.bias", "step"], lambda state: set(state) == {"m", "step"} and set(state["m"]) == {"bias"}),
        (["m.n"], lambda state: state == {"m": {"n": [torch.tensor(1), 2]}}),
    ],
)
def test_only_the_keys_that_are_asked_for_are_rebuilt(
    saved: Path, keys: list[str], found: Callable[[dict[str, Any]], bool]
) -> None:
    """By their names or their beginnings."""
    state: dict[str, Any] = {}
    gpudcp.load(state, saved, planner=EmptyStateDictLoadPlanner(keys))
    assert found(state)


def test_what_cannot_be_rebuilt_is_refused(saved: Path) -> None:
    """A key that is not there; a state dict that is not empty."""
    with pytest.raises(MissingKeyError, match="the checkpoint has no 'absent'"):
        gpudcp.load({}, saved, planner=EmptyStateDictLoadPlanner(["absent"]))
    with pytest.raises(PlanError, match="must be empty; it has 1 keys"):
        gpudcp.load({"step": 0}, saved, planner=EmptyStateDictLoadPlanner())
