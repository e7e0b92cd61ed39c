"""What the bytes of an object item mean: dumped as torch.save does, loaded without running the code that they name.

torch's weights-only unpickler loads them. It takes too little (no NumPy, dates, paths), so it is lent a list of
harmless types for the time of a load. And of NumPy, which trusts its pickles, it checks too little: so a pickle that
needs the list is run over stand-ins first, and every NumPy object in it must look as NumPy itself writes it.

No bound on memory or time: a hostile file can waste both, as it can with torch's own list (``bytearray(10**12)``).
"""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import fractions
import functools
import io
import math
import pathlib
import pickle
import pickletools
import re
import threading
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError

# Longer integers take an opcode, LONG4, that the weights-only unpickler does not know.
_MAX_INTEGER_BITS = 8 * 255 - 1
_BIT_GENERATORS = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
_BIT_GENERATOR_MAKER = "numpy.random._pickle.__bit_generator_ctor"
_SEED_MAKER = "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"
# Where a generator reads next in its block of words. NumPy takes any number, and would read outside the block.
_LAST_POSITIONS = {"pos": 624, "buffer_pos": 4}
_ALIGNED_STRUCT = 0x80

# torch keeps one list for the whole process, and adding to it is not atomic.
_REGISTRATION = threading.RLock()


