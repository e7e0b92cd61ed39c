"""gpudcp reads what stock torch saved, in all the ways that stock has of saving."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interop_cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.serialization
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

import gpudcp
from gpudcp.errors import CorruptCheckpointError, PlanError

WRITERS: dict[str, Callable[[Path], dcp.FileSystemWriter]] = {
    "one_thread": lambda path: dcp.FileSystemWriter(path, thread_count=1),
    "three_threads": lambda path: dcp.FileSystemWriter(path, thread_count=3),
    "a_file_an_item": lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False),
}


@pytest.fixture
def storage_alignment() -> Iterator[Callable[[int], None]]:
    """Sets torch.save's alignment of records, for one test."""
    config = torch.utils.serialization.config.save
    before = config.storage_alignment

    def set_alignment(nbytes: int) -> None:
        config.storage_alignment = nbytes

    yield set_alignment
    config.storage_alignment = before


@pytest.fixture
def without_crc() -> Iterator[None]:
    """torch.save writes no checksums, for one test."""
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.fixture
def as_rank() -> Iterator[Callable[[int, int], None]]:
    """Makes this process a rank of a world that has no other."""

    def enter(rank: int, nranks: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=nranks, store=FakeStore())

    yield enter
    if dist.is_initialized():
        dist.destroy_process_group()


def save_by_stock(state: dict[str, Any], path: Path, writer: dcp.FileSystemWriter | None = None) -> None:
    dcp.save(state, storage_writer=writer or dcp.FileSystemWriter(path))


def flip_a_bit(path: Path, place: bytes, distance: int = 0) -> None:
    """Flip the lowest bit of the byte at ``distance`` from the one place of the file that holds these bytes."""
    data = bytearray(path.read_bytes())
    assert data.count(place) == 1
    data[data.index(place) + distance] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("case", interop_cases.CASES)
def test_every_value_is_read_bit_for_bit(tmp_path: Path, case: str, writer: str) -> None:
    """All cases, however many files and threads stock wrote them with."""
    save_by_stock(interop_cases.CASES[case](), tmp_path, WRITERS[writer](tmp_path))
    expected = interop_cases.CASES[case]()
    found = interop_cases.blank(expected)

    gpudcp.load(found, tmp_path)

    assert interop_cases.differences(expected, found) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_shards_of_what_stock_saved_whole_are_read(
    tmp_path: Path, as_rank: Callable[[int, int], None], writer: str
) -> None:
    """DTensors of every rank of several meshes take their slices, of transposed tensors too."""
    state = interop_cases.of_shards()
    state |= {"transposed": state["matrix"].t(), "permuted": state["cube"].permute(1, 2, 0)}
    save_by_stock(state, tmp_path, WRITERS[writer](tmp_path))

    problems: list[str] = []
    for mesh_shape, dims in interop_cases.SHARDINGS:
        nranks = torch.Size(mesh_shape).numel()
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        for rank in range(nranks):
            as_rank(rank, nranks)
            mesh = init_device_mesh("cpu", mesh_shape)
            wanted, expected = {}, {}
            for name, tensor in state.items():
                sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
                local = torch.zeros(sizes, dtype=tensor.dtype)
                stride = torch.empty(tensor.shape, device="meta").stride()
                wanted[name] = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=tensor.shape, stride=stride
                )
                expected[name] = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            gpudcp.load(wanted, tmp_path, no_dist=True)
            found = {name: tensor.to_local() for name, tensor in wanted.items()}
            problems += interop_cases.differences(expected, found, f"{mesh_shape} {dims} rank {rank}")
            dist.destroy_process_group()
    assert problems == []


@pytest.mark.parametrize("nbytes", [64, 4096])
def test_any_alignment_of_records_is_read(
    tmp_path: Path, storage_alignment: Callable[[int], None], nbytes: int
) -> None:
    """Stock's padding of records makes no difference, and the payloads are verified."""
    storage_alignment(nbytes)
    save_by_stock(interop_cases.of_views(), tmp_path)
    expected = interop_cases.of_views()
    found = interop_cases.blank(expected)
    reader = gpudcp.GpuStorageReader(tmp_path)

    gpudcp.load(found, storage_reader=reader)

    assert interop_cases.differences(expected, found) == []
    assert reader.report is not None
    verified, _, total, *_ = reader.report.checksum.split(": ")[1].split()
    assert int(verified) == int(total) > 10


