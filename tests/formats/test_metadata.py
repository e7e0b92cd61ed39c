"""`.metadata` files: stock reads ours, we read stock's, and bytes that are neither are refused without being run."""

from __future__ import annotations

import gc
import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cases import checkpoints, described, example, with_records
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedTensorProperties
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError
from gpudcp.formats.checksum import crc32
from gpudcp.formats.metadata import _ALLOWED_GLOBALS, VERSION, decode_metadata, encode_metadata
from gpudcp.records import ItemRecords

TRAILER_NBYTES = 20


def encoded(metadata: Metadata, records: ItemRecords) -> bytes:
    return b"".join(encode_metadata(with_records(metadata, records), records).parts())


def decode(data: bytes, *, trust_pickle: bool = False) -> Metadata:
    return decode_metadata(data, path="dir/.metadata", trust_pickle=trust_pickle)


def with_trailer(data: bytes) -> bytes:
    return data + b"GPUDCPM1" + struct.pack("<QI", len(data), crc32(data))


@pytest.fixture
def stock_metadata(tmp_path: Path) -> bytes:
    """The ``.metadata`` that stock writes for a state dict of many kinds."""
    state = {
        "model": {
            "weight": torch.ones(3, 4),
            "bias": torch.zeros(0, dtype=torch.float8_e5m2),
            "scalar": torch.ones(()),
        },
        "optimizer": [{"step": 5, "betas": (0.9, 0.99)}, torch.arange(5)],
        "name": "text",
        "channels_last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    dcp.save(state, checkpoint_id=tmp_path)
    return (tmp_path / ".metadata").read_bytes()


@given(checkpoint=checkpoints())
@settings(max_examples=100, deadline=None)
def test_plain_pickle_loads_what_we_write_equal_in_every_field(checkpoint: tuple[Metadata, ItemRecords]) -> None:
    """Stock reads `.metadata` by pickle.load; what follows the pickle does not disturb it."""
    metadata, records = checkpoint
    expected = with_records(metadata, records)
    loaded = pickle.load(io.BytesIO(encoded(metadata, records)))
    assert loaded == expected
    assert described(loaded) == described(pickle.loads(pickle.dumps(expected)))


@given(checkpoint=checkpoints())
@settings(max_examples=100, deadline=None)
def test_what_we_write_we_read_equal_in_every_field(checkpoint: tuple[Metadata, ItemRecords]) -> None:
    """Through the restricted unpickler: the same classes, not look-alikes."""
    metadata, records = checkpoint
    data = encoded(metadata, records)
    assert described(decode(data)) == described(pickle.loads(data))


def test_stock_without_gpudcp_loads_what_we_write(tmp_path: Path) -> None:
    """In a process where gpudcp cannot be imported, the same values come out, as their repr says."""
    data = encoded(*example())
    (tmp_path / ".metadata").write_bytes(data)
    script = """
        import pickle, sys
        sys.modules["gpudcp"] = None
        with open(".metadata", "rb") as file:
            metadata = pickle.load(file)
        sys.stdout.buffer.write(repr(metadata).encode())
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, check=True
    )
    assert child.stdout.decode() == repr(pickle.loads(data))


def test_what_stock_writes_we_read_equal_in_every_field(stock_metadata: bytes) -> None:
    """Tensors, objects, planner data and storage records of a stock save, its path as a pathlib object included."""
    ours, theirs = decode(stock_metadata), pickle.loads(stock_metadata)
    assert ours == theirs
    assert described(ours) == described(theirs)
    assert isinstance(ours.storage_meta.checkpoint_id, pathlib.Path)  # type: ignore[union-attr]
    assert isinstance(ours.state_dict_metadata["model.weight"], TensorStorageMetadata)
    assert ours.storage_data[MetadataIndex("model.weight", [0, 0])].length > 48
    assert ours.version == VERSION


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_stock_could_have_used_is_read(stock_metadata: bytes, protocol: int) -> None:
    """The opcodes differ, the globals do not."""
    data = pickle.dumps(pickle.loads(stock_metadata), protocol)
    assert described(decode(data)) == described(pickle.loads(stock_metadata))


def test_paths_pickled_by_python_3_13_are_read_by_older_ones(stock_metadata: bytes) -> None:
    """Python 3.13 names the module pathlib._local, which older ones do not have."""
    data = pickle.dumps(pickle.loads(stock_metadata), 2)
    assert data.count(b"cpathlib\nPosixPath\n") == 1
    loaded = decode(data.replace(b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n"))
    assert described(loaded) == described(pickle.loads(stock_metadata))


def test_tensor_properties_from_their_older_home_are_read() -> None:
    """torch 2.3 and before kept the class, and its enumeration, with ShardedTensor."""
    metadata = Metadata({"a": TensorStorageMetadata(ShardedTensorProperties(dtype=torch.int8), torch.Size([2]), [])})  # type: ignore[arg-type]
    data = pickle.dumps(metadata)
    assert b"torch.distributed._shard.sharded_tensor.metadata" in data
    assert described(decode(data)) == described(pickle.loads(data))


def test_the_trailer_is_magic_length_and_checksum_of_the_pickle() -> None:
    """Fixed byte by byte, because older and newer versions must read each other's."""
    data = encoded(*example())
    pickled = data[:-TRAILER_NBYTES]
    assert pickletools.optimize(pickled)  # a whole pickle, up to its STOP
    assert pickled.endswith(b".")
    assert data == with_trailer(pickled)


def test_every_flipped_bit_and_every_cut_of_our_file_is_corrupt() -> None:
    """Wherever it is: in the pickle, in the trailer's magic, in its length or in its checksum."""
    data = encoded(*example())
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(CorruptCheckpointError):
            decode(bytes(flipped))
    # Cut right before the trailer it is a stock file: there is nothing left that could be wrong.
    for cut in set(range(len(data))) - {len(data) - TRAILER_NBYTES}:
        with pytest.raises(CorruptCheckpointError):
            decode(data[:cut])


def test_a_wrong_checksum_is_reported_with_both_values() -> None:
    """The error names the file, and what was expected and found."""
    data = bytearray(encoded(*example()))
    expected = struct.unpack("<I", data[-4:])[0]
    data[100] ^= 1
    found = crc32(data[:-TRAILER_NBYTES])
    with pytest.raises(CorruptCheckpointError, match=rf"dir/\.metadata: CRC-32 is {found:#010x}") as caught:
        decode(bytes(data))
    error: Any = caught.value
    assert (error.path, error.expected_crc32, error.found_crc32) == ("dir/.metadata", expected, found)


def test_a_wrong_length_is_reported_with_both_values() -> None:
    """Bytes missing from, or added to, the pickle that the trailer speaks of."""
    data = encoded(*example())
    with pytest.raises(CorruptCheckpointError, match=rf"speaks of {len(data) - 20} bytes, {len(data) - 21} stand"):
        decode(data[1:])
    with pytest.raises(CorruptCheckpointError, match="speaks of"):
        decode(b"\0" + data)


@pytest.mark.parametrize("rest", [b"\0", b"GPUDCPM1", b"GPUDCPM1" + bytes(11), bytes(20), bytes(500)])
def test_bytes_after_a_pickle_that_are_no_trailer_are_corrupt(stock_metadata: bytes, rest: bytes) -> None:
    """A trailer that lost a byte must not pass for a file without one."""
    with pytest.raises(CorruptCheckpointError, match="is no trailer"):
        decode(stock_metadata + rest)
    with pytest.raises(CorruptCheckpointError, match="is no trailer"):
        decode(stock_metadata + rest, trust_pickle=True)


def test_a_pickle_that_ends_before_its_trailer_says_is_corrupt(stock_metadata: bytes) -> None:
    """A right checksum over more than the pickle hides nothing behind the STOP."""
    with pytest.raises(CorruptCheckpointError, match="is no trailer"):
        decode(with_trailer(stock_metadata + b"more"))


class _Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("has_trailer", [False, True])
def test_code_in_metadata_is_refused_and_not_run(tmp_path: Path, protocol: int, has_trailer: bool) -> None:
    """A right checksum makes no pickle safe; the error names the global, the file and the way out."""
    flag = tmp_path / "executed"
    for function, *args in ((os.system, f"touch {flag}"), (eval, f"open({str(flag)!r}, 'w')"), (open, str(flag), "w")):
        data = pickle.dumps(_Calls(function, *args), protocol)
        if protocol > 0:
            data = pickle.dumps(Metadata({}, planner_data=_Calls(function, *args)), protocol)
        with pytest.raises(UnsafeCheckpointError, match=r"^dir/\.metadata: .*trust_pickle=True") as caught:
            decode(with_trailer(data) if has_trailer else data)
        refused = caught.value.refused  # type: ignore[attr-defined]
        assert refused.endswith(f".{function.__name__}")
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.refused) == (str(caught.value), refused)
    assert not flag.exists()