def dump_object(value: object) -> bytes:
    """The bytes of an object item: torch.save's, which stock DCP reads.

    Deques and defaultdicts are written as calls with all their items: Python's own way, making them empty and filling
    them, is refused by the weights-only unpickler.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, pickle_module=_LoadablePickle)
    except RecursionError:
        # A deque that holds itself cannot be written as a call with its items.
        buffer = io.BytesIO()
        torch.save(value, buffer)
    return buffer.getvalue()


def load_object(data: io.BytesIO, *, fqn: str, trust_pickle: bool) -> object:
    """The object in ``data``, read from its start, with its tensors on the CPU.

    Raises:
        UnsafeCheckpointError: the bytes ask for something that is not known to be harmless; it was not run.
        CorruptCheckpointError: the bytes are no torch.save file, or what they describe cannot be built.
    """
    try:
        if not trust_pickle:
            return _load_harmless(data, map_location="cpu")
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=False)
    except _RefusedError as refusal:
        raise UnsafeCheckpointError(f"object {fqn!r} was not loaded: {refusal}", refused=refusal.refused) from None
    except MemoryError:
        raise
    # Arbitrary bytes make an unpickler, and the types that it calls, raise almost anything.
    except Exception as error:
        raise CorruptCheckpointError(f"object {fqn!r} cannot be loaded: {_in_a_line(error)}", fqn=fqn) from error


def unsafe_reason(value: object, data: bytes) -> tuple[str, str] | None:
    """Why ``load_object(..., trust_pickle=False)`` would not load ``data``, the dump of ``value``.

    Returns:
        The type or global that it would refuse, and the reason; None if it would load.
    """
    if _is_plain(value):
        return None
    try:
        try:
            # No tensor's data is read for the meta device.
            _load_harmless(io.BytesIO(data), map_location="meta")
        except RuntimeError:
            # Quantized and nested tensors cannot be on it.
            _load_harmless(io.BytesIO(data), map_location="cpu")
    except _RefusedError as refusal:
        return refusal.refused, refusal.reason
    except MemoryError:
        raise
    except Exception as error:
        return _path(type(value)), _in_a_line(error)
    return None


def _is_plain(value: object) -> bool:
    """Whether a value is built of nothing but plain Python types, which always load."""
    pending: list[Any] = [value]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        kind = type(part)
        if kind in (float, bool, str, bytes, type(None)) or (kind is int and part.bit_length() <= _MAX_INTEGER_BITS):
            continue
        # Met before: shared, or inside itself, and a tuple inside itself takes opcodes of its own.
        if id(part) in seen or kind not in (list, tuple, set, dict, collections.OrderedDict):
            return False
        seen.add(id(part))
        pending.extend(part)
        if isinstance(part, dict):
            pending.extend(part.values())
            # An OrderedDict has attributes too: Module.state_dict() sets one.
            pending.extend(getattr(part, "__dict__", {}).values())
    return True


def _reduce_deque(value: collections.deque[Any]) -> tuple[Any, ...]:
    return collections.deque, (list(value), value.maxlen)


def _reduce_defaultdict(value: collections.defaultdict[Any, Any]) -> tuple[Any, ...]:
    return collections.defaultdict, (value.default_factory, dict(value))


_REDUCERS: Any = collections.ChainMap(
    {collections.deque: _reduce_deque, collections.defaultdict: _reduce_defaultdict}, copyreg.dispatch_table
)


class _LoadablePickle:
    """Stands in for the pickle module: torch.save takes its Pickler from here."""

    class Pickler(pickle.Pickler):
        dispatch_table = _REDUCERS


class _RefusedError(Exception):
    """A pickle asks for what is not known to be harmless."""

    def __init__(self, refused: str, reason: str, *, registrable: Sequence[str] = ()) -> None:
        names = ", ".join(registrable)
        registration = f"torch.serialization.add_safe_globals([{names}]) if you know that to be harmless, or "
        super().__init__(
            f"{reason}; use {registration if names else ''}"
            "Options(trust_pickle=True), which runs whatever code the file names, if you trust its author"
        )
        self.refused = refused
        self.reason = reason


def _load_harmless(data: io.BytesIO, *, map_location: str) -> object:
    """torch.load with ``weights_only=True``, and with our list where torch's and the user's do not suffice."""
    # Held from the start: a load that met what another thread registered would take NumPy's objects uninspected.
    with _REGISTRATION:
        try:
            return _load_weights_only(data, map_location)
        except pickle.UnpicklingError as error:
            refusal = error
        except RuntimeError as error:
            if "TorchScript" in str(error):
                raise _RefusedError("TorchScript archive", "it is a TorchScript archive, a program") from None
            raise
        unlisted = _unlisted_globals(data, refusal)
        _Inspector().run(_pickle_bytes(data))
        harmless = _harmless_globals()
        lent = [(_Lent(harmless[path]) if path.startswith("numpy.") else harmless[path], path) for path in unlisted]
        # These must be listed to be given a state. Under a name with a line break, which no GLOBAL opcode can say.
        unnamed = [(kind, f"{kind.__name__}\n") for kind in _stateful_types()]
        entries: list[Any] = [_Entry(entry) for entry in (*lent, *unnamed)]
        try:
            with torch.serialization.safe_globals(entries):
                return _load_weights_only(data, map_location)
        except pickle.UnpicklingError as error:
            raise _explained(error, data) from None


def _load_weights_only(data: io.BytesIO, map_location: str) -> object:
    data.seek(0)
    return torch.load(data, map_location=map_location, weights_only=True)


def _unlisted_globals(data: io.BytesIO, refusal: pickle.UnpicklingError) -> set[str]:
    """What the pickle names that only our list allows.

    Raises:
        _RefusedError: it names what no list allows.
    """
    data.seek(0)
    try:
        unlisted = set(torch.serialization.get_unsafe_globals_in_checkpoint(data))
    except ValueError:
        # No zip archive: the format before torch 1.6, for which there is only torch's list and the user's.
        raise _explained(refusal, data) from None
    except pickle.UnpicklingError as error:
        # An opcode that torch does not know. A global that no list allows is the better reason.
        is_ours = any(f"GLOBAL {path} " in str(refusal) for path in _harmless_globals())
        raise _explained(error if is_ours else refusal, data) from None
    if refused := sorted(unlisted - _harmless_globals().keys()):
        raise _refused_globals(refused, refusal)
    return unlisted


class _Entry(tuple[Any, str]):
    """One registration, equal to no other: taking ours off the list leaves the user's there."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class _Lent:
    """A class or function of NumPy, for the one thread that has inspected its pickle: the list is every thread's."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._thread = threading.get_ident()

    def __call__(self, *args: object) -> object:
        if threading.get_ident() != self._thread:
            raise pickle.UnpicklingError("Unsupported global: it is lent to another thread")
        return self._value(*(arg._value if isinstance(arg, _Lent) else arg for arg in args))


def _refused_globals(refused: list[str], error: Exception) -> _RefusedError:
    # torch itself lists its nested and distributed tensors once their modules are imported, and says which.
    if needed := re.search(r".* must be imported to load .*", str(error)):
        return _RefusedError(refused[0], needed[0].removeprefix("Weights only load failed. "))
    names = refused[0] if len(refused) == 1 else f"each of {', '.join(refused)}"
    return _RefusedError(refused[0], f"{names} is not known to be harmless", registrable=refused)


def _explained(error: pickle.UnpicklingError, data: io.BytesIO) -> Exception:
    """What torch refused if the bytes are a whole pickle, else the error as it is: they are corrupt."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return _refused_globals([found[1]], error)
    try:
        opcodes = {ord(opcode.code): opcode.name for opcode, _, _ in pickletools.genops(_pickle_bytes(data))}
    except Exception:
        return error
    if found := re.search(r"Unsupported operand (\d+)", text):
        return _refused_opcode(opcodes.get(int(found[1]), found[1]))
    if found := re.search(r"Can only .*but got <class '([^']+)'>", text):
        return _RefusedError(found[1], f"the weights-only unpickler neither fills a {found[1]} nor gives it a state")
    return _RefusedError("pickle", _in_a_line(error))


