"""The index beside ``.metadata``: the same, as columns in a safetensors file, opened at once and without pickle.

It is bound to one ``.metadata`` by that file's length and CRC-32, and has a CRC-32 of its own. A checkpoint is whole
without it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties

from gpudcp.arrays import NONE, Column, Int64, narrowed
from gpudcp.columns import CheckpointColumns
from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import dtype_name
from gpudcp.names import Names
from gpudcp.records import ItemRecords
from gpudcp.rows import RowIndices, by_row
from gpudcp.views import ColumnMetadata

SUFFIX = ".index"
"""The index of ``.metadata`` is ``.metadata.index``."""
LEAST_ROWS = 1000
"""A pickle with fewer chunks is read in some 10 ms: not worth a second file."""

MOST_INFLATION = 64
"""How many times the index's length its names may have, unpacked, beyond 1 MiB. Those of layers: some ten times."""

_LEAST_NAMES_NBYTES = 1 << 20
_FORMAT = "gpudcp index 1"
_HEADER = "gpudcp"
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.channels_last_3d)
_LAYOUTS = (torch.strided, torch.sparse_coo)


class IndexColumns(NamedTuple):
    """What an index holds, but for the ``.metadata`` that it is of."""

    arrays: dict[str, Column]
    header: dict[str, Any]

    def encoded(self, *, nbytes: int, crc: int) -> bytes:
        """The index of the checkpoint whose ``.metadata`` has this length and this CRC-32."""
        header = self.header | {"metadata_nbytes": nbytes, "metadata_crc32": crc}
        header["crc32"] = _crc_of(self.arrays, header)
        return safetensors.numpy.save(self.arrays, {_HEADER: json.dumps(header)})


def index_columns(metadata: Metadata, records: ItemRecords) -> IndexColumns | None:
    """What the index of a checkpoint holds.

    Returns None for few rows, and for what has no place in an index: a Metadata of objects, or properties that torch's
    own planners do not make.
    """
    if not (isinstance(metadata, ColumnMetadata) and metadata.is_unchanged) or len(records) < LEAST_ROWS:
        return None
    columns = metadata.columns
    row_records = by_row(records, columns)
    properties = [_encoded_properties(each) for each in columns.properties]
    if row_records is None or None in properties:
        return None
    meta = metadata.storage_meta or StorageMeta()
    arrays: dict[str, Column] = {
        "first_rows": columns.first_rows,
        "property_ids": columns.property_ids,
        "ndims": columns.ndims,
        "sizes": columns.sizes,
        "boxes": columns.boxes,
        "row_boxes": columns.row_boxes,
        "path_ids": row_records.path_ids,
        "byte_offsets": row_records.byte_offsets,
        "nbytes": row_records.nbytes,
        "payload_offsets": row_records.payload_offsets,
        "dtype_ids": np.where(row_records.payload_offsets < 0, NONE, row_records.dtype_ids),
        "crcs": row_records.crcs,
    }
    arrays = {name: narrowed(array) for name, array in arrays.items()}
    arrays["names"] = np.frombuffer(columns.names.packed, dtype=np.uint8)
    header = {
        "format": _FORMAT,
        "version": metadata.version,
        "checkpoint_id": None if meta.checkpoint_id is None else str(meta.checkpoint_id),
        "save_id": meta.save_id,
        "modules": list(meta.modules or []),
        "properties": properties,
        "paths": row_records.paths,
        "dtypes": [dtype_name(dtype) for dtype in row_records.dtypes],
    }
    return IndexColumns(arrays, header)


def decode_index(data: bytes, *, path: str, nbytes: int, crc: int) -> ColumnMetadata | None:
    """The checkpoint's metadata; None where the index is of another ``.metadata``.

    Raises:
        CorruptCheckpointError: the bytes are no index, or contradict each other.
    """
    try:
        return _decoded(data, path, nbytes, crc)
    except CorruptCheckpointError:
        raise
    # Arbitrary bytes make the parsers raise almost anything.
    except Exception as err:
        raise CorruptCheckpointError(f"{path}: no readable index: {type(err).__name__}: {err}", path=path) from err


