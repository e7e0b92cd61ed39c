"""Objects: what is harmless comes back as it was, and nothing else is believed."""

import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import pickle
import random
import struct
import threading
import types
import uuid
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError
from gpudcp.formats.objects import dump_object, load_object, unsafe_reason

UTC = datetime.timezone.utc
CSR_PARTS = ("crow_indices", "col_indices", "values")
BIT_GENERATORS = [np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64]
_RECORDS = {"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [8, 0], "itemsize": 32}
NATIVE_DTYPES = [
    *(np.dtype(code) for code in ("?", "i1", "u2", "i8", "f2", "f4", "f8", "g", "c8", "c16", "G", "S5", "U3", "V4")),
    *(np.dtype(code) for code in ("M8", "M8[ns]", "m8[25s]")),
    np.dtype([("a", "f4"), ("b", "i8", (2, 3)), ("c", [("x", "i1"), ("y", ">f4")])]),
    np.dtype(_RECORDS),
    np.dtype([("a", "u1"), ("b", "f8")], align=True),
    np.dtype([]),
]
SWAPPED_DTYPES = [np.dtype(code) for code in (">f4", ">U3", ">M8[D]", ">c8")]


def load(data: bytes) -> object:
    return load_object(io.BytesIO(data), fqn="model.extra", trust_pickle=False)


def stock_dump(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def stock_load(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=False)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values have the same types and the same bits, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        if (one.dtype, one.shape, one.flags.fnc) != (other.dtype, other.shape, other.flags.fnc):
            return False
        # Records have padding, which is nobody's.
        by_item = one.dtype.names is not None or one.dtype.hasobject
        return list(one.flat) == list(other.flat) if by_item else one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, (tuple, list, collections.deque)):
        same_limit = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return same_limit and len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        same_default = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        return same_default and [*one] == [*other] and all(map(is_same, one.values(), other.values()))
    if isinstance(one, (np.random.RandomState, np.random.Generator)):
        return is_same(one.__reduce__()[1:], other.__reduce__()[1:])
    if isinstance(one, (np.random.BitGenerator, np.random.SeedSequence, io.BytesIO)):
        return is_same(one.__reduce_ex__(2)[2], other.__reduce_ex__(2)[2])
    if isinstance(one, torch.Tensor):
        if one.layout == torch.sparse_coo:
            return is_same((one._indices(), one._values()), (other._indices(), other._values()))
        if one.layout == torch.sparse_csr:
            return all(is_same(getattr(one, part)(), getattr(other, part)()) for part in CSR_PARTS)
        if one.is_nested:
            return all(map(is_same, one.unbind(), other.unbind()))
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, datetime.datetime | datetime.time):
        return one == other and one.tzinfo == other.tzinfo
    return bool(one == other) or (one != one and other != other)


def used_generators() -> Iterator[object]:
    for kind in BIT_GENERATORS:
        generator = np.random.Generator(kind(5))
        generator.random(3, dtype=np.float32)
        yield generator
        yield generator.bit_generator
        yield generator.bit_generator.state
    legacy = np.random.RandomState(3)
    legacy.standard_normal()
    yield from (legacy, legacy.get_state(), legacy.get_state(legacy=False), np.random.RandomState(np.random.PCG64(1)))
    yield from (np.random.SeedSequence([1, 2], spawn_key=(3,)), np.random.default_rng(), random.Random(1).getstate())


def adam_state() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