def _refused_opcode(name: str) -> _RefusedError:
    return _RefusedError(f"opcode {name}", f"the weights-only unpickler does not take the opcode {name}")


def _pickle_bytes(data: io.BytesIO) -> bytes:
    if data.getvalue()[:4] != b"PK\x03\x04":
        return data.getvalue()
    data.seek(0)
    # The reader of torch.load: another could find another record in an archive made to deceive.
    return torch._C.PyTorchFileReader(data).get_record("data.pkl")


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _in_a_line(error: Exception) -> str:
    # torch wraps what its unpickler says in advice, and what its C++ says in a backtrace.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.partition(chr(10))[0][:200]}".removesuffix(": ")


@functools.cache
def _harmless_globals() -> Mapping[str, Any]:
    """What may be named besides torch's own list: nothing here runs code, opens a file or imports a module.

    NumPy's are harmless only behind the inspector.
    """
    listed: dict[str, Any] = {}
    paths = (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))
    # Python 3.13 has its paths in a private module, NumPy 1 its core in a public one: what any wrote, all read.
    for home in ("pathlib", "pathlib._local"):
        listed |= {f"{home}.{kind.__name__}": kind for kind in paths}
    for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
        listed |= {f"{home}._reconstruct": _maker_of(np.zeros(0)), f"{home}.scalar": _maker_of(np.float64(0))}
    builtin = (bool, bytes, dict, float, frozenset, int, list, range, slice, str, tuple)
    records = (argparse.Namespace, types.SimpleNamespace, collections.defaultdict, collections.deque, io.BytesIO)
    values = (uuid.UUID, decimal.Decimal, fractions.Fraction)
    times = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)
    arrays = (np.dtype, np.ndarray, np.random.SeedSequence, *_BIT_GENERATORS)
    listed |= {_path(kind): kind for kind in (*builtin, *records, *values, *times, *arrays)}
    generator = np.random.Generator(np.random.PCG64(0))
    randoms = (np.random.RandomState(0), generator, generator.bit_generator)
    listed |= {_path(maker): maker for maker in map(_maker_of, randoms)}
    listed[_SEED_MAKER] = _maker_of(np.random.SeedSequence(0))
    return types.MappingProxyType(listed)


@functools.cache
def _stateful_types() -> frozenset[type[Any]]:
    """What NumPy gives a state in its pickles."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    randoms = (*_BIT_GENERATORS, np.random.SeedSequence, np.random.RandomState, np.random.Generator)
    return frozenset({*dtypes, *randoms, np.ndarray})


def _maker_of(value: object) -> Any:
    return value.__reduce__()[0]


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that a pickle names."""

    path: str

    @property
    def is_numpy(self) -> bool:
        return self.path in _NUMPY_CALLS or self.path in _NUMPY_CLASSES


@dataclass(frozen=True, slots=True)
class _NumPyArguments:
    """A tuple with a class or function of NumPy in it."""

    items: tuple[Any, ...]


class _Inert:
    """Any object outside NumPy: whatever it is made from and given, it cannot hurt."""


