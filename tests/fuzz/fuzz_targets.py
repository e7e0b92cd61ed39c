"""What is fuzzed: each target takes any bytes and may raise nothing but errors of gpudcp's tree."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint as dcp

import gpudcp
from gpudcp.errors import CorruptCheckpointError, GpuDcpError
from gpudcp.formats import index as index_format
from gpudcp.formats.archive import check_records, read_records, read_stored_tensor
from gpudcp.formats.checksum import crc32
from gpudcp.formats.envelope import envelope_at
from gpudcp.formats.metadata import decode_metadata
from gpudcp.formats.objects import dump_object, load_object

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("metadata", "trailer", "index", "columns", "envelope", "description", "object", "numpy")


class Target(NamedTuple):
    """A parser, what it begins with, and what makes a checksum right again after a mutation."""

    parse: Callable[[bytes], object]
    seeds: list[bytes]
    repaired: Callable[[bytes], bytes] = bytes


def attempt(target: Target, data: bytes) -> bool:
    """Whether the bytes were taken. Anything but an error of gpudcp's tree is raised, MemoryError in disguise too."""
    try:
        target.parse(target.repaired(data))
    except GpuDcpError as err:
        if isinstance(err.__cause__ or err.__context__, MemoryError):
            raise err.__cause__ or MemoryError from err
        return False
    return True


def with_trailer(pickled: bytes) -> bytes:
    """The pickle as gpudcp ends it."""
    return pickled + struct.pack("<8sQI", b"GPUDCPM1", len(pickled), crc32(pickled))


def archive_of(pickled: bytes, payload: bytes = bytes(64), method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch-save archive around a pickle, with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", payload)
    return buffer.getvalue()


def _description_of(archive: bytes) -> bytes:
    return zipfile.ZipFile(io.BytesIO(archive)).read("archive/data.pkl")


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _parse_archive(data: bytes) -> None:
    def read_at(start: int, nbytes: int) -> bytes:
        assert start >= 0
        assert start + nbytes <= len(data)
        return data[start : start + nbytes]

    place: dict[str, Any] = {"byte_offset": 0, "nbytes": len(data), "path": "file", "fqn": "fqn"}
    # All three, whatever the one before said; what the last says is told.
    for parse in (check_records, read_records):
        with contextlib.suppress(CorruptCheckpointError):
            parse(read_at, **place)
    read_stored_tensor(read_at, **place)


def _load(data: bytes) -> object:
    return load_object(io.BytesIO(data), fqn="fqn", trust_pickle=False)


def _repaired_index(data: bytes) -> bytes:
    """The index with the CRC-32 that its columns have, where they can be read at all."""
    try:
        nbytes = int.from_bytes(data[:8], "little")
        outer = json.loads(data[8 : 8 + nbytes])
        header = json.loads(outer["__metadata__"]["gpudcp"])
        arrays = safetensors.numpy.load(data)
        header.pop("crc32", None)
        header |= {"format": "gpudcp index 1", "metadata_nbytes": 100, "metadata_crc32": 7}
        header["crc32"] = index_format._crc_of(arrays, header)
        return bytes(safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)}))
    except Exception:
        return data