REFUSED = [
    *("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.getattr"),
    *("builtins.__import__", "builtins.open", "builtins.type", "builtins.object", "builtins.bytearray"),
    *(
        "torch.load",
        "torch.Tensor",
        "torch.tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
    ),
    *("functools.partial", "operator.attrgetter", "codecs.encode", "copyreg._reconstructor", "collections.Counter"),
    *("torch.distributed.checkpoint.metadata.os", "torch.distributed.checkpoint.metadata.Enum"),
    *("torch.distributed.checkpoint.filesystem.FileSystemWriter", "torch.serialization.load", "pathlib.os"),
    *("gpudcp.options.Options", "no_such_module.name", "torch.no_such_name"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_every_global_outside_the_list_is_refused_without_an_import(name: str) -> None:
    """Also those of modules that the list knows, and those that do not exist."""
    module, _, attribute = name.rpartition(".")
    with pytest.raises(UnsafeCheckpointError) as caught:
        decode(f"c{module}\n{attribute}\n.".encode())
    assert caught.value.refused == name  # type: ignore[attr-defined]
    assert "no_such_module" not in sys.modules


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "list.append"),
        ("torch", "Size.__class__"),
        ("torch.serialization", "_get_layout.__globals__"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
    ],
)
def test_dotted_names_reach_nothing_inside_an_allowed_global(module: str, name: str) -> None:
    """Protocol 4 would look up attributes of attributes."""
    text = b"".join(b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name))
    with pytest.raises(UnsafeCheckpointError) as caught:
        decode(b"\x80\x04" + text + b"\x93.")
    assert caught.value.refused == f"{module}.{name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(map(".".join, _ALLOWED_GLOBALS)))
