"""Tensors that no box of plain memory describes, through gpudcp, and beside it what stock does with them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interop_cases
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.testing._internal.two_tensor import TwoTensor

import gpudcp
from gpudcp.errors import CorruptCheckpointError, PlanError, UnsafeCheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

Make = Callable[[], torch.Tensor]
VALUES = torch.arange(-8.0, 8.0).reshape(4, 4)


class Tagged(torch.Tensor):
    """A subclass with memory of its own, which behaves as a tensor does."""


def per_tensor(dtype: torch.dtype, scale: float, zero_point: int, values: torch.Tensor = VALUES) -> torch.Tensor:
    return torch.quantize_per_tensor(values, scale, zero_point, dtype)


def per_channel(scales: list[float], axis: int, values: torch.Tensor = VALUES) -> torch.Tensor:
    scale = torch.tensor(scales, dtype=torch.float64)
    return torch.quantize_per_channel(values, scale, torch.arange(4), axis, torch.qint8)


QUANTIZED: dict[str, tuple[Make, Make]] = {
    "qint8": (lambda: per_tensor(torch.qint8, 0.25, 3), lambda: per_tensor(torch.qint8, 1, 0, VALUES * 0)),
    "quint8": (lambda: per_tensor(torch.quint8, 0.5, 99), lambda: per_tensor(torch.quint8, 1, 0, VALUES * 0)),
    "qint32": (lambda: per_tensor(torch.qint32, 0.125, -7), lambda: per_tensor(torch.qint32, 1, 0, VALUES * 0)),
    "per_channel": (
        lambda: per_channel([0.5, 0.25, 1, 2], 1),
        lambda: per_channel([1, 1, 1, 1], 0, VALUES * 0),
    ),
}
"""A quantized tensor, and a destination with another scale and zero point."""


def parameters(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The integers of a quantized tensor, and what they mean."""
    if tensor.qscheme() == torch.per_tensor_affine:
        meaning: tuple[Any, ...] = (tensor.q_scale(), tensor.q_zero_point())
    else:
        scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        meaning = (tensor.q_per_channel_axis(), scales.tolist(), zero_points.tolist())
    return (tensor.dtype, tensor.shape, interop_cases.bits(tensor.int_repr()), *meaning)


@pytest.mark.parametrize("save", [dcp.save, gpudcp.save], ids=["stock", "gpudcp"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_tensor_keeps_its_integers_and_their_meaning(tmp_path: Path, kind: str, save: Any) -> None:
    """Stock leaves the destination its own scale, and so changes every value; gpudcp takes the saved one."""
    make, blank = QUANTIZED[kind]
    save({"weight": make()}, checkpoint_id=tmp_path)

    by_stock = {"weight": blank()}
    dcp.load(by_stock, checkpoint_id=tmp_path)
    assert torch.equal(by_stock["weight"].int_repr(), make().int_repr())
    assert not torch.equal(by_stock["weight"].dequantize(), make().dequantize())

    destination = blank()
    found = {"weight": destination}
    gpudcp.load(found, tmp_path)
    assert found["weight"] is destination
    assert parameters(destination) == parameters(make())
    assert torch.equal(destination.dequantize(), make().dequantize())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_stock_reads_a_quantized_tensor_that_gpudcp_saved(tmp_path: Path, kind: str) -> None:
    """Into a destination quantized alike, with which stock reads its own right too."""
    make, _ = QUANTIZED[kind]
    gpudcp.save({"weight": make()}, tmp_path)
    alike = make()
    alike.fill_(0)
    found = {"weight": alike}
    dcp.load(found, checkpoint_id=tmp_path)
    assert parameters(found["weight"]) == parameters(make())


@pytest.mark.parametrize("save", [dcp.save, gpudcp.save], ids=["stock", "gpudcp"])
def test_a_quantized_tensor_does_not_go_into_a_plain_one(tmp_path: Path, save: Any) -> None:
    """torch refuses that copy: stock with its own text, gpudcp with an error that names the tensor and both dtypes."""
    save({"weight": per_tensor(torch.qint8, 0.25, 3)}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException):
        dcp.load({"weight": torch.zeros(4, 4)}, checkpoint_id=tmp_path)
    with pytest.raises(PlanError, match=r"weight: a saved torch\.qint8 tensor cannot be copied into a torch\.float32"):
        gpudcp.load({"weight": torch.zeros(4, 4)}, tmp_path)


SPARSE: dict[str, Make] = {
    "coo": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([3.0, 4.0]), (3, 4)),
    "coo_uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 0], [1, 1]]), torch.tensor([3.0, 4.0]), (3, 4)
    ),
    "coo_empty": lambda: torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (3, 4)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: VALUES.to_sparse_bsr((2, 2)),
}