class _Inspector:
    """Runs a pickle over stand-ins, with the opcodes of torch's weights-only unpickler: imports and calls nothing.

    NumPy believes its pickles: a dtype with false flags has its items taken for object pointers, a list that is too
    short is read past its end, a second state frees memory in use. So NumPy must be told only what NumPy itself writes.
    And as some functions call what they are given, or what they find as an attribute, NumPy's classes and functions are
    called by the pickle directly or not at all: they lie in no container, in no state, and in no arguments but NumPy's.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # NumPy keeps the dict of a dtype's fields, not a copy.
        self._kept_fields: list[object] = []

    def run(self, data: bytes) -> None:
        for opcode, value, _ in pickletools.genops(data):
            self._step(opcode.name, value)

    def _step(self, opcode: str, value: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO":
                pass
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "BINUNICODE" | "LONG1":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}[opcode])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": _Inert}[opcode]())
            case "GLOBAL":
                stack.append(_Global(value.replace(" ", ".").replace("numpy.core.", "numpy._core.", 1)))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[value])
            case "MARK":
                self._outer_stacks.append(stack)
                self._stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [_tuple_of(stack[-count:])]
            case "TUPLE":
                self._unmark().append(_tuple_of(stack))
            case "APPEND" | "SETITEM":
                count = 1 if opcode == "APPEND" else 2
                self._fill(stack[-count - 1], stack[-count:])
                del stack[-count:]
            case "APPENDS" | "SETITEMS":
                self._fill(self._unmark()[-1], stack)
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = _called(stack[-1], arguments)
            case "NEWOBJ":
                _check_data(stack.pop(), stack[-1])
                stack[-1] = _Inert()
            case "BUILD":
                state = stack.pop()
                self._set_state(stack[-1], state)
            case "BINPERSID":
                _check_data(stack[-1])
                stack[-1] = _Inert()
            case "STOP":
                _check_data(stack[-1])
            case _:
                raise _refused_opcode(opcode)

    def _unmark(self) -> list[Any]:
        self._stack = self._outer_stacks.pop()
        return self._stack

    def _fill(self, target: object, items: list[Any]) -> None:
        _check_data(*items)
        if any(target is fields for fields in self._kept_fields):
            _refuse("dtype", "its fields change after it was made")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))

    def _set_state(self, target: object, state: Any) -> None:
        _check_data(state)
        if isinstance(target, _Dtype | _Array | _Random | _Seed):
            try:
                target.set_state(state)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                _refuse("object", f"its state gives {_in_a_line(error)}")
        if isinstance(target, _Dtype) and target.fields is not None:
            self._kept_fields.append(target.fields)


def _tuple_of(items: list[Any]) -> object:
    if any(isinstance(item, _Global) and item.is_numpy for item in items):
        return _NumPyArguments(tuple(items))
    _check_data(*items)
    return tuple(items)


def _check_data(*items: object) -> None:
    for item in items:
        if isinstance(item, _NumPyArguments) or (isinstance(item, _Global) and item.is_numpy):
            _refuse("name", f"{item} stands where data belong")
        # In use already, it would get another meaning, or other memory.
        if isinstance(item, _Dtype | _Array) and item.dtype is None:
            _refuse("object", "it is used before its state is set")


def _refuse(kind: str, reason: str) -> NoReturn:
    raise _RefusedError(f"NumPy {kind}", f"it has a NumPy {kind} that NumPy does not write: {reason}")


def _called(maker: object, arguments: Any) -> object:
    """What stands for the result of a call."""
    if not isinstance(maker, _Global):
        raise pickle.UnpicklingError(f"a {type(maker).__name__} is called")
    if maker.is_numpy:
        if maker.path not in _NUMPY_CALLS:
            _refuse("name", f"{maker.path} is called")
        return _NUMPY_CALLS[maker.path](*(arguments.items if isinstance(arguments, _NumPyArguments) else arguments))
    _check_data(arguments)
    if maker.path == "_codecs.encode" and type(arguments[0]) is str and arguments[1:] == ("latin1",):
        return arguments[0].encode("latin1")
    if maker.path in ("builtins.bytes", "__builtin__.bytes"):
        if arguments != ():
            raise _RefusedError("builtins.bytes", "builtins.bytes is called with an argument")
        return b""
    return _Inert()


class _Dtype:
    """A dtype, made from a code and then, once, given a state: the one that NumPy gives the dtype so described."""

    def __init__(self, code: object, align: object, copy: object) -> None:
        # With copy=False it would be NumPy's own dtype, and the state would change it for the whole process.
        if type(code) is not str or (align, copy) != (False, True):
            _refuse("dtype", f"it is made from {(code, align, copy)}")
        self._code = code
        self.fields: dict[str, Any] | None = None
        self.dtype: np.dtype[Any] | None = None

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or self.dtype is not None:
            _refuse("dtype", "its state is no tuple, or set twice")
        version, order, subarray, names, self.fields, nbytes, alignment, flags, *unit = state
        fields: Any = None
        made: Any
        if subarray is not None:
            subarray = (subarray[0].dtype, subarray[1])
            made = np.dtype(subarray)
        elif names is not None and self.fields is not None:
            fields = {name: (part.dtype, offset) for name, (part, offset) in self.fields.items()}
            formats, offsets = [fields[name][0] for name in names], [fields[name][1] for name in names]
            layout: Any = {"names": [*names], "formats": formats, "offsets": offsets, "itemsize": nbytes}
            made = np.dtype(layout, align=bool(flags & _ALIGNED_STRUCT))
        else:
            step, count = unit[0][1][:2] if unit else (b"generic", 1)
            made = np.dtype(self._code + ("" if step == b"generic" else f"[{count}{step.decode()}]"))
            made = made.newbyteorder(order)
        _, (code, *_), expected = made.__reduce__()
        found = (version, order, subarray, names, fields, nbytes, alignment, flags, *unit)
        if code != self._code or _normal(expected) != _normal(found):
            _refuse("dtype", f"{self._code!r} has the state {found}")
        if made.hasobject and made.kind != "O":
            # Their items are converted by what attributes say, and an attribute can name any address.
            _refuse("dtype", f"{made} has objects inside a structure")
        self.dtype = made


def _normal(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """A dtype's state as all NumPys would write it: older ones sign the byte of flags, and write {} for no metadata."""
    *begin, flags = state[:8]
    return (*begin, flags + 256 if -128 <= flags < 0 else flags, *((about or None, unit) for about, unit in state[8:]))