PLAIN: list[object] = [
    *(None, True, 7, -(2**63) - 1, 2**2038, 1.5, float("nan"), -0.0, "text \u20ac \ud800", "", b"\xff\0", b""),
    *([1, [2.0, "x"]], (1, ()), {1, 2}, {"a": {"b": [None]}, (1, "k"): b"x"}),
    collections.OrderedDict(a=1, b=[2]),
]
HARMLESS: list[object] = [
    *(2**80, 1 + 2j, bytearray(b"ab"), collections.Counter("aab"), frozenset([1, "a"]), frozenset()),
    *(range(1, 9, 2), slice(1, None, 2), io.BytesIO(b"abc"), io.BytesIO()),
    *(collections.defaultdict(factory, k=1) for factory in (None, int, list, dict, set, float, str, tuple, bool)),
    *(collections.defaultdict(list), collections.deque([1, [2]], 5), collections.deque(), collections.deque([b""])),
    collections.defaultdict(list, k=collections.deque([collections.defaultdict(int, n=np.float32(1))])),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6, UTC),
    *(datetime.date(2020, 1, 2), datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "x"))),
    *(datetime.timedelta(1, 2, 3), UTC),
    *(pathlib.Path("/a/b"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\a\\b")),
    *(argparse.Namespace(lr=[1], at=pathlib.Path("x")), types.SimpleNamespace(b=2)),
    *(uuid.UUID(int=7), decimal.Decimal("-1.50"), decimal.Decimal("NaN"), fractions.Fraction(1, 3)),
    *(torch.Size([1, 2]), torch.bfloat16, torch.device("cuda", 1), torch.strided),
    *(torch.ones(2, 3).t(), (torch.zeros(2), torch.ones(3)[1:]), torch.Generator().get_state(), adam_state()),
    *(torch.eye(3).to_sparse(), {"t": torch.ones(2), "n": np.float64(1)}),
]
NUMPY: list[object] = [
    *(kind(1) for kind in (np.int8, np.uint64, np.intc, np.float16, np.float32, np.float64, np.longdouble)),
    *(np.bool_(True), np.complex64(1j), np.complex128(float("nan")), np.clongdouble(2)),
    *(np.str_("a\u20ac"), np.str_(""), np.bytes_(b"a\0b"), np.void(b"abc")),
    *(np.datetime64(1, "ns"), np.datetime64("nat", "s"), np.timedelta64(5, "25s")),
    *NATIVE_DTYPES,
    *SWAPPED_DTYPES,
    *(np.dtype("O"), np.dtype(("f4", (2,))), np.dtype([("a", "O")])["a"]),
    *(
        array
        for dtype in NATIVE_DTYPES
        for array in (np.zeros((2, 3), dtype), np.zeros((), dtype), np.zeros((0, 3), dtype))
    ),
    *(np.arange(6.0).reshape(2, 3).T, np.asfortranarray(np.ones((400, 5))), np.arange(5)[::2], np.ones((2, 1))),
    *(np.array([1, None, "a", {2: 3}, np.float32(2)], dtype=object), np.array(None, dtype=object), np.empty(0, object)),
    np.array([(1, 2.0)], dtype="u1,f8")[0],
    *used_generators(),
]


@pytest.mark.parametrize("value", [*PLAIN, *HARMLESS, *NUMPY], ids=lambda value: type(value).__name__)
def test_harmless_values_come_back_as_they_were(value: object) -> None:
    """Safely, by trusting pickle, and by stock torch: the same types and bits. A save would warn of none of them."""
    data = dump_object(value)
    assert is_same(load(data), value)
    assert is_same(stock_load(data), value)
    assert is_same(load_object(io.BytesIO(data), fqn="x", trust_pickle=True), value)
    assert unsafe_reason(value, data) is None


@pytest.mark.parametrize("value", [7, [b""], {"a": torch.ones(3)}, np.float32(1), datetime.date(2020, 1, 1)], ids=repr)
def test_a_dump_is_torch_saves_own(value: object) -> None:
    """Byte by byte, but for the deques and defaultdicts."""
    assert dump_object(value) == stock_dump(value)


@pytest.mark.parametrize("dtype", SWAPPED_DTYPES, ids=str)
def test_arrays_of_the_other_byte_order_load_as_stock_loads_them(dtype: np.dtype[Any]) -> None:
    """NumPy itself turns them into the machine's order."""
    value = np.arange(4).astype(dtype)
    loaded: Any = load(dump_object(value))
    assert is_same(loaded, stock_load(dump_object(value)))
    assert loaded.tolist() == value.tolist()


def test_what_other_versions_of_python_and_numpy_write_is_read() -> None:
    """Python 3.13 pickles paths from pathlib._local, NumPy 1 its arrays from numpy.core."""
    path = global_("pathlib._local", "PurePosixPath") + text("a") + text("b") + b"\x86R."
    assert load(archive(path)) == pathlib.PurePosixPath("a/b")
    for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
        assert load(archive(scalar(FLOATS, b"\0" * 8, home) + b".")) == np.float64(0)


def test_flags_that_numpy_1_signed_are_read() -> None:
    """An aligned structure has bit 7 set: NumPy 1 writes -112 for it, NumPy 2 writes 144."""
    value = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    made, arguments, state = value.__reduce__()
    assert load(stock_dump(Reduced(made, arguments, (*state[:7], -112)))) == value


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_compressed_and_nested_tensors_come_back() -> None:
    """torch itself lists the jagged ones, once their module is imported; making one does that."""
    parts = [torch.ones(2), torch.zeros(3)]
    nested = [torch.nested.nested_tensor(parts, layout=layout) for layout in (torch.strided, torch.jagged)]
    for value in (torch.eye(3).to_sparse_csr(), *nested):
        data = dump_object(value)
        assert is_same(load(data), value)
        assert unsafe_reason(value, data) is None


def test_a_jagged_tensor_that_torch_does_not_know_yet_is_refused_with_torchs_advice() -> None:
    """A process that never imported the module of nested tensors is told to."""
    listed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(UnsafeCheckpointError, match=r"must be imported to load nested jagged tensors"):
            load(archive(global_("torch.nested._internal.nested_tensor", "_rebuild_njt") + b"."))
    finally:
        torch.serialization.add_safe_globals(listed)


def test_tensors_of_a_missing_device_land_on_the_cpu() -> None:
    """Also when pickle is trusted."""
    data = dump_object(torch.arange(3)).replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00hpu")
    for trust_pickle in (False, True):
        loaded: Any = load_object(io.BytesIO(data), fqn="x", trust_pickle=trust_pickle)
        assert loaded.device.type == "cpu"
        assert loaded.tolist() == [0, 1, 2]


# What is refused


class Reduced:
    """Pickles as whatever it was told to."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


class Custom:
    """A type of the user's."""


RAN: list[str] = []


def run(what: str) -> None:
    RAN.append(what)


EVIL = {
    "a_users_function": Reduced(run, ("a function of the user's",)),
    "os_system": Reduced(os.system, ("exit 3",)),
    "eval": Reduced(eval, ("RAN.append('eval')",)),
    "exec": Reduced(exec, ("RAN.append('exec')",)),
    "open": Reduced(open, ("/dev/null",)),
    "getattr": Reduced(getattr, (int, "real")),
    "import": Reduced(__import__, ("this",)),
    "type": Reduced(type, ("T", (), {})),
    "a_factory": collections.defaultdict(run),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_refused_and_runs_nothing(evil: object, protocol: int) -> None:
    """In a torch.save file, beside harmless things, or as a bare pickle."""
    RAN.clear()
    for value in (evil, [np.float32(1), datetime.date(2020, 1, 1), {"x": evil}]):
        for data in (stock_dump(value, pickle_protocol=protocol), pickle.dumps(value, protocol)):
            with pytest.raises(UnsafeCheckpointError, match=r"'model.extra'.*trust_pickle=True"):
                load(data)
    assert RAN == []


def test_a_refusal_names_the_global_and_the_remedies() -> None:
    """The message is all that a user gets to see."""
    with pytest.raises(UnsafeCheckpointError) as refusal:
        load(dump_object(Custom()))
    name = f"{__name__}.Custom"
    assert refusal.value.refused == name
    assert f"add_safe_globals([{name}])" in str(refusal.value)
    assert "Options(trust_pickle=True)" in str(refusal.value)
    assert unsafe_reason(Custom(), dump_object(Custom())) == (name, f"{name} is not known to be harmless")


def test_a_refusal_names_what_no_list_allows_rather_than_what_ours_does() -> None:
    """Also where an opcode stops the search for the names."""
    for value, refused in (
        ([np.float32(1), Custom()], f"{__name__}.Custom"),
        ([np.float32(1), 2**9999], "opcode LONG4"),
    ):
        with pytest.raises(UnsafeCheckpointError) as refusal:
            load(dump_object(value))
        assert refusal.value.refused == refused


def test_trusting_pickle_runs_it() -> None:
    """That is what the option is for."""
    RAN.clear()
    load_object(io.BytesIO(dump_object(EVIL["a_users_function"])), fqn="x", trust_pickle=True)
    assert len(RAN) == 1


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        (2**2040, "opcode LONG4"),
        (np.float32, "numpy.float32"),
        (np.ma.array([1]), f"{np.ma.MaskedArray.__module__}.MaskedArray"),
        (np.array([(None, 1.0)], dtype="O,f8"), "NumPy dtype"),
        (np.dtype("f8", metadata={"a": 1}), "NumPy object"),
        (Reduced(bytes, (10**15,)), "builtins.bytes"),
        (torch.jit.ScriptModule, "torch.jit._script.ScriptModule"),
    ],
    ids=["int", "class", "masked_array", "record_of_objects", "dtype_with_metadata", "large_bytes", "module"],
)
def test_what_cannot_be_loaded_safely_is_told_at_save(value: object, refused: str) -> None:
    """The reason at save and the refusal at load agree."""
    data = dump_object(value)
    reason = unsafe_reason(value, data)
    assert reason is not None
    assert reason[0] == refused
    with pytest.raises(UnsafeCheckpointError) as refusal:
        load(data)
    assert refusal.value.refused == refused