def parts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Everything a sparse tensor is made of."""
    inside: list[torch.Tensor]
    if tensor.layout == torch.sparse_coo:
        inside = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inside = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    else:
        inside = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    described = [(part.dtype, part.shape, interop_cases.bits(part)) for part in inside]
    return (tensor.layout, tensor.dtype, tensor.shape, described)


@pytest.mark.parametrize("kind", SPARSE)
def test_a_sparse_tensor_comes_back_where_stock_cannot_save_it(tmp_path: Path, kind: str) -> None:
    """gpudcp saves it as an object, which stock reads too, as its planner trusts pickles."""
    with pytest.raises(CheckpointException):
        dcp.save({"weight": SPARSE[kind]()}, checkpoint_id=tmp_path / "stock")

    gpudcp.save({"weight": SPARSE[kind](), "dense": VALUES}, tmp_path / "ours")
    for load in (dcp.load, gpudcp.load):
        found = {"weight": SPARSE[kind]() * 0, "dense": torch.zeros(4, 4)}
        load(found, checkpoint_id=tmp_path / "ours")
        assert parts(found["weight"]) == parts(SPARSE[kind]())
        assert torch.equal(found["dense"], VALUES)


@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_a_dense_tensor_does_not_go_into_a_sparse_one(tmp_path: Path, kind: str) -> None:
    """Stock fails in torch's copy; gpudcp names the tensor and what is wrong with its destination."""
    gpudcp.save({"weight": torch.eye(3, 4)}, tmp_path)
    with pytest.raises(CheckpointException):
        dcp.load({"weight": torch.zeros(3, 4).to_sparse(layout=SPARSE[kind]().layout)}, checkpoint_id=tmp_path)
    with pytest.raises(PlanError, match=r"weight: the destination is a torch\.sparse_"):
        gpudcp.load({"weight": torch.zeros(3, 4).to_sparse(layout=SPARSE[kind]().layout)}, tmp_path)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_comes_back_where_stock_cannot_save_it(tmp_path: Path, layout: torch.layout) -> None:
    """Both kinds, as objects."""
    rows = [torch.arange(2.0), torch.arange(5.0) * 3]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(CheckpointException):
        dcp.save({"batch": nested}, checkpoint_id=tmp_path / "stock")

    gpudcp.save({"batch": nested}, tmp_path / "ours")
    for load in (dcp.load, gpudcp.load):
        found = {"batch": torch.nested.nested_tensor([row * 0 for row in rows], layout=layout)}
        load(found, checkpoint_id=tmp_path / "ours")
        assert found["batch"].layout == layout
        assert [part.tolist() for part in found["batch"].unbind()] == [row.tolist() for row in rows]