def test_no_pickle_can_change_what_it_names(path: str) -> None:
    """BUILD sets attributes of whatever it is given: on a class of torch or Python it would for the whole process."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module.removesuffix("._local")), name)
    before = dict(vars(found)) if hasattr(found, "__dict__") else {}
    push = f"c{module}\n{name}\n".encode()
    attribute = b"X\x05\x00\x00\x00extraK\x01"
    for state in (b"}(" + attribute + b"u", b"N}(" + attribute + b"u\x86"):
        with pytest.raises(CorruptCheckpointError):
            decode(b"\x80\x02" + push + state + b"b.")
    try:
        assert not hasattr(found, "extra")
        assert (dict(vars(found)) if hasattr(found, "__dict__") else {}) == before
    finally:
        if hasattr(found, "extra"):
            del found.extra
    assert described(decode(encoded(*example()))) == described(pickle.loads(encoded(*example())))


class Opaque:
    """Something that a planner of somebody's own may put into planner data."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Opaque

    __hash__ = None  # type: ignore[assignment]


def test_pickled_code_runs_only_on_demand() -> None:
    """trust_pickle is Python's own pickle, with the trailer still checked."""
    metadata = Metadata({}, planner_data={"key": Opaque()}, storage_meta=StorageMeta())
    data = with_trailer(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match=r"test_metadata\.Opaque"):
        decode(data)
    assert decode(data, trust_pickle=True) == metadata
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        decode(data.replace(b"key", b"kex"), trust_pickle=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N.",
        b"\x80\x04",
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(StorageMeta()),
        pickle.dumps(Metadata(state_dict_metadata=[])),  # type: ignore[arg-type]
        pickle.dumps(Metadata({}))[:-1],
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n.",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81.",
        b"\x80\x02ctorch\nSize\n(X\x01\x00\x00\x00aK\x01tR.",
        b"PK\x03\x04 not a pickle at all",
    ],
)
def test_bytes_that_are_no_metadata_are_corrupt(data: bytes) -> None:
    """Pickles of other things, halves of pickles, a bare class, an instance that was never filled."""
    with pytest.raises(CorruptCheckpointError, match=r"^dir/\.metadata: ") as caught:
        decode(data)
    assert caught.value.path == "dir/.metadata"  # type: ignore[attr-defined]
    with pytest.raises(CorruptCheckpointError):
        decode(with_trailer(data))


ORIGINALS = [pickle.dumps(with_records(*example()), protocol) for protocol in (2, 4)]
ORIGINALS.append(encoded(*example())[:-TRAILER_NBYTES])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A pickle with some bytes overwritten, put in or taken out; or any bytes."""
    data = bytearray(draw(st.sampled_from(ORIGINALS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.usefixtures("bounded_memory")
@given(data=damaged() | st.binary(max_size=80), has_trailer=st.booleans())
@settings(max_examples=600, deadline=None)
def test_damaged_pickles_give_metadata_or_an_error_of_our_own(data: bytes, has_trailer: bool) -> None:
    """Without a trailer, and with one that is right, so that the pickle itself is what must be survived."""
    try:
        metadata = decode(with_trailer(data) if has_trailer else data)
    except (CorruptCheckpointError, UnsafeCheckpointError):
        return
    assert type(metadata) is Metadata
    assert isinstance(metadata.state_dict_metadata, dict)


def test_the_garbage_collector_is_left_as_it_was() -> None:
    """Reading pauses it; an error must not leave it off, nor a success switch it on."""
    assert gc.isenabled()
    with pytest.raises(CorruptCheckpointError):
        decode(b"")
    decode(encoded(*example()))
    assert gc.isenabled()
    gc.disable()
    try:
        decode(encoded(*example()))
        assert not gc.isenabled()
    finally:
        gc.enable()