@pytest.mark.parametrize("value", [collections.deque([1]), collections.defaultdict(int, a=1)], ids=repr)
def test_deques_and_defaultdicts_as_stock_writes_them_are_refused(value: object) -> None:
    """torch's unpickler fills lists and dicts only, which no list of types changes. Ours load, stock's need trust."""
    data = stock_dump(value)
    assert unsafe_reason(Custom(), data) == (
        f"collections.{type(value).__name__}",
        f"the weights-only unpickler neither fills a collections.{type(value).__name__} nor gives it a state",
    )
    assert load_object(io.BytesIO(data), fqn="x", trust_pickle=True) == value


def test_values_inside_themselves_are_dumped_and_tried() -> None:
    """A list in itself loads; tuples and deques in themselves take what the weights-only unpickler does not do."""
    looped_list: list[Any] = []
    looped_list.append(looped_list)
    looped_tuple: tuple[list[Any]] = ([],)
    looped_tuple[0].append(looped_tuple)
    looped_deque: collections.deque[Any] = collections.deque()
    looped_deque.append(looped_deque)
    assert unsafe_reason(looped_list, dump_object(looped_list)) is None
    assert unsafe_reason(looped_tuple, dump_object(looped_tuple)) is not None
    assert unsafe_reason(looped_deque, dump_object(looped_deque)) is not None