class _Array:
    """An array, made empty and then, once, given a shape, a dtype and exactly the data that fill it."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        if (kind, shape, code) != (_Global("numpy.ndarray"), (0,), b"b"):
            _refuse("array", "it is not made empty")
        self.dtype: np.dtype[Any] | None = None

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or self.dtype is not None:
            _refuse("array", "its state is no tuple, or set twice")
        _, shape, dtype, _, data = state
        if type(shape) is not tuple or any(type(length) is not int or length < 0 for length in shape):
            _refuse("array", f"its shape is {shape}")
        self.dtype = _dtype_of_items(dtype)
        kind, nbytes = (list, 1) if self.dtype.hasobject else (bytes, self.dtype.itemsize)
        if type(data) is not kind or len(data) != math.prod(shape) * nbytes:
            _refuse("array", f"its data do not fill {shape} items of {self.dtype}")


def _scalar(dtype: object, data: object) -> _Inert:
    item_dtype = _dtype_of_items(dtype)
    if type(data) is not bytes or len(data) != item_dtype.itemsize or item_dtype.hasobject:
        _refuse("scalar", f"its data are no {item_dtype}")
    return _Inert()


def _dtype_of_items(stand_in: object) -> np.dtype[Any]:
    if not isinstance(stand_in, _Dtype) or stand_in.dtype is None or stand_in.dtype.subdtype is not None:
        _refuse("dtype", "it is no dtype of items")
    return stand_in.dtype


class _Random:
    """A bit generator, a Generator or a RandomState. NumPy reads their states without checking an index."""

    def __init__(self, source: object, maker: object = None) -> None:
        known = (*(kind.__name__ for kind in _BIT_GENERATORS), *(_Global(_path(kind)) for kind in _BIT_GENERATORS))
        if not isinstance(source, _Random) and source not in known:
            _refuse("generator", f"it is made from {source!r}")
        if maker not in (None, _Global(_BIT_GENERATOR_MAKER)):
            _refuse("generator", f"it is made by {maker!r}")

    def set_state(self, state: Any) -> None:
        if type(state) is tuple and len(state) == 2 and (state[1] is None or isinstance(state[1], _Seed)):
            state = state[0]
        if type(state) is not dict or type(words := state.get("state")) is not dict:
            _refuse("generator", "its state is not a dict with a dict in it")
        for name, value in (*state.items(), *words.items()):
            if name in _LAST_POSITIONS:
                is_sound = type(value) is int and 0 <= value <= _LAST_POSITIONS[name]
            else:
                is_sound = type(value) in (int, float, str) or value is words or _is_words(value)
            if not is_sound:
                _refuse("generator", f"its state has {name!r} = {value!r}")


class _Seed:
    """A SeedSequence, made empty and then given a state of integers."""

    def __init__(self, kind: object, _checksum: object, state: object) -> None:
        if kind != _Global(_path(np.random.SeedSequence)) or state is not None:
            _refuse("seed", "it is not made empty")

    def set_state(self, state: Any) -> None:
        for part in state:
            items = part if type(part) in (tuple, list) else (part,)
            if not all(type(item) is int or item is None or _is_words(item) for item in items):
                _refuse("seed", f"its state has {part!r}")


def _is_words(value: object) -> bool:
    return isinstance(value, _Array) and value.dtype is not None and value.dtype.kind == "u"


_NUMPY_CLASSES = frozenset({"numpy.ndarray", *map(_path, (np.random.SeedSequence, *_BIT_GENERATORS))})
_NUMPY_CALLS: dict[str, Callable[..., object]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _scalar,
    _BIT_GENERATOR_MAKER: _Random,
    "numpy.random._pickle.__generator_ctor": _Random,
    "numpy.random._pickle.__randomstate_ctor": _Random,
    _SEED_MAKER: _Seed,
}