def _small_index() -> bytes:
    """An index of three entries, one of them an object: as the encoder writes it, which writes none so small."""
    box = [[[0, 0], [2, 3]], [[2, 0], [2, 3]]]
    names = json.dumps([["model.weight", "model.bias", "epoch"], {"epoch": ["epoch"]}]).encode()
    arrays: dict[str, Any] = {
        "names": np.frombuffer(zlib.compress(names, 1), dtype=np.uint8),
        "first_rows": np.array([0, 2, 3, 4], np.uint8),
        "property_ids": np.array([0, 0, -1], np.int8),
        "ndims": np.array([2, 1, 0], np.uint8),
        "sizes": np.array([[4, 3], [2, 1], [1, 1]], np.uint8),
        "boxes": np.array(box, np.uint8),
        "row_boxes": np.array([0, 1, 0, 0], np.uint8),
        "path_ids": np.array([0, 0, 0, 0], np.uint8),
        "byte_offsets": np.array([0, 4096, 8192, 12288], np.int32),
        "nbytes": np.array([4096, 4096, 4096, 900], np.int32),
        "payload_offsets": np.array([100, 4200, 8300, -1], np.int32),
        "dtype_ids": np.array([0, 0, 0, -1], np.int8),
        "crcs": np.array([1, 2, -1, 4], np.int64),
    }
    header = {
        "format": "gpudcp index 1",
        "metadata_nbytes": 100,
        "metadata_crc32": 7,
        "version": "1.0.0",
        "checkpoint_id": "/checkpoint",
        "save_id": "0123",
        "modules": [],
        "properties": [["float32", 0, False, 0, False]],
        "paths": ["__0_0.distcp"],
        "dtypes": ["float32"],
    }
    return bytes(safetensors.numpy.save(arrays, {"gpudcp": json.dumps(header)}))


def checkpoint_bytes(directory: Path) -> list[bytes]:
    """The ``.metadata`` of a small checkpoint, as gpudcp and as stock write it, without trailers."""
    state = {"model": {"w": torch.ones(3, 4), "b": torch.zeros(4, dtype=torch.bfloat16)}, "epoch": 3, "note": "x"}
    gpudcp.save(state, directory / "ours")
    dcp.save(state, checkpoint_id=directory / "stock")
    return [
        (directory / "ours/.metadata").read_bytes()[:-20],
        (directory / "stock/.metadata").read_bytes(),
        pickle.dumps(pickle.loads((directory / "stock/.metadata").read_bytes()), 2),
    ]


def _seeds(name: str, directory: Path) -> list[bytes]:
    match name:
        case "metadata" | "trailer":
            return checkpoint_bytes(directory / name)
        case "index" | "columns":
            return [_repaired_index(_small_index())]
        case "envelope":
            envelope = envelope_at(0, torch.float32, (2, 3))
            ours = envelope.prefix + bytes(24) + envelope.suffix_with(crc32(bytes(24)))
            large = envelope_at(0, torch.uint8, (1 << 33,))  # its payload is cut short
            return [ours, _saved(torch.ones(2, 3).T), large.prefix + bytes(24) + large.suffix, _saved({"a": [1]})]
        case "description":
            tensors = (torch.ones(2, 3).T, torch.ones(3, dtype=torch.uint16), torch.ones(3).to(torch.complex64).conj())
            return [_description_of(_saved(each)) for each in tensors]
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    objects: list[object] = [
        *({"epoch": 3, "lrs": [0.1, 0.2], "name": "x"}, (1, [2], {"k": (3, 4)}, {5}), optimizer.state_dict()),
        *(quantized, torch.eye(3).to_sparse(), bytearray(b"abc")),
    ]
    if name == "numpy":
        generator = np.random.default_rng(1)
        objects = [np.arange(4.0), generator, np.float32(1), {"r": range(4)}, np.array([(1, 2.0)], "u1,f8")]
    return [_description_of(dump_object(each)) for each in objects]


@functools.cache
def target(name: str, directory: Path) -> Target:
    """The target of this name; ``directory`` is for the checkpoints that its seeds are taken from."""
    corpus = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    whole = _seeds(name, directory)
    # As often as the corpus, which is mostly hostile as it is.
    seeds = whole * (1 + len(corpus) // len(whole)) + corpus
    match name:
        case "metadata" | "trailer":
            repaired = with_trailer if name == "trailer" else bytes
            return Target(lambda data: decode_metadata(data, path="file", trust_pickle=False), seeds, repaired)
        case "index" | "columns":
            repaired = _repaired_index if name == "columns" else bytes
            return Target(lambda data: index_format.decode_index(data, path="file", nbytes=100, crc=7), seeds, repaired)
        case "envelope":
            return Target(_parse_archive, seeds)
        case "description":
            return Target(_parse_archive, seeds, archive_of)
    return Target(_load, seeds, archive_of)