def test_an_ordered_dicts_attributes_are_looked_at() -> None:
    """Module.state_dict() has one, and it may hold anything."""
    value = collections.OrderedDict(a=1)
    value._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    assert unsafe_reason(value, dump_object(value)) is None
    value._metadata["x"] = Custom()  # type: ignore[attr-defined]
    assert unsafe_reason(value, dump_object(value)) is not None


def test_a_torchscript_archive_is_refused() -> None:
    """It is a program, and torch.load would hand it to torch.jit."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        for name, data in (("data.pkl", b"N."), ("constants.pkl", b"N."), ("version", b"3\n")):
            file.writestr(f"archive/{name}", data)
    with pytest.warns(UserWarning, match="TorchScript"), pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        load(buffer.getvalue())


# What NumPy would believe


def archive(pickled: bytes) -> bytes:
    """A torch.save file around a pickle."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return global_("_codecs", "encode") + text(value.decode("latin1")) + text("latin1") + b"\x86R"


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def dtype(code: str, state: bytes, *, copies: bool = True) -> bytes:
    return global_("numpy", "dtype") + text(code) + b"\x89" + (b"\x88" if copies else b"\x89") + b"\x87R" + state


def dtype_state(order: str, flags: int, names: bytes = b"N", fields: bytes = b"N", nbytes: int = -1) -> bytes:
    alignment = -1 if nbytes < 0 else 1
    counts = integer(nbytes) + integer(alignment) + integer(flags)
    return b"(" + integer(3) + text(order) + b"N" + names + fields + counts + b"tb"


def record_state(fields: bytes, flags: int) -> bytes:
    return dtype_state("|", flags, text("a") + b"\x85", fields, 8)


def fields_of(item: bytes, byte_offset: int = 0) -> bytes:
    return b"}" + text("a") + item + integer(byte_offset) + b"\x86s"


