"""What a save planner resolves, and what the writer makes of it: casts, refusals, and reports on objects."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from storage_cases import check_settled, data_files, metadata_of, names, record_of
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

import gpudcp
from gpudcp import Options
from gpudcp.errors import (
    PlanError,
    UnsafeCheckpointError,
)
from gpudcp.storage.sources import PlannerSource


class Renaming(dcp.DefaultSavePlanner):
    """A planner whose items speak of another dtype, or other chunk sizes, than its tensors have."""

    def __init__(self, *, dtype: torch.dtype | None = None, sizes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self._dtype = dtype
        self._sizes = sizes

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[self._changed(item) for item in plan.items])

    def _changed(self, item: WriteItem) -> WriteItem:
        data = item.tensor_data
        if data is None:
            return item
        properties, chunk = data.properties, data.chunk
        if self._dtype is not None:
            properties = dataclasses.replace(properties, dtype=self._dtype)
        if self._sizes is not None:
            chunk = dataclasses.replace(chunk, sizes=torch.Size(self._sizes))
        return dataclasses.replace(item, tensor_data=dataclasses.replace(data, properties=properties, chunk=chunk))


class WithSource(Renaming):
    """Gives the uncast tensor, which the executor casts; and the cast one to storages that do not ask for it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)
        self.asked: list[str] = []

    def resolve_source(self, item: WriteItem) -> torch.Tensor:
        self.asked.append("source")
        source: torch.Tensor = self.lookup_object(item.index)
        return source

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.asked.append("data")
        data = super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        return data.to(write_item.tensor_data.properties.dtype)


class WithTransform(WithSource):
    """Changes what is saved in `transform_object`: asked for the source, its change would be lost."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object) + 1


class WithData(WithSource):
    """Changes what is saved in `resolve_data`."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) * 2


VALUES = torch.tensor([[1.0, 2.00390625, -3.1415927], [1e30, 0.1, float("-inf")]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t()], ids=["contiguous", "transposed"])
def test_a_planner_that_gives_the_source_has_it_cast_by_the_executor(
    tmp_path: Path, dtype: torch.dtype, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The file holds the item's dtype, and the bytes that torch's own cast gives; torch's storage gets the same."""
    planner, source = WithSource(dtype), view(VALUES)
    gpudcp.save({"weight": source}, tmp_path / "ours", planner=planner)
    assert planner.asked == ["source"]
    dcp.save({"weight": source}, checkpoint_id=tmp_path / "stock", planner=WithSource(dtype))
    for directory in (tmp_path / "ours", tmp_path / "stock"):
        for load_it in (gpudcp.load, dcp.load):
            found = {"weight": torch.zeros(source.shape, dtype=dtype)}
            load_it(found, checkpoint_id=directory)
            assert bytes(found["weight"].view(torch.uint8).numpy()) == bytes(
                source.to(dtype).contiguous().view(torch.uint8).numpy()
            )


@pytest.mark.parametrize(("kind", "factor", "term"), [(WithTransform, 1, 1), (WithData, 2, 0)])
def test_a_subclass_that_changes_the_data_is_asked_for_the_data(
    tmp_path: Path, kind: type[WithSource], factor: int, term: int
) -> None:
    """Its change is in the file, though a class below it could give the source."""
    planner = kind(torch.bfloat16)
    gpudcp.save({"weight": VALUES}, tmp_path, planner=planner)
    assert planner.asked == ["data"]
    found = {"weight": torch.zeros(VALUES.shape, dtype=torch.bfloat16)}
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["weight"], (VALUES + term).to(torch.bfloat16) * factor)


def test_data_that_the_items_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Without resolve_source a narrower item dtype is a mistake: stock saves the wide tensor under the narrow name."""
    with pytest.raises(
        PlanError, match=r"weight: resolved to torch\.float32; its item says torch\.bfloat16, which cannot hold"
    ):
        gpudcp.save({"weight": VALUES}, tmp_path / "ours", planner=Renaming(dtype=torch.bfloat16))
    assert names(tmp_path / "ours") == set()
    dcp.save({"weight": VALUES}, checkpoint_id=tmp_path / "stock", planner=Renaming(dtype=torch.bfloat16))
    described = dcp.FileSystemReader(tmp_path / "stock").read_metadata().state_dict_metadata["weight"]
    assert described.properties.dtype == torch.bfloat16  # type: ignore[union-attr]
    (path,) = data_files(tmp_path / "stock")
    assert torch.load(path, weights_only=True).dtype == torch.float32


def test_data_that_the_items_dtype_holds_exactly_are_widened(tmp_path: Path) -> None:
    """bfloat16 into float32, int8 into int64: nothing is lost, so nothing is refused."""
    narrow = VALUES.to(torch.bfloat16)
    gpudcp.save({"weight": narrow}, tmp_path, planner=Renaming(dtype=torch.float32))
    record = record_of(metadata_of(tmp_path), "weight")
    assert record.gpudcp[1] == torch.float32
    found = {"weight": torch.zeros(2, 3)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["weight"], narrow.float())


@pytest.mark.parametrize("sizes", [(1, 3), (3, 2), (2, 3, 1), (6,)])
def test_data_of_another_shape_than_the_chunk_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """The error names the tensor and both shapes; stock's item would hold another shape than the metadata says."""

    class Unplanned(Renaming):
        def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
            planned, metadata = dcp.DefaultSavePlanner.create_global_plan(self, all_plans)
            return [dataclasses.replace(planned[0], items=[self._changed(item) for item in planned[0].items])], metadata

        def create_local_plan(self) -> SavePlan:
            return dcp.DefaultSavePlanner.create_local_plan(self)

    message = re.escape(f"weight: resolved to shape (2, 3), its chunk has {sizes}")
    with pytest.raises(PlanError, match=message):
        gpudcp.save({"weight": VALUES}, tmp_path, planner=Unplanned(sizes=sizes))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("wrong", ["text", io.BytesIO(b"bytes")], ids=["text", "bytes"])