def test_items_without_checksums_are_unverified_not_corrupt(tmp_path: Path, without_crc: None) -> None:  # noqa: ARG001
    """What stock wrote with its CRC-32 switched off is loaded, and the report says that nothing was verified."""
    state = {"weight": interop_cases.numbers(40, 5), "ints": interop_cases.numbers(9, dtype=torch.int16), "lr": 0.5}
    save_by_stock(state, tmp_path)
    found = interop_cases.blank(state)
    reader = gpudcp.GpuStorageReader(tmp_path)

    gpudcp.load(found, storage_reader=reader)

    assert interop_cases.differences(state, found) == []
    assert reader.report is not None
    assert "0 of 2 payloads verified" in reader.report.checksum


def test_a_flipped_bit_in_a_tensor_is_found_where_stock_finds_none(tmp_path: Path) -> None:
    """Stock loads a wrong number without a word; gpudcp names the tensor, the file and both checksums."""
    weight = interop_cases.numbers(40, 5)
    save_by_stock({"other": interop_cases.numbers(3), "weight": weight}, tmp_path)
    flip_a_bit(tmp_path / "__0_0.distcp", interop_cases.bits(weight), distance=100)

    by_stock = {"weight": torch.zeros(40, 5)}
    dcp.load(by_stock, checkpoint_id=tmp_path)
    assert not torch.equal(by_stock["weight"], weight)

    with pytest.raises(
        CorruptCheckpointError, match=r"__0_0\.distcp: weight: .*have CRC-32 0x.*, 0x.* was saved"
    ) as told:
        gpudcp.load({"weight": torch.zeros(40, 5)}, tmp_path)
    assert told.value.fqn == "weight"
    assert told.value.path is not None
    assert told.value.path.endswith("__0_0.distcp")
    assert isinstance(told.value.expected_crc32, int)
    assert told.value.expected_crc32 != told.value.found_crc32


def test_a_flipped_bit_in_a_transposed_tensor_is_found(tmp_path: Path) -> None:
    """A payload that is not row-major is verified as it lies in the file."""
    weight = interop_cases.numbers(40, 5).t()
    save_by_stock({"weight": weight}, tmp_path)
    flip_a_bit(tmp_path / "__0_0.distcp", interop_cases.bits(weight.t()), distance=399)
    with pytest.raises(CorruptCheckpointError, match="weight"):
        gpudcp.load({"weight": torch.zeros(5, 40)}, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("kind", ["conjugate", "quantized", "object"])
def test_a_flipped_bit_is_found_in_what_torch_load_reads(tmp_path: Path, kind: str) -> None:
    """Items that only torch.load understands are checked against the checksums of their archive before."""
    plain = interop_cases.numbers(6, 4)
    value: Any
    if kind == "conjugate":
        value = torch.complex(plain, -plain).conj()
        place, blank = interop_cases.bits(torch.complex(plain, -plain)), torch.zeros(6, 4, dtype=torch.complex64)
    elif kind == "quantized":
        value = torch.quantize_per_tensor(plain, 0.5, 3, torch.qint8)
        place, blank = interop_cases.bits(value.int_repr()), torch.quantize_per_tensor(plain * 0, 1, 0, torch.qint8)
    else:
        value, blank = {"inside": (plain, "text")}, {"inside": None}
        place = interop_cases.bits(plain)
    save_by_stock({"value": value}, tmp_path)

    whole = {"value": blank}
    gpudcp.load(whole, tmp_path)
    flip_a_bit(tmp_path / "__0_0.distcp", place, distance=21)

    dcp.load({"value": blank}, checkpoint_id=tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"value.*CRC-32"):
        gpudcp.load({"value": blank}, tmp_path)
    gpudcp.load({"value": blank}, tmp_path, options=gpudcp.Options(verify="off"))


def test_a_checkpoint_of_a_machine_with_the_other_byte_order_is_read(tmp_path: Path) -> None:
    """Its archives say so, and torch.load swaps the bytes."""
    weight = interop_cases.numbers(4, 5)
    save_by_stock({"weight": weight}, tmp_path)
    path = tmp_path / "__0_0.distcp"
    rewritten = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(rewritten, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("byteorder"):
                data = b"big" if sys.byteorder == "little" else b"little"
            elif name.endswith("data/0"):
                data = weight.numpy().byteswap().tobytes()
            target.writestr(name, data)
    path.write_bytes(rewritten.getvalue())
    metadata: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (record,) = metadata.storage_data.values()
    record.length = path.stat().st_size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))

    for load in (dcp.load, gpudcp.load):
        found = {"weight": torch.zeros(4, 5)}
        load(found, checkpoint_id=tmp_path)
        assert torch.equal(found["weight"], weight)


def test_a_file_that_is_no_archive_is_corrupt(tmp_path: Path) -> None:
    """The error says where an archive was expected."""
    save_by_stock({"weight": interop_cases.numbers(40, 5)}, tmp_path)
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp: weight: no torch-save archive at byte 0"):
        gpudcp.load({"weight": torch.zeros(40, 5)}, tmp_path)