def scalar(item: bytes, data: bytes, home: str = "numpy._core.multiarray") -> bytes:
    return global_(home, "scalar") + item + raw(data) + b"\x86R"


def array_state(item: bytes, data: bytes, shape: bytes) -> bytes:
    return b"(" + integer(1) + shape + item + b"\x89" + data + b"tb"


TWO = integer(2) + b"\x85"
ADDRESSES = raw(b"A" * 16)
NDARRAY = global_("numpy", "ndarray")
DTYPE = global_("numpy", "dtype")
RECONSTRUCT = global_("numpy._core.multiarray", "_reconstruct")
REBUILD_FROM_TYPE = global_("torch._tensor", "_rebuild_from_type_v2")
EMPTY_ARRAY = RECONSTRUCT + NDARRAY + integer(0) + b"\x85" + raw(b"b") + b"\x87R"
FLOATS = dtype("f8", dtype_state("<", 0))
OBJECTS = dtype("O8", dtype_state("|", 63))
RECORDS = dtype("V8", record_state(fields_of(FLOATS), 16))


def array(item: bytes, data: bytes, shape: bytes = TWO) -> bytes:
    return EMPTY_ARRAY + array_state(item, data, shape)


HOSTILE = {
    "objects_without_their_flags": array(dtype("O8", dtype_state("|", 0)), ADDRESSES),
    "a_field_of_objects_without_flags": array(dtype("V8", record_state(fields_of(OBJECTS), 0)), ADDRESSES),
    "a_field_of_objects": dtype("V8", record_state(fields_of(OBJECTS), 27)),
    "floats_with_the_flags_of_objects": array(dtype("f8", dtype_state("<", 63)), b"]NaNa"),
    "a_field_beyond_the_item": dtype("V8", record_state(fields_of(FLOATS, 4), 16)),
    "an_item_longer_than_its_code": dtype("S3", dtype_state("|", 0, nbytes=1200)),
    "a_dtype_that_is_numpys_own": dtype("f8", dtype_state("<", 0), copies=False),
    "a_dtype_of_two_states": RECORDS + record_state(fields_of(FLOATS), 16),
    "a_dtype_used_before_its_state": b"("
    + array(dtype("V8", b"q\1"), raw(b"A" * 8), integer(1) + b"\x85")
    + (b"h\1" + record_state(fields_of(FLOATS), 16) + b"t"),
    "fields_that_change_later": b"("
    + dtype("V8", record_state(fields_of(FLOATS) + b"q\1", 16))
    + (b"h\1" + text("a") + OBJECTS + integer(0) + b"\x86st"),
    "a_short_list_of_objects": array(OBJECTS, b"]Na", integer(1000) + b"\x85"),
    "a_negative_shape": array(FLOATS, ADDRESSES, integer(-2) + integer(-1) + b"\x86"),
    "too_few_bytes": array(FLOATS, ADDRESSES, integer(3) + b"\x85"),
    "an_array_of_two_states": array(FLOATS, ADDRESSES) + array_state(FLOATS, ADDRESSES, TWO),
    "an_array_used_before_its_state": b"(]" + EMPTY_ARRAY + b"q\1ah\1" + array_state(FLOATS, ADDRESSES, TWO) + b"t",
    "an_array_made_large": EMPTY_ARRAY.replace(integer(0), integer(2**30)),
    "an_array_made_directly": NDARRAY + TWO + text("O") + b"\x86R",
    "an_array_made_anew": NDARRAY + TWO + b"\x85\x81",
    "an_object_as_a_scalar": scalar(OBJECTS, b"A" * 8),
    "a_short_scalar": scalar(FLOATS, b"A" * 4),
    "numpy_called_by_torch": REBUILD_FROM_TYPE + b"(" + RECONSTRUCT + NDARRAY + b"NNtR",
    "numpy_called_by_torch_called_by_torch": REBUILD_FROM_TYPE
    + (b"(" + REBUILD_FROM_TYPE + b"N(" + RECONSTRUCT + NDARRAY + b"NNtNtR"),
    "numpy_in_a_list": b"]" + DTYPE + b"a",
    "numpy_in_a_dict": b"}" + DTYPE + b"Ns",
    "numpy_in_a_tuple": DTYPE + b"\x85",
    "numpy_in_an_attribute": global_("argparse", "Namespace") + b")\x81}" + text("as_subclass") + DTYPE + b"sb",
    "numpy_as_the_object": DTYPE,
}


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_numpy_would_not_have_written_is_refused(pickled: bytes) -> None:
    """NumPy believes its pickles: most of these would read or write memory that is not the array's."""
    with pytest.raises(UnsafeCheckpointError, match="that NumPy does not write"):
        load(archive(b"\x80\2" + pickled + b"."))