def test_a_wrapper_subclass_comes_back_where_stock_cannot_load_it(tmp_path: Path) -> None:
    """TwoTensor has two tensors inside and no memory: stock saves it and refuses to load it, gpudcp brings it back."""
    two = TwoTensor(torch.arange(3.0), torch.arange(3.0) * 2)
    dcp.save({"two": two}, checkpoint_id=tmp_path / "stock")
    with pytest.raises(CheckpointException, match="TwoTensor"):
        dcp.load({"two": TwoTensor(torch.zeros(3), torch.zeros(3))}, checkpoint_id=tmp_path / "stock")

    with torch.serialization.safe_globals([TwoTensor]):
        gpudcp.save({"two": two}, tmp_path / "ours")
        for load in (dcp.load, gpudcp.load):
            found: dict[str, Any] = {"two": TwoTensor(torch.zeros(3), torch.zeros(3))}
            load(found, checkpoint_id=tmp_path / "ours")
            assert type(found["two"]) is TwoTensor
            assert torch.equal(found["two"].a, two.a)
            assert torch.equal(found["two"].b, two.b)


def test_what_stock_saved_of_a_wrapper_subclass_runs_no_code_unasked(tmp_path: Path) -> None:
    """gpudcp refuses the type by name, and loads it, as stock cannot, for who trusts the file."""
    two = TwoTensor(torch.arange(3.0), torch.arange(3.0) * 2)
    dcp.save({"two": two}, checkpoint_id=tmp_path)
    found: dict[str, Any] = {"two": TwoTensor(torch.zeros(3), torch.zeros(3))}
    with pytest.raises(UnsafeCheckpointError, match=r"two.*TwoTensor") as told:
        gpudcp.load(found, tmp_path)
    assert told.value.refused == "torch.testing._internal.two_tensor.TwoTensor"
    gpudcp.load(found, tmp_path, options=gpudcp.Options(trust_pickle=True))
    assert torch.equal(found["two"].b, two.b)


def test_a_subclass_is_an_object_that_must_be_known_to_be_harmless(tmp_path: Path) -> None:
    """The save warns with key, type and remedy; the load refuses by default and obeys both remedies."""
    tagged = VALUES.as_subclass(Tagged)
    with pytest.warns(UserWarning, match=r"trust_pickle=True.*weight: .*Tagged"):
        gpudcp.save({"weight": tagged}, tmp_path)
    found: dict[str, Any] = {"weight": torch.zeros(4, 4).as_subclass(Tagged)}

    with pytest.raises(UnsafeCheckpointError, match=r"'weight' was not loaded: .*Tagged"):
        gpudcp.load(dict(found), tmp_path)
    gpudcp.load(found, tmp_path, options=gpudcp.Options(trust_pickle=True))
    assert type(found["weight"]) is Tagged
    assert interop_cases.differences(VALUES, found["weight"].as_subclass(torch.Tensor)) == []
    with torch.serialization.safe_globals([Tagged]):
        gpudcp.load(found, tmp_path)


def test_a_subclass_with_memory_keeps_its_type(tmp_path: Path) -> None:
    """Stock can do this too, for types that it was told are safe; each reads its own and the other's."""
    with torch.serialization.safe_globals([Tagged]):
        for name, save in (("stock", dcp.save), ("ours", gpudcp.save)):
            save({"weight": VALUES.as_subclass(Tagged)}, checkpoint_id=tmp_path / name)
            for load in (dcp.load, gpudcp.load):
                found: dict[str, Any] = {"weight": torch.zeros(4, 4).as_subclass(Tagged)}
                load(found, checkpoint_id=tmp_path / name)
                assert type(found["weight"]) is Tagged
                assert interop_cases.differences(VALUES, found["weight"].as_subclass(torch.Tensor)) == []


def test_a_wrapper_subclass_takes_a_plain_tensor(tmp_path: Path) -> None:
    """A destination without memory of its own is filled by its own copy_, as stock fills it."""
    gpudcp.save({"weight": VALUES, "large": torch.arange(300_000.0)}, tmp_path)
    for load in (dcp.load, gpudcp.load):
        found: dict[str, Any] = {
            "weight": TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)),
            "large": TwoTensor(torch.zeros(300_000), torch.zeros(300_000)),
        }
        destination = found["weight"]
        load(found, checkpoint_id=tmp_path)
        assert found["weight"] is destination
        for inside in (destination.a, destination.b):
            assert torch.equal(inside, VALUES)
        assert torch.equal(found["large"].b, torch.arange(300_000.0))


