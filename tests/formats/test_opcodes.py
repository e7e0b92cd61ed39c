"""Pickles that would take memory, time or the process out of all proportion to their length are refused unread."""

from __future__ import annotations

import collections
import datetime
import fractions
import io
import pickle
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cases import example, with_records
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError
from gpudcp.formats import opcodes
from gpudcp.formats.archive import read_stored_tensor
from gpudcp.formats.metadata import decode_metadata, encode_metadata
from gpudcp.formats.objects import dump_object, load_object
from gpudcp.formats.opcodes import MOST_NBYTES_PER_BYTE, RefusedPickleError, check_opcodes

SET = b"cbuiltins\nset\n"
LIST = b"cbuiltins\nlist\n"
INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
# Each takes more than memory allows, for ever, or ends the process, in a C unpickler that is not kept from it.
BOMBS = {
    "a memo of 2^31 places": b"\x80\2Nr\xff\xff\xff\x7f.",
    "a memo of 10^11 places": b"Np99999999999\n.",
    "bytes said to be 4 GiB": b"B\xff\xff\xff\xff.",
    "text said to be 2 GiB": b"X\xff\xff\xff\x7f.",
    "a bytearray said to be 1 TiB": b"\x80\5\x96\0\0\0\0\0\1\0\0.",
    "bytes said to be 1 TiB": b"\x80\4\x8e\0\0\0\0\0\1\0\0.",
    "an integer of 2 GiB": b"\x80\2\x8b\xff\xff\xff\x7f.",
    "a key of 2^60 parts": b"}N" + b"q\0h\0\x86" * 60 + b"Ns.",
    "a key made of an index of an index": b"}K\1"
    + b"q\0"
    + (INDEX + b")\x81}(X\3\0\0\0fqnh\0X\6\0\0\0offseth\0ubq\0") * 40
    + b"Ns.",
    "an item of a set, 2^60 parts": b"\x80\4\x8f(N" + b"q\0h\0\x86" * 60 + b"\x90.",
    "a frozenset of 2^60 parts": b"\x80\4(N" + b"q\0h\0\x86" * 60 + b"\x91.",
    "a key a million deep": b"}N" + b"\x85" * 1_000_000 + b"Ns.",
    "a set of a tuple a million deep": SET + b"]N" + b"\x85" * 1_000_000 + b"a\x85R.",
    "a list copied ten thousand times": b"](" + b"N" * 50_000 + b"eq\0" + (LIST + b"h\0\x85R") * 10_000 + b".",
    "a text listed ten thousand times": b"X\x50\xc3\0\0"
    + b"a" * 50_000
    + b"q\0"
    + (LIST + b"h\0\x85R") * 10_000
    + b".",
    "a state given to ten thousand instances": b"}("
    + b"".join(b"K%bJ%b" % (bytes((n % 256,)), n.to_bytes(4, "little")) for n in range(20_000))
    + b"uq\0"
    + (INDEX + b")\x81h\0b") * 10_000
    + b".",
    "half a million sets": b"\x80\4" + b"\x8f" * 500_000 + b".",
    "a list filled after it was copied": b"]q\0" + LIST + b"h\0\x85q\x010h\0(" + b"N" * 1000 + b"e.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_without_setting_it_off(name: str) -> None:
    """In .metadata, with a trailer or without: the bytes are walked, and no more memory is taken than they have."""
    with pytest.raises(RefusedPickleError):
        check_opcodes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            decode_metadata(BOMBS[name], path=".metadata", trust_pickle=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_NBYTES_PER_BYTE * len(BOMBS[name]) + (1 << 20)


def archive_of(pickled: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch-save archive around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(64))
    return buffer.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_for_a_tensors_description_is_refused(name: str) -> None:
    """Corrupt, or too long for the description of a tensor and so none."""
    data = archive_of(BOMBS[name])
    try:
        found = read_stored_tensor(
            lambda start, nbytes: data[start : start + nbytes], byte_offset=0, nbytes=len(data), path="file", fqn="fqn"
        )
    except CorruptCheckpointError:
        return
    assert found is None


def load(data: bytes) -> object:
    return load_object(io.BytesIO(data), fqn="fqn", trust_pickle=False)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


TWICE_A_TUPLE: Any = ()
for _ in range(60):
    TWICE_A_TUPLE = (TWICE_A_TUPLE, TWICE_A_TUPLE)


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 1 << 40),
        Call(torch.Tensor, 1 << 20, 1 << 20),
        Call(torch.UntypedStorage, 1 << 40),
        Call(torch.FloatStorage, 1 << 40),
        Call(list, range(1 << 40)),
        Call(collections.Counter, range(1 << 40)),
        Call(fractions.Fraction, "1e999999999"),
        Call(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (1 << 40,), None),
        Call(
            torch._utils._rebuild_qtensor,
            None,
            0,
            (1 << 20, 1 << 20),
            (1, 1),
            (torch.per_tensor_affine, 1.0, 0),
            False,
            None,
        ),
        [Call(datetime.date, 2020, 1, 1), Call(bytearray, 1 << 40)],
        [np.float32(1), Call(bytearray, 1 << 40)],
    ],
)
def test_a_call_that_makes_much_of_little_is_refused(value: Any) -> None:
    """All of them are of functions that torch's list, or ours, takes for harmless."""
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeCheckpointError, match="honest pickle"):
            load(archive_of(pickle.dumps(value, 2)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("name", [name for name in BOMBS if "\4" not in BOMBS[name][:2].decode("latin1")])
def test_a_bomb_in_an_object_is_refused(name: str) -> None:
    """Also where the bomb is none for torch, whose unpickler is written in Python: it may load, or be refused."""
    if name in ("a list filled after it was copied", "a memo of 2^31 places"):
        pytest.skip("no bomb there" if "list" in name else "torch's memo is a dict, and what is put in it is refused")
    with pytest.raises((CorruptCheckpointError, UnsafeCheckpointError)):
        load(archive_of(BOMBS[name]))


def test_a_range_in_place_of_arguments_is_refused() -> None:
    """torch calls with all the numbers in it: found by fuzzing."""
    pickled = b"\x80\2cbuiltins\nlist\ncbuiltins\nrange\nK\0\x8a\6\0\0\0\0\0\1K\1\x87RR."
    with pytest.raises(UnsafeCheckpointError, match="no tuple"):
        load(archive_of(pickled))


def test_values_that_hold_themselves_are_read() -> None:
    """They are filled after they were used, and pay for it only where calls copy."""
    value: list[Any] = [1]
    value.append(value)
    found: Any = load(dump_object(value))
    assert found[0] == 1
    assert found[1] is found


def test_records_that_share_their_bytes_are_refused() -> None:
    """A thousand names for one stretch of bytes would be read, and checked, a thousand times."""
    data = bytearray(archive_of(pickle.dumps([1], 2)))
    first = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    data[first + 20 : first + 28] = (len(data) - 100).to_bytes(4, "little") * 2
    with pytest.raises(CorruptCheckpointError):
        load(bytes(data))


def test_a_zip_bomb_is_refused() -> None:
    """A compressed record of a thousand times its archive's length; of forty times, it is read."""
    text = {"a": "x" * 40_000_000}
    with pytest.raises(CorruptCheckpointError, match="compressed into"):
        load(archive_of(pickle.dumps(text, 2), zipfile.ZIP_DEFLATED))
    small = {"a": "x" * 10_000}
    assert load(archive_of(pickle.dumps(small, 2), zipfile.ZIP_DEFLATED)) == small


def test_pickles_beyond_the_bound_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the documentation names: the check would take too long."""
    monkeypatch.setattr(opcodes, "MOST_CHECKED_NBYTES", 100)
    bomb = BOMBS["a memo of 10^11 places"]
    assert check_opcodes(bomb + bytes(101 - len(bomb))) is None
    with pytest.raises(RefusedPickleError):
        check_opcodes(bomb + bytes(100 - len(bomb)))


@pytest.mark.parametrize("protocol", range(6))
def test_honest_metadata_passes(protocol: int) -> None:
    """Of every protocol, and as gpudcp emits it."""
    metadata, records = example()
    pickled = pickle.dumps(with_records(metadata, records), protocol)
    seen = check_opcodes(pickled)
    assert seen is not None
    assert seen.end == len(pickled)
    assert check_opcodes(b"".join(encode_metadata(with_records(metadata, records), records).parts())) is not None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=8) | st.tuples(st.integers(), st.text(max_size=4)), inner, max_size=8)
        | st.sets(st.integers() | st.text(max_size=4), max_size=8)
        | st.frozensets(st.tuples(st.integers()), max_size=4)
        | st.builds(MetadataIndex, st.text(max_size=9), st.just(torch.Size([1, 2])), st.integers())
        | st.builds(collections.OrderedDict, st.just([(1, 2)]))
    ),
    max_leaves=40,
)


@given(value=VALUES, protocol=st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_what_a_pickler_writes_passes(value: object, protocol: int) -> None:
    """Whatever it is of, shared parts and all."""
    pickled = pickle.dumps([value, value, (value, 1)], protocol)
    seen = check_opcodes(pickled)
    assert seen is not None
    assert seen.end == len(pickled)