def test_the_parts_of_the_hostile_pickles_are_sound() -> None:
    """Put together as NumPy does it they load: what is refused above is refused for its twist alone."""
    arrays = array(FLOATS, raw(b"\0" * 16)) + array(OBJECTS, b"]NaNa")
    loaded = load(archive(b"\x80\2(" + arrays + RECORDS + scalar(FLOATS, b"\0" * 8) + b"t."))
    assert is_same(loaded, (np.zeros(2), np.array([None, None]), np.dtype([("a", "f8")]), np.float64(0)))


MT_STATE = np.random.MT19937(1).state
PHILOX_STATE = np.random.Philox(1).state
GENERATOR_STATES = {
    "a_position_after_the_block": {**MT_STATE, "state": {**MT_STATE["state"], "pos": 10**6}},
    "a_position_before_the_block": {**MT_STATE, "state": {**MT_STATE["state"], "pos": -1}},
    "a_short_list_for_the_block": {**MT_STATE, "state": {"key": [1, 2], "pos": 0}},
    "floats_for_the_block": {**MT_STATE, "state": {"key": np.zeros(624), "pos": 0}},
    "objects_with_attributes": {**MT_STATE, "state": {"key": argparse.Namespace(__array_interface__={}), "pos": 0}},
    "a_position_before_the_buffer": {**PHILOX_STATE, "buffer_pos": -(2**30)},
    "a_tuple": ("MT19937", MT_STATE["state"]["key"], 0),
}


@pytest.mark.parametrize("given", GENERATOR_STATES.values(), ids=GENERATOR_STATES.keys())
@pytest.mark.parametrize("kind", [np.random.RandomState, np.random.MT19937, np.random.Philox])
def test_a_generators_state_that_points_outside_is_refused(kind: Any, given: object) -> None:
    """Drawing from it would read memory that is not the generator's."""
    maker, arguments, _ = kind(1).__reduce__()
    with pytest.raises(UnsafeCheckpointError, match="that NumPy does not write"):
        load(stock_dump(Reduced(maker, arguments, given)))


def test_a_generator_is_made_of_nothing_but_a_generator() -> None:
    """Its maker calls a class that it is given."""
    maker, _, given = np.random.PCG64(1).__reduce__()
    with pytest.raises(UnsafeCheckpointError, match="that NumPy does not write"):
        load(stock_dump(Reduced(maker, (collections.deque,), given)))


# The list


def test_a_load_leaves_the_list_of_the_process_as_it_was() -> None:
    """Also what the user registered that we would have lent, and after a refusal."""
    mine = [np.dtype, (np.ndarray, "numpy.ndarray"), Custom]
    with torch.serialization.safe_globals(mine):
        before = set(torch.serialization.get_safe_globals())
        load(dump_object({"a": np.zeros(3), "b": Custom(), "c": pathlib.Path("x")}))
        with pytest.raises(UnsafeCheckpointError):
            load(dump_object([np.zeros(3), Reduced(run, ("x",))]))
        assert set(torch.serialization.get_safe_globals()) == before
        assert before >= set(mine)


def test_types_that_the_user_registered_load_beside_ours() -> None:
    """That is the first remedy that a refusal names."""
    value = Custom()
    value.rate = np.float32(0.5)  # type: ignore[attr-defined]
    data = dump_object(value)
    assert unsafe_reason(value, data) is not None
    with torch.serialization.safe_globals([Custom]):
        assert unsafe_reason(value, data) is None
        assert is_same(vars(load(data)), vars(value))