def test_a_tensor_item_that_resolves_to_no_tensor_is_refused(tmp_path: Path, wrong: object) -> None:
    """With the type it resolved to."""

    class Wrong(gpudcp.DefaultSavePlanner):
        def resolve_data(self, _: WriteItem) -> Any:
            return wrong

    with pytest.raises(PlanError, match=rf"weight: a tensor item resolved to a {type(wrong).__name__}"):
        gpudcp.save({"weight": VALUES}, tmp_path, planner=Wrong())


def test_an_object_item_that_resolves_to_no_bytes_is_refused(tmp_path: Path) -> None:
    """torch's contract for BYTE_IO items is an io.BytesIO."""

    class Wrong(gpudcp.DefaultSavePlanner):
        def resolve_data(self, _: WriteItem) -> Any:
            return b"bytes"

    with pytest.raises(PlanError, match=r"note: a BYTE_IO item resolved to a bytes, not an io\.BytesIO"):
        gpudcp.save({"note": "x"}, tmp_path, planner=Wrong())


class Custom:
    """A type that no list knows."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("planner", [None, dcp.DefaultSavePlanner()], ids=["ours", "torchs"])
def test_an_object_that_could_not_be_loaded_is_reported_when_it_is_saved(tmp_path: Path, planner: Any) -> None:
    """One warning names key, type and remedy, whichever planner dumped it; the checkpoint is saved."""
    with pytest.warns(UserWarning, match="trust_pickle=True") as told:
        gpudcp.save({"fine": {"lr": 0.1}, "odd": Custom(3)}, tmp_path, planner=planner)
    (warning,) = [str(each.message) for each in told if "trust_pickle" in str(each.message)]
    assert "odd: " in warning
    assert f"{Custom.__module__}.Custom" in warning
    assert "torch.serialization.add_safe_globals" in warning
    assert "fine" not in warning
    found: dict[str, Any] = {"odd": None}
    gpudcp.load(found, tmp_path, options=Options(trust_pickle=True))
    assert found["odd"] == Custom(3)


def test_objects_that_load_safely_are_not_reported(tmp_path: Path) -> None:
    """No warning for what the safe load takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpudcp.save({"plain": [1, "a", {"b": 2.0}], "tuple": (1, torch.ones(2)), "set": {1, 2}}, tmp_path)


def test_an_object_that_could_not_be_loaded_can_be_an_error(checkpoint: Path) -> None:
    """Options(unsafe_objects="error"): the type refused is in the error, the old checkpoint stays."""
    with pytest.raises(UnsafeCheckpointError, match=r"odd: .*Custom") as told:
        gpudcp.save({"odd": Custom(3)}, checkpoint, options=Options(unsafe_objects="error"))
    assert told.value.refused.endswith("Custom")
    check_settled(checkpoint)


def test_items_are_grouped_only_where_there_are_devices_to_tell_apart() -> None:
    """What is on none of them, or not known before, goes with the first."""
    source = PlannerSource([], gpudcp.DefaultSavePlanner())
    gpus = [torch.device("cuda", number) for number in (2, 0, 1)]
    tensors: Any = [SimpleNamespace(device=device) for device in (*gpus, torch.device("cpu"))]
    source._found = [*tensors, None]
    assert source.groups(gpus) == [0, 1, 2, 0, 0]
    assert source.groups(gpus[1:]) == [0, 0, 1, 0, 0]
    assert source.groups(gpus[:1]) is source.groups([]) is None
    source._found = None
    assert source.groups(gpus) is None


def test_the_devices_of_parameters_are_known_too() -> None:
    """Whoever saves a dict of them has tensors on a GPU where they are."""
    planner = gpudcp.DefaultSavePlanner()
    planner.set_up_planner({"weight": torch.nn.Parameter(torch.zeros(3)), "object": "text"})
    assert PlannerSource(planner.create_local_plan().items, planner).devices() == {torch.device("cpu")}
    planner.set_up_planner({"object": "text"})
    assert PlannerSource(planner.create_local_plan().items, planner).devices() == set()