def _decoded(data: bytes, path: str, nbytes: int, crc: int) -> ColumnMetadata | None:
    header_nbytes = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + header_nbytes])["__metadata__"][_HEADER])
    if header["format"] != _FORMAT or (header["metadata_nbytes"], header["metadata_crc32"]) != (nbytes, crc):
        return None
    arrays = safetensors.numpy.load(data)
    expected = header.pop("crc32")
    if (found := _crc_of(arrays, header)) != expected:
        raise CorruptCheckpointError(
            f"{path}: CRC-32 is {found:#010x}, the header says {expected:#010x}",
            path=path,
            expected_crc32=expected,
            found_crc32=found,
        )
    names = Names.unpacked(arrays["names"].tobytes(), most_nbytes=_LEAST_NAMES_NBYTES + MOST_INFLATION * len(data))
    columns = CheckpointColumns(
        names=names,
        first_rows=arrays["first_rows"].astype(np.int64),
        property_ids=arrays["property_ids"].astype(np.int32),
        properties=tuple(_decoded_properties(*each) for each in header["properties"]),
        ndims=arrays["ndims"].astype(np.int32),
        sizes=arrays["sizes"].astype(np.int64),
        boxes=arrays["boxes"].astype(np.int64),
        row_boxes=arrays["row_boxes"].astype(np.int32),
    )
    numbers = {
        name: arrays[name].astype(np.int64)
        for name in ("path_ids", "byte_offsets", "nbytes", "payload_offsets", "dtype_ids", "crcs")
    }
    _check(columns, numbers, header, path)
    records = ItemRecords(
        indices=RowIndices(columns),
        paths=header["paths"],
        path_ids=numbers["path_ids"].astype(np.int32),
        byte_offsets=numbers["byte_offsets"],
        nbytes=numbers["nbytes"],
        payload_offsets=numbers["payload_offsets"],
        dtypes=[_dtype(name) for name in header["dtypes"]],
        dtype_ids=numbers["dtype_ids"].astype(np.int32),
        crcs=numbers["crcs"],
    )
    meta = StorageMeta(header["checkpoint_id"], header["save_id"], modules=header["modules"])
    return ColumnMetadata(columns, records, storage_meta=meta, version=header["version"])


def _check(columns: CheckpointColumns, numbers: dict[str, Int64], header: dict[str, Any], path: str) -> None:
    """That every number is one of a row that exists, so that nothing later has to ask."""
    entries, rows, dims = len(columns.names), columns.nrows, columns.boxes.shape[2]
    first_rows = columns.first_rows
    ranges = (
        (columns.property_ids, NONE, len(columns.properties)),
        (columns.ndims, 0, dims + 1),
        (columns.row_boxes, 0, max(len(columns.boxes), 1)),
        (numbers["path_ids"], 0, len(header["paths"])),
        (numbers["dtype_ids"], NONE, len(header["dtypes"])),
        (numbers["byte_offsets"], 0, 1 << 62),
        (numbers["nbytes"], 0, 1 << 62),
        (numbers["payload_offsets"], NONE, 1 << 62),
        (numbers["crcs"], NONE, 1 << 32),
        (columns.boxes, 0, 1 << 62),
        (columns.sizes, 0, 1 << 62),
    )
    is_sound = (
        entries == len(columns.numbers)
        and all(type(fqn) is str for fqn in columns.names.fqns)
        # A tensor has a box.
        and (len(columns.boxes) > 0 or bool((columns.property_ids == NONE).all()))
        # No row is as good as a row, for a table that is sized by the number of its boxes.
        and len(columns.boxes) <= max(rows, 1)
        and len(first_rows) == entries + 1 == len(columns.property_ids) + 1 == len(columns.ndims) + 1
        and columns.sizes.shape == (entries, dims)
        and columns.boxes.shape[1:] == (2, dims)
        and first_rows[0] == 0
        and first_rows[-1] == rows
        and bool((np.diff(first_rows) >= 0).all())
        and all(len(column) == rows for column in numbers.values())
        and all(
            not column.size or (int(column.min()) >= low and int(column.max()) < high) for column, low, high in ranges
        )
        and bool((np.diff(first_rows)[columns.property_ids == NONE] == 1).all())
        and bool(((numbers["payload_offsets"] < 0) == (numbers["dtype_ids"] < 0)).all())
        and all(type(each) is str for each in header["paths"])
    )
    if not is_sound:
        raise CorruptCheckpointError(f"{path}: the columns of the index contradict each other", path=path)


def _crc_of(arrays: dict[str, Column], header: dict[str, Any]) -> int:
    crc = crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        crc = crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, crc)
    return crc


def _encoded_properties(each: TensorProperties) -> tuple[Any, ...] | None:
    if type(each) is not TensorProperties or each.layout not in _LAYOUTS or each.memory_format not in _MEMORY_FORMATS:
        return None
    return (
        dtype_name(each.dtype),
        _LAYOUTS.index(each.layout),
        each.requires_grad,
        _MEMORY_FORMATS.index(each.memory_format),
        each.pin_memory,
    )


def _decoded_properties(
    dtype: str, layout: int, requires_grad: bool, memory_format: int, pin_memory: bool
) -> TensorProperties:
    return TensorProperties(
        _dtype(dtype), _LAYOUTS[layout], bool(requires_grad), _MEMORY_FORMATS[memory_format], bool(pin_memory)
    )


def _dtype(name: str) -> torch.dtype:
    # Not by getattr, which would import what torch loads only on demand.
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