def test_a_wrapper_subclass_is_never_packed(tmp_path: Path) -> None:
    """torch's own planner describes it as a box: the writer refuses, where stock saves what it cannot load."""
    two = TwoTensor(torch.arange(3.0), torch.arange(3.0) * 2)
    with pytest.raises(PlanError, match=r"two: a TwoTensor wraps other tensors and has no memory of its own"):
        gpudcp.save({"two": two}, tmp_path, planner=dcp.DefaultSavePlanner())
    assert [*tmp_path.iterdir()] == []


def test_a_subclass_with_memory_is_packed_as_its_memory_under_torchs_planner(tmp_path: Path) -> None:
    """Which describes it as a box: its values are saved, and go into what the loading side has."""
    gpudcp.save({"weight": VALUES.t().as_subclass(Tagged)}, tmp_path, planner=dcp.DefaultSavePlanner())
    for load in (dcp.load, gpudcp.load):
        found: dict[str, Any] = {"weight": torch.zeros(4, 4).as_subclass(Tagged)}
        load(found, checkpoint_id=tmp_path)
        assert type(found["weight"]) is Tagged
        assert interop_cases.differences(VALUES.t(), found["weight"].as_subclass(torch.Tensor)) == []


def test_a_quantized_tensor_of_another_shape_than_the_metadata_says_is_corrupt(tmp_path: Path) -> None:
    """The item that torch.load reads whole is checked too."""
    dcp.save({"weight": per_tensor(torch.qint8, 0.25, 3)}, checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    described: Any = metadata.state_dict_metadata["weight"]
    described.size = described.chunks[0].sizes = torch.Size([8, 4])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    larger = torch.quantize_per_tensor(torch.zeros(8, 4), 1, 0, torch.qint8)
    with pytest.raises(
        CorruptCheckpointError, match=r"weight: the file holds shape \(4, 4\), its read item has \(8, 4\)"
    ):
        gpudcp.load({"weight": larger}, tmp_path)


def test_a_meta_tensor_is_refused_by_name(tmp_path: Path) -> None:
    """It has nothing to save; stock says so in torch's words."""
    with pytest.raises(CheckpointException):
        dcp.save({"weight": torch.empty(3, device="meta")}, checkpoint_id=tmp_path / "stock")
    with pytest.raises(PlanError, match=r"weight: .*meta has no strided memory to save"):
        gpudcp.save({"weight": torch.empty(3, device="meta")}, tmp_path / "ours")


def test_what_cannot_be_pickled_is_refused_by_name(tmp_path: Path) -> None:
    """An opaque tensor and a lambda: the error names the key and the type, and no checkpoint is left."""
    for value, kind in ((torch.ones(2, 3).to_mkldnn(), "Tensor"), (lambda: 1, "function")):
        with pytest.raises(CheckpointException):
            dcp.save({"key": value}, checkpoint_id=tmp_path / "stock")
        with pytest.raises(PlanError, match=rf"^key: a {kind} cannot be pickled: "):
            gpudcp.save({"key": value}, tmp_path / "ours")
        assert [*(tmp_path / "ours").iterdir()] == []


def test_an_object_item_in_the_file_is_a_torch_save_file(tmp_path: Path) -> None:
    """A sparse tensor stands in the data file as torch.save would write it: torch.load alone reads it."""
    metadata = gpudcp.save({"weight": SPARSE["coo"]()}, tmp_path)
    assert metadata.storage_data is not None
    (info,) = metadata.storage_data.values()
    data = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    assert parts(torch.load(io.BytesIO(data), weights_only=True)) == parts(SPARSE["coo"]())