def test_metadata_of_old_torch_is_read(tmp_path: Path) -> None:
    """Before 2.4: no version, no storage_meta, the older home of TensorProperties, lists saved as one object."""
    state = {"model": {"weight": interop_cases.numbers(3, 4)}, "list": [1, {"a": 2}], "epoch": 5}
    _version._derived_version = "2_3"
    try:
        save_by_stock(state, tmp_path)
    finally:
        _version._derived_version = None
    path = tmp_path / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    for described in metadata.state_dict_metadata.values():
        if isinstance(described, TensorStorageMetadata):
            described.properties = OldTensorProperties(dtype=described.properties.dtype)  # type: ignore[assignment]
    del metadata.__dict__["storage_meta"], metadata.__dict__["version"]
    path.write_bytes(pickle.dumps(metadata, protocol=2))
    assert b"_shard.sharded_tensor.metadata" in path.read_bytes()

    for load in (dcp.load, gpudcp.load):
        found = interop_cases.blank(state)
        load(found, checkpoint_id=tmp_path)
        assert interop_cases.differences(state, found) == []


def test_what_torch_save_to_dcp_converts_is_read(tmp_path: Path) -> None:
    """A torch.save file, converted by stock's own tool."""
    state = interop_cases.of_nesting()
    torch.save(state, tmp_path / "model.pt")
    torch_save_to_dcp(tmp_path / "model.pt", tmp_path / "converted")
    found = interop_cases.blank(state)
    gpudcp.load(found, tmp_path / "converted")
    assert interop_cases.differences(state, found) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
@pytest.mark.parametrize("save", [dcp.save, gpudcp.save], ids=["stock", "gpudcp"])
@pytest.mark.parametrize("keys", [None, {"model"}, {"optimizer", "list"}])
def test_the_empty_state_dict_load_works_over_our_reader(tmp_path: Path, save: Any, keys: set[str] | None) -> None:
    """Stock's load from keys gives the same whether stock's reader or ours is under it."""
    save(interop_cases.of_nesting(), checkpoint_id=tmp_path)
    expected = _load_state_dict_from_keys(keys, storage_reader=dcp.FileSystemReader(tmp_path))
    found = _load_state_dict_from_keys(keys, storage_reader=gpudcp.GpuStorageReader(tmp_path))
    assert expected
    assert interop_cases.differences(expected, found) == []


def test_compressed_items_are_read_through_torchs_extension(tmp_path: Path) -> None:
    """What stock wrote through its ZStandard extension comes back, tensors and objects."""
    pytest.importorskip("zstandard")
    from torch.distributed.checkpoint._extension import ZStandard

    state = {
        "weight": interop_cases.numbers(300, 100),
        "transposed": interop_cases.numbers(5, 7).t(),
        "text": "x" * 999,
    }
    save_by_stock(state, tmp_path, dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    assert (tmp_path / "__0_0.distcp").stat().st_size < 120_000
    found = interop_cases.blank(state)
    gpudcp.load(found, tmp_path)
    assert interop_cases.differences(state, found) == []


class Rot128(StreamTransformExtension):
    """An extension that only the writing side knows."""

    @staticmethod
    def registry_name() -> str:
        return "stream.rot128"

    @staticmethod
    def from_descriptor(version: str) -> Rot128:  # noqa: ARG004
        return Rot128()

    def get_descriptor(self) -> str:
        return "stream.rot128/1"

    def transform_to(self, output: Any) -> Any:
        return _Rotated(output)

    def transform_from(self, input: Any) -> Any:
        raise NotImplementedError


class _Rotated:
    def __init__(self, output: Any) -> None:
        self._output = output

    def write(self, data: Any) -> int:
        return int(self._output.write(bytes(byte ^ 128 for byte in bytes(data))))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._output.close()


@pytest.mark.parametrize("key", ["weight", "text"])
def test_an_unknown_extension_is_refused_by_name(tmp_path: Path, key: str) -> None:
    """The error names the item and the extension; nothing is loaded from bytes that were not understood."""
    state: dict[str, Any] = {"weight": interop_cases.numbers(3, 4), "text": "hello"}
    save_by_stock(state, tmp_path, dcp.FileSystemWriter(tmp_path, _extensions=[Rot128()]))
    wanted = {key: interop_cases.blank(state[key])}
    before = interop_cases.blank(state[key])
    with pytest.raises(PlanError, match=rf"{key}: was written through stream\.rot128/1, which cannot be undone"):
        gpudcp.load(wanted, tmp_path)
    assert interop_cases.differences(before, wanted[key]) == []
