"""The index beside .metadata: the same metadata, bound to its file, and nothing read that contradicts itself."""

from __future__ import annotations

import json
import logging
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import gpudcp
from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats import index
from gpudcp.views import ColumnMetadata

STATE = {
    "nested": {"a": torch.arange(12.0).reshape(3, 4), "list": [torch.tensor(1), 2]},
    "half": torch.ones(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "object": {"b": 1},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LEAST_ROWS", 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    gpudcp.save({**STATE, "quantized": quantized(1.0, 0.1)}, path)
    assert (path / ".metadata.index").exists()
    return path


def quantized(value: float, scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.full((3,), value), scale, 0, torch.qint8)


def blank() -> dict[str, Any]:
    return {
        "nested": {"a": torch.zeros(3, 4), "list": [torch.tensor(0), 0]},
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.0),
        "quantized": quantized(0.0, 0.2),
        "object": {"b": 0},
    }


def check_loads(path: Path) -> None:
    state = blank()
    gpudcp.load(state, path)
    assert torch.equal(state["nested"]["a"], STATE["nested"]["a"])  # type: ignore[index]
    assert state["nested"]["list"] == [torch.tensor(1), 2]
    assert torch.equal(state["half"], torch.ones(5, dtype=torch.bfloat16))
    assert state["scalar"] == 2.5
    assert torch.equal(state["quantized"].dequantize(), quantized(1.0, 0.1).dequantize())
    assert state["object"] == {"b": 1}


def test_the_index_says_what_the_pickle_says(checkpoint: Path) -> None:
    """Every field, in every order of comparison."""
    found = gpudcp.GpuStorageReader(checkpoint).read_metadata()
    assert isinstance(found, ColumnMetadata)
    expected = dcp.FileSystemReader(checkpoint).read_metadata()
    assert expected.storage_meta is not None
    assert found.storage_meta is not None
    expected.storage_meta.load_id = found.storage_meta.load_id
    assert found == expected
    assert expected == found
    assert list(found.state_dict_metadata) == list(expected.state_dict_metadata)
    # What rides on stock's records is no field of theirs.
    assert {i: vars(info)["gpudcp"] for i, info in found.storage_data.items()} == {
        i: vars(info)["gpudcp"] for i, info in expected.storage_data.items()
    }


def test_loads_through_the_index_and_without_it_are_the_same(checkpoint: Path) -> None:
    """The index is read if it is there."""
    check_loads(checkpoint)
    (checkpoint / ".metadata.index").unlink()
    assert not isinstance(gpudcp.GpuStorageReader(checkpoint).read_metadata(), ColumnMetadata)
    check_loads(checkpoint)


def test_slices_and_shards_are_read_through_the_index(tmp_path: Path) -> None:
    """Boxes that differ from what was saved, by torch's planner too."""
    whole = torch.arange(600.0).reshape(20, 30)
    gpudcp.save({"t": whole}, tmp_path)
    for load in (gpudcp.load, dcp.load):
        found = {"t": torch.zeros(20, 30)}
        load(found, checkpoint_id=tmp_path)
        assert torch.equal(found["t"], whole)


def test_an_index_of_another_metadata_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    """Whoever replaces .metadata need not know of the index."""
    other = tmp_path / "other"
    gpudcp.save({"t": torch.ones(3)}, other)
    (checkpoint / ".metadata.index").replace(other / ".metadata.index")
    found = {"t": torch.zeros(3)}
    gpudcp.load(found, other)
    assert torch.equal(found["t"], torch.ones(3))


def test_a_save_without_an_index_removes_the_old_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does stock's metadata leave it without effect."""
    monkeypatch.setattr(index, "LEAST_ROWS", 1000)
    gpudcp.save({"t": torch.ones(3)}, checkpoint)
    assert not (checkpoint / ".metadata.index").exists()


def test_a_broken_index_is_passed_over_with_a_warning(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any flipped bit of it: the pickle says the same, slower."""
    path = checkpoint / ".metadata.index"
    data = path.read_bytes()
    expected = dcp.FileSystemReader(checkpoint).read_metadata()
    passed_over = 0
    for place in range(8, len(data), 61):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = gpudcp.GpuStorageReader(checkpoint).read_metadata()
        passed_over += not isinstance(found, ColumnMetadata)
        assert found.storage_meta is not None
        assert expected.storage_meta is not None
        expected.storage_meta.load_id = found.storage_meta.load_id
        assert found == expected
    assert passed_over > 10
    path.write_bytes(data[: len(data) // 2])
    check_loads(checkpoint)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("path_ids", 5),
        ("byte_offsets", -1),
        ("row_boxes", 99),
        ("first_rows", 1),
        ("ndims", 9),
        ("property_ids", 77),
        ("dtype_ids", 50),
    ],
)
def test_columns_that_contradict_each_other_are_refused(checkpoint: Path, name: str, values: int) -> None:
    """Whoever writes an index with a right checksum cannot make a reader step outside of a table."""
    import safetensors.numpy

    data = (checkpoint / ".metadata.index").read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gpudcp"])
    arrays = safetensors.numpy.load(data)
    arrays[name] = arrays[name].astype(np.int64)
    arrays[name][0] = values
    del header["crc32"]
    header["crc32"] = index._crc_of(arrays, header)
    forged = safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)})
    with pytest.raises(CorruptCheckpointError, match="contradict"):
        index.decode_index(forged, path="p", nbytes=header["metadata_nbytes"], crc=header["metadata_crc32"])


def test_tensors_without_a_box_are_refused(checkpoint: Path) -> None:
    """A row of such a tensor would have nothing to point at."""
    import safetensors.numpy

    data = (checkpoint / ".metadata.index").read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gpudcp"])
    arrays = safetensors.numpy.load(data)
    arrays["boxes"], arrays["row_boxes"] = arrays["boxes"][:0].copy(), np.zeros_like(arrays["row_boxes"])
    del header["crc32"]
    header["crc32"] = index._crc_of(arrays, header)
    forged = safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)})
    with pytest.raises(CorruptCheckpointError, match="contradict"):
        index.decode_index(forged, path="p", nbytes=header["metadata_nbytes"], crc=header["metadata_crc32"])


@pytest.mark.parametrize(
    "bomb", ["names that inflate", "boxes without dimensions", "a name twice", "a name that is none"]
)
def test_columns_that_say_more_than_they_hold_are_refused(checkpoint: Path, bomb: str) -> None:
    """Arrays of no bytes can have any length, and compressed names nearly any: no memory is taken for either."""
    import safetensors.numpy

    data = (checkpoint / ".metadata.index").read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gpudcp"])
    arrays = safetensors.numpy.load(data)
    names, nested = json.loads(zlib.decompress(arrays["names"].tobytes()))
    if bomb == "boxes without dimensions":
        arrays["boxes"] = np.zeros((1 << 40, 2, 0), dtype=np.uint8)
        arrays["sizes"] = np.zeros((len(names), 0), dtype=np.uint8)
        arrays["ndims"] = np.zeros(len(names), dtype=np.uint8)
    else:
        names[0] = {"names that inflate": "x" * (1 << 28), "a name twice": names[1], "a name that is none": 7}[bomb]
        arrays["names"] = np.frombuffer(zlib.compress(json.dumps([names, nested]).encode()), dtype=np.uint8)
    del header["crc32"]
    header["crc32"] = index._crc_of(arrays, header)
    forged = safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)})
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=r"contradict|names of more than"):
            index.decode_index(forged, path="p", nbytes=header["metadata_nbytes"], crc=header["metadata_crc32"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (8 << 20) + 2 * index.MOST_INFLATION * len(forged)


def test_a_path_outside_of_the_directory_is_refused(checkpoint: Path) -> None:
    """The index is no way around that check."""
    import safetensors.numpy

    path = checkpoint / ".metadata.index"
    data = path.read_bytes()
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gpudcp"])
    header["paths"] = ["../outside"]
    del header["crc32"]
    arrays = safetensors.numpy.load(data)
    header["crc32"] = index._crc_of(arrays, header)
    path.write_bytes(safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)}))
    with pytest.raises(gpudcp.errors.UnsafeCheckpointError, match="outside"):
        gpudcp.load(blank(), checkpoint)
