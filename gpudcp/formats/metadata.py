"""`.metadata`: a pickled torch Metadata, then a trailer that pickle ignores. Read without running any code.

What reading it takes is bounded by its length: see `gpudcp.formats.opcodes`.

Trailer: 8 bytes magic, the pickle's length as 8 bytes little-endian, its CRC-32 as 4. Stock files have none.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from gpudcp.collector import collector_paused
from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import dtype_name
from gpudcp.formats.emit import Emitted, emit_metadata
from gpudcp.formats.opcodes import check_opcodes
from gpudcp.records import ItemRecords
from gpudcp.views import ColumnMetadata

FILE_NAME = ".metadata"
VERSION = "1.0.0"
"""The version that stock DCP writes into Metadata, and the format that this package writes."""

_MAGIC = b"GPUDCPM1"
_TRAILER = struct.Struct("<8sQI")

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED_GLOBALS = frozenset(
    {
        *(
            (f"{_CHECKPOINT}.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        # Where torch 2.3 and before kept them.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", dtype_name(value)) for value in vars(torch).values() if isinstance(value, torch.dtype)),
        *(("builtins", name) for name in ("set", "frozenset", "list", "dict", "tuple", "complex")),
        ("collections", "OrderedDict"),
        *(
            (module, name)
            for module in ("pathlib", "pathlib._local")  # Python 3.13 pickles the second
            for name in ("PosixPath", "PurePosixPath", "Path", "PurePath", "PureWindowsPath")
        ),
    }
)


class EncodedMetadata:
    """The bytes of a ``.metadata`` file, made as its parts are asked for, which is once."""

    def __init__(self, pickled: Emitted) -> None:
        self._parts = pickled.parts
        self.pickle_nbytes = pickled.nbytes
        self.crc32 = 0
        """Of the pickle, without the trailer; when all parts were made."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.pickle_nbytes + TRAILER_NBYTES

    def parts(self) -> Iterator[bytes | memoryview]:
        """The file from its start to its end."""
        for part in self._parts:
            self.crc32 = crc32(part, self.crc32)
            yield part
        yield _TRAILER.pack(_MAGIC, self.pickle_nbytes, self.crc32)


def encode_metadata(metadata: Metadata, records: ItemRecords) -> EncodedMetadata:
    """A ``.metadata`` file that holds ``metadata`` and these records: stock torch reads it as its own.

    ``metadata.storage_data`` must give the same records, as a mapping that pickles as a dict.
    """
    with collector_paused():
        emitted = emit_metadata(metadata, records)
        if emitted is None:
            plain = metadata.plain() if isinstance(metadata, ColumnMetadata) else metadata
            pickled = pickle.dumps(replace(plain, storage_data=dict(metadata.storage_data)))
            emitted = Emitted(len(pickled), iter([pickled]))
    return EncodedMetadata(emitted)


TRAILER_NBYTES = _TRAILER.size


def identity_of(tail: bytes, nbytes: int) -> tuple[int, int] | None:
    """Length and CRC-32 of the pickle in a ``.metadata`` file, as its trailer says.

    Args:
        tail: the file's last `TRAILER_NBYTES` bytes.
        nbytes: the file's length.

    Returns None where there is no trailer, or one of another length.
    """
    if len(tail) < _TRAILER.size:
        return None
    magic, length, crc = _TRAILER.unpack(tail)
    return (length, crc) if magic == _MAGIC and length == nbytes - _TRAILER.size else None


def decode_metadata(data: bytes, *, path: str, trust_pickle: bool) -> Metadata:
    """The Metadata in the bytes of a ``.metadata`` file, ours or stock's.

    Raises:
        CorruptCheckpointError: the trailer does not fit the bytes before it, or they are no pickle of a Metadata.
        UnsafeCheckpointError: the pickle names a global that no checkpoint metadata needs.
    """
    pickle_nbytes = _checked_length(data, path)
    file = io.BytesIO(data)
    try:
        with collector_paused():
            if not trust_pickle:
                # With a trailer too: it tells damage, and anybody can write a right one.
                check_opcodes(data)
            unpickler = pickle.Unpickler if trust_pickle else _Unpickler
            metadata: Any = unpickler(file).load()
    except UnsafeCheckpointError as refused:
        raise UnsafeCheckpointError(f"{path}: {refused}", refused=refused.refused) from None  # type: ignore[attr-defined]
    # Arbitrary bytes make the unpickler raise almost anything: AttributeError, IndexError, UnicodeDecodeError...
    except Exception as err:
        raise CorruptCheckpointError(f"{path}: no readable pickle: {type(err).__name__}: {err}", path=path) from err
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise CorruptCheckpointError(
            f"{path}: holds a {type(metadata).__name__}, not a checkpoint's Metadata", path=path
        )
    if file.tell() != pickle_nbytes:
        raise CorruptCheckpointError(
            f"{path}: the pickle ends at byte {file.tell()}, and the rest, up to byte {len(data)}, is no trailer",
            path=path,
        )
    return metadata


def _checked_length(data: bytes, path: str) -> int:
    """The length of the pickle: what the trailer says, if it is right, or all bytes, if there is none."""
    if len(data) < _TRAILER.size:
        return len(data)
    magic, nbytes, expected = _TRAILER.unpack_from(data, len(data) - _TRAILER.size)
    if magic != _MAGIC:
        return len(data)
    if nbytes != len(data) - _TRAILER.size:
        raise CorruptCheckpointError(
            f"{path}: the trailer speaks of {nbytes} bytes, {len(data) - _TRAILER.size} stand before it", path=path
        )
    if (found := crc32(memoryview(data)[:nbytes])) != expected:
        raise CorruptCheckpointError(
            f"{path}: CRC-32 is {found:#010x}, the trailer says {expected:#010x}",
            path=path,
            expected_crc32=expected,
            found_crc32=found,
        )
    return int(nbytes)


class _Unpickler(pickle.Unpickler):
    """The C unpickler, with every global outside the list refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UnsafeCheckpointError(
                f"the pickle names {module}.{name}, which checkpoint metadata does not need; "
                "if you trust this checkpoint, load it with Options(trust_pickle=True)",
                refused=f"{module}.{name}",
            )
        return _maker(module, name)


@cache
def _maker(module: str, name: str) -> Any:
    """What a pickle gets for a global: it makes the same objects, and it cannot be changed.

    A pickle can set attributes on whatever it names, and so could change the classes of torch, or of Python, for the
    whole process.
    """
    found: Any = getattr(import_module(module.removesuffix("._local")), name)
    if isinstance(found, type) and is_dataclass(found):
        # Not its __call__, as for the others: pickles make dataclasses by NEWOBJ, which wants a class.
        return _Sealed(name, (), {"__new__": lambda _cls: object.__new__(found)})
    return found.__call__ if callable(found) else found


class _Sealed(type):
    """A class whose attributes cannot be set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{cls.__name__}.{name} cannot be set")