def test_a_user_who_registered_a_part_of_numpy_still_gets_the_rest() -> None:
    """Many have a recipe for float64 scalars in their scripts."""
    scalars = np.float64(0).__reduce__()[0]
    with torch.serialization.safe_globals([scalars, np.dtype, type(np.dtype("f8"))]):
        for value in (np.float64(1), np.float32(1), np.zeros(3, np.int8)):
            assert is_same(load(dump_object(value)), value)
        with pytest.raises(UnsafeCheckpointError, match="that NumPy does not write"):
            load(archive(b"\x80\2" + HOSTILE["objects_without_their_flags"] + b"."))


def test_threads_load_at_the_same_time_and_each_refuses_its_own() -> None:
    """The list is one for the process; what one thread is lent, no other can use."""
    sound, hostile = dump_object([np.arange(3), UTC]), archive(b"\x80\2" + HOSTILE["a_short_list_of_objects"] + b".")
    before = set(torch.serialization.get_safe_globals())
    outcomes: list[str] = []

    def loads(data: bytes, loader: Callable[[bytes], object]) -> str:
        try:
            loader(data)
        except (UnsafeCheckpointError, pickle.UnpicklingError):
            return "refused"
        return "loaded"

    def work(data: bytes, loader: Callable[[bytes], object]) -> None:
        outcomes.extend(loads(data, loader) for _ in range(30))

    def stock(data: bytes) -> object:
        return torch.load(io.BytesIO(data), weights_only=True)

    jobs = [(sound, load), (sound, load), (hostile, load), (hostile, stock)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["loaded"] * 60 + ["refused"] * 60
    assert set(torch.serialization.get_safe_globals()) == before


# Bytes that are no torch.save file

SOUND = dump_object({"a": [1, 2.0, "x"], "t": torch.ones(3), "n": np.arange(3)})


NO_FILES = [b"", b"\0", b"N.", b"abc", b"PK\x03\x04", b"PK\x03\x04" + b"x" * 300, SOUND[:-30], SOUND[:400]]


@pytest.mark.parametrize(
    "data", [*NO_FILES, b"\xff" + random.Random(1).randbytes(99)], ids=lambda data: f"{len(data)}_bytes"
)
@pytest.mark.parametrize("trust_pickle", [False, True])
def test_bytes_that_are_no_torch_save_file_are_corrupt(data: bytes, trust_pickle: bool) -> None:
    """Whatever torch and pickle raise for them."""
    with pytest.raises(CorruptCheckpointError, match=r"'model.extra'") as corrupt:
        load_object(io.BytesIO(data), fqn="model.extra", trust_pickle=trust_pickle)
    assert corrupt.value.fqn == "model.extra"


def test_a_cut_pickle_inside_a_sound_archive_is_corrupt() -> None:
    """Rather than refused: it asks for nothing."""
    for pickled in (b"", b"\x80\2", b"\x80\2]q\0(K\1", b"\x80\2\xff."):
        with pytest.raises(CorruptCheckpointError):
            load(archive(pickled))


def test_what_cannot_be_built_is_corrupt() -> None:
    """The type is harmless, what it is given is nonsense."""
    for value in (Reduced(datetime.date, (b"xx",)), Reduced(decimal.Decimal, ("nonsense",)), Reduced(range, ())):
        with pytest.raises(CorruptCheckpointError):
            load(dump_object(value))
        assert unsafe_reason(value, dump_object(value)) is not None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_damaged_bytes_raise_nothing_but_our_errors() -> None:
    """Some damage cannot be seen without a checksum, and loads."""
    chance = random.Random(7)
    samples = [
        dump_object(value) for value in (np.arange(4.0), np.random.default_rng(1), PLAIN, UTC, np.dtype(_RECORDS))
    ]
    pickles = [zipfile.ZipFile(io.BytesIO(sample)).read("archive/data.pkl") for sample in samples]
    outcomes = set()
    for _ in range(600):
        damaged = bytearray(chance.choice(pickles))
        for _ in range(chance.randint(1, 2)):
            damaged[chance.randrange(len(damaged))] = chance.choice(b"bRq.t(\x85\x86\x87h}]uesaNK\x88\x89\0\1\2")
        try:
            load(archive(bytes(damaged)))
            outcomes.add("loaded")
        except (CorruptCheckpointError, UnsafeCheckpointError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"loaded", "CorruptCheckpointError", "UnsafeCheckpointError"}
