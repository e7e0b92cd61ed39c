"""What the bytes of an object item mean: dumped as torch.save does, loaded without running the code that they name.

torch's weights-only unpickler does the loading. It takes too little (no NumPy, dates, paths), so it is lent a list of
harmless types for the time of a load. And for NumPy it checks too little: a dtype's state, taken as it comes, turns
bytes into object pointers. So a pickle that needs the list is first run over stand-ins, and every NumPy object in it
must look as NumPy itself writes it.

Not a bound on memory or time: a hostile file can waste both, as it can with torch's own list (``bytearray(10**12)``).
"""

from __future__ import annotations

import argparse
import collections
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
from collections.abc import Callable, Mapping
from copyreg import dispatch_table
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError

_LEAF_TYPES = frozenset({int, float, bool, str, bytes, type(None)})
_SEQUENCE_TYPES = frozenset({list, tuple, set})
# Longer integers take an opcode, LONG4, that the weights-only unpickler does not know.
_MAX_INTEGER_BITS = 8 * 255 - 1
_BIT_GENERATORS = (
    np.random.MT19937,
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
)
_SEED_MAKER = "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"
_BIT_GENERATOR_MAKER = "numpy.random._pickle.__bit_generator_ctor"
# Where a generator reads next in its block of words. NumPy takes any number, and would read outside the block.
_LAST_POSITIONS = {"pos": 624, "buffer_pos": 4}
_ALIGNED_STRUCT = 0x80

# torch keeps one list for the whole process, and adding to it is not atomic.
_REGISTRATION = threading.RLock()


def dump_object(value: object) -> bytes:
    """The bytes of an object item: torch.save's, which stock DCP reads.

    Deques and defaultdicts are written as calls with all their items. Python's own way, filling them one by one, is
    refused by the weights-only unpickler.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, pickle_module=_LoadablePickle)
    except RecursionError:
        # A deque that holds itself has no such call. Python's own way knows it.
        buffer = io.BytesIO()
        torch.save(value, buffer)
    return buffer.getvalue()


def load_object(data: io.BytesIO, *, fqn: str, trust_pickle: bool) -> object:
    """The object in ``data``, read from its start; its tensors lie on the CPU.

    Raises:
        UnsafeCheckpointError: the bytes ask for something that is not known to be harmless, and nothing of it was run.
        CorruptCheckpointError: the bytes are no torch.save file, or what they describe cannot be built.
    """
    try:
        if trust_pickle:
            data.seek(0)
            return torch.load(data, map_location="cpu", weights_only=False)
        return _load_harmless(data, map_location="cpu")
    except _RefusedError as refusal:
        raise UnsafeCheckpointError(f"object {fqn!r} was not loaded: {refusal}", refused=refusal.refused) from None
    except MemoryError:
        raise
    # Arbitrary bytes make an unpickler, and the types that it calls, raise almost anything.
    except Exception as error:
        raise CorruptCheckpointError(
            f"object {fqn!r} cannot be loaded: {type(error).__name__}: {_first_line(error)}", fqn=fqn
        ) from error


def unsafe_reason(value: object, data: bytes) -> tuple[str, str] | None:
    """What ``load_object(..., trust_pickle=False)`` would refuse in ``data``, the dump of ``value``, and why.

    Returns:
        None if it would load, else the type or global refused, and the reason.
    """
    if _is_plain(value):
        return None
    # On the meta device no tensor is read. Quantized and nested tensors exist on the CPU only.
    for map_location in ("meta", "cpu"):
        try:
            _load_harmless(io.BytesIO(data), map_location=map_location)
            return None
        except _RefusedError as refusal:
            return refusal.refused, refusal.reason
        except MemoryError:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {_first_line(error)}"
    return f"{type(value).__module__}.{type(value).__qualname__}", failure


def _is_plain(value: object) -> bool:
    """Whether a value is built of nothing but plain Python types, so that a trial load would tell nothing new."""
    pending, seen = [value], set()
    while pending:
        part = pending.pop()
        kind = type(part)
        if kind in _LEAF_TYPES:
            if kind is int and part.bit_length() > _MAX_INTEGER_BITS:  # type: ignore[attr-defined]
                return False
            continue
        # Met before: shared, or inside itself, and tuples inside themselves take opcodes of their own.
        if id(part) in seen:
            return False
        seen.add(id(part))
        if kind in _SEQUENCE_TYPES:
            pending.extend(part)  # type: ignore[call-overload]
        elif kind is dict or kind is collections.OrderedDict:
            pending.extend(part)  # type: ignore[call-overload]
            pending.extend(part.values())  # type: ignore[attr-defined]
            # An OrderedDict has attributes too: Module.state_dict() puts one there.
            pending.extend(getattr(part, "__dict__", {}).values())
        else:
            return False
    return True


def _reduce_deque(value: collections.deque[Any]) -> tuple[Any, ...]:
    return collections.deque, (list(value), value.maxlen)


def _reduce_defaultdict(value: collections.defaultdict[Any, Any]) -> tuple[Any, ...]:
    return collections.defaultdict, (value.default_factory, dict(value))


class _LoadablePickle:
    """Stands in for the pickle module: torch.save takes its Pickler from here."""

    class Pickler(pickle.Pickler):
        dispatch_table = collections.ChainMap(
            {collections.deque: _reduce_deque, collections.defaultdict: _reduce_defaultdict}, dispatch_table
        )


class _RefusedError(Exception):
    """The loader will not do what the pickle asks for."""

    def __init__(self, refused: str, reason: str, *, is_global: bool = False) -> None:
        registration = f"register it by torch.serialization.add_safe_globals([{refused}]) if it is harmless, or "
        super().__init__(
            f"{reason}; {registration if is_global else ''}"
            "load with Options(trust_pickle=True), which runs whatever code the file names, if you trust its author"
        )
        self.refused = refused
        self.reason = reason


def _load_harmless(data: io.BytesIO, *, map_location: str) -> object:
    """torch.load with ``weights_only=True``, and with our list where torch's own and the user's do not suffice."""
    data.seek(0)
    try:
        return torch.load(data, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise _RefusedError("TorchScript archive", "it is a TorchScript archive, a program") from None
        raise
    data.seek(0)
    try:
        unlisted = set(torch.serialization.get_unsafe_globals_in_checkpoint(data))
    except (ValueError, pickle.UnpicklingError):
        # No zip archive, or an opcode that torch does not know: nothing that a list could help.
        raise _explained(refusal, data) from None
    harmless = _harmless_globals()
    if refused := sorted(unlisted - harmless.keys()):
        raise _refused_globals(refused, refusal)
    _Inspector().run(_pickle_bytes(data))
    entries: list[Any] = [_Entry((harmless[path], path)) for path in unlisted]
    # No GLOBAL opcode can name a line break: these can be given a state, and be neither named nor called.
    entries += [_Entry((kind, f"{kind.__name__}\n")) for kind in _stateful_types()]
    data.seek(0)
    try:
        with _REGISTRATION, torch.serialization.safe_globals(entries):
            return torch.load(data, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _explained(error, data) from None


class _Entry(tuple[Any, str]):
    """One registration, equal to no other: taking ours off the list leaves the user's there."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _refused_globals(refused: list[str], error: Exception) -> _RefusedError:
    # torch knows its nested and distributed tensors once their modules are imported, and says which.
    if needed := re.search(r"\S+ must be imported to load .*|``torch\.nested``.*", str(error)):
        return _RefusedError(refused[0], f"{refused[0]}: {needed[0].strip()}")
    verb = "is" if len(refused) == 1 else "are"
    return _RefusedError(refused[0], f"{', '.join(refused[:5])} {verb} not known to be harmless", is_global=True)


def _explained(error: pickle.UnpicklingError, data: io.BytesIO) -> Exception:
    """What torch refused, if the bytes are a sound pickle, else the error itself: they are corrupt."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return _RefusedError(found[1], f"{found[1]} is not known to be harmless", is_global=True)
    try:
        collections.deque(pickletools.genops(_pickle_bytes(data)), maxlen=0)
    except Exception:
        return error
    if found := re.search(r"Unsupported operand (\d+)", text):
        names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
        name = names.get(int(found[1]), found[1])
        return _RefusedError(f"opcode {name}", f"torch's weights-only unpickler does not know the opcode {name}")
    if found := re.search(r"(Can only [^\n]*) but got <class '([^']+)'>", text):
        return _RefusedError(found[2], f"{found[2]} takes a state or items that are not known to be harmless")
    return _RefusedError("pickle", text.strip().splitlines()[-1])


def _pickle_bytes(data: io.BytesIO) -> bytes:
    if data.getvalue()[:4] != b"PK\x03\x04":
        return data.getvalue()
    data.seek(0)
    # The reader that torch.load uses, so both see the same record in an archive that means to deceive one of them.
    return torch._C.PyTorchFileReader(data).get_record("data.pkl")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


@functools.cache
def _harmless_globals() -> Mapping[str, Any]:
    """What may be named besides torch's own list: no callable here runs code, opens a file or imports a module.

    NumPy's are safe only behind the inspector.
    """
    paths = (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))
    # Python 3.13 has its paths in a private module, NumPy 2 its core: files of either are read on either side.
    listed: dict[str, Any] = {
        f"{home}.{kind.__name__}": kind for home in ("pathlib", "pathlib._local") for kind in paths
    }
    for kind in (
        *(bool, bytes, dict, float, frozenset, int, list, range, slice, str, tuple),
        *(argparse.Namespace, types.SimpleNamespace, uuid.UUID, decimal.Decimal, fractions.Fraction, io.BytesIO),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        *(collections.defaultdict, collections.deque, *_BIT_GENERATORS, np.random.SeedSequence, np.dtype, np.ndarray),
    ):
        listed[_path(kind)] = kind
    for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
        listed[f"{home}._reconstruct"] = _rebuilder(np.zeros(0))
        listed[f"{home}.scalar"] = _rebuilder(np.float64(0))
    generator = np.random.Generator(np.random.PCG64(0))
    for made in (np.random.RandomState(0), generator, generator.bit_generator):
        listed[_path(_rebuilder(made))] = _rebuilder(made)
    listed[_SEED_MAKER] = _rebuilder(np.random.SeedSequence(0))
    return types.MappingProxyType(listed)


@functools.cache
def _stateful_types() -> frozenset[type[Any]]:
    """What NumPy gives a state after making it, and pickles do not name."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return frozenset({*dtypes, *_BIT_GENERATORS, np.random.RandomState, np.random.Generator})


def _rebuilder(value: object) -> Any:
    return value.__reduce__()[0]


class _Global(NamedTuple):
    """A class or function that a pickle names, on the inspector's stack."""

    path: str

    @property
    def is_numpy(self) -> bool:
        return self.path.startswith("numpy.") and self.path in _harmless_globals()


class _NumPyArguments(NamedTuple):
    """A tuple with a class or function of NumPy in it."""

    items: tuple[Any, ...]


class _Inert:
    """Any object outside NumPy: whatever it is made from and given, it cannot hurt."""


class _Inspector:
    """Runs a pickle over stand-ins, with the opcodes of torch's weights-only unpickler: nothing is imported or called.

    NumPy believes the states in a pickle: a dtype with false flags has its items taken for object pointers, a short
    list is read past its end, a second state frees memory in use. So all that NumPy is given must be what NumPy itself
    writes. And as many a function calls what it is given or finds as an attribute, a class or function of NumPy is
    called by the pickle directly or not at all: it may lie in no container, no state and no arguments but NumPy's own.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # NumPy keeps the dict of a dtype's fields, not a copy.
        self._kept_fields: list[dict[str, Any]] = []

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
                self._marked.append(stack)
                self._stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [_tuple_of(stack[-count:])]
            case "TUPLE":
                self._unmark().append(_tuple_of(stack))
            case "APPEND":
                item = stack.pop()
                self._fill(stack[-1], [item])
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                self._fill(stack[-1], [key, item])
            case "APPENDS" | "SETITEMS":
                self._fill(self._unmark()[-1], stack)
            case "REDUCE":
                arguments = stack.pop()
                stack[-1] = _made(stack[-1], arguments)
            case "NEWOBJ":
                _as_data(stack.pop(), stack[-1])
                stack[-1] = _Inert()
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case "BINPERSID":
                _as_data(stack[-1])
                stack[-1] = _Inert()
            case "STOP":
                _as_data(stack[-1])
            case _:
                raise _RefusedError(f"opcode {opcode}", f"torch.save does not write the opcode {opcode}")

    def _unmark(self) -> list[Any]:
        self._stack = self._marked.pop()
        return self._stack

    def _fill(self, target: object, items: list[Any]) -> None:
        _as_data(*items)
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, dict):
            if any(target is fields for fields in self._kept_fields):
                _refuse("numpy.dtype", "its fields change after it was made")
            target.update(zip(items[::2], items[1::2], strict=True))

    def _build(self, target: object, state: object) -> None:
        _as_data(state)
        if isinstance(target, _Dtype | _Array | _Random | _Seed):
            target.set_state(state)
        if isinstance(target, _Dtype) and target.fields is not None:
            self._kept_fields.append(target.fields)


def _tuple_of(items: list[Any]) -> object:
    if any(isinstance(item, _Global) and item.is_numpy for item in items):
        return _NumPyArguments(tuple(items))
    _as_data(*items)
    return tuple(items)


def _as_data(*items: object) -> None:
    """Refuse what may not lie where data lie."""
    for item in items:
        if (isinstance(item, _Global) and item.is_numpy) or isinstance(item, _NumPyArguments):
            _refuse("global", f"{item} stands where data belong")
        # In use now, it could be given a state later: another dtype for the same bytes, other memory.
        if isinstance(item, _Dtype | _Array) and item.made is None:
            _refuse("state", "it is set after the object is used")


def _refuse(name: str, reason: str) -> NoReturn:
    raise _RefusedError(f"numpy {name}", f"the pickle has a NumPy {name} that NumPy does not write: {reason}")


def _made(maker: object, arguments: object) -> object:
    """What stands for the result of a call."""
    if not isinstance(maker, _Global):
        raise pickle.UnpicklingError(f"{type(maker).__name__} is called")
    if maker.is_numpy:
        if (make := _NUMPY_CALLS.get(maker.path)) is None:
            _refuse("global", f"{maker.path} is called")
        return make(*(arguments.items if isinstance(arguments, _NumPyArguments) else _tuple(arguments)))
    _as_data(arguments)
    if maker.path == "_codecs.encode":
        text, encoding = _tuple(arguments)
        if type(text) is str and encoding == "latin1":
            return text.encode("latin1")
    if maker.path in ("builtins.bytes", "__builtin__.bytes"):
        if arguments != ():
            raise _RefusedError("builtins.bytes", "builtins.bytes is called with an argument")
        return b""
    return _Inert()


def _tuple(value: object) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise pickle.UnpicklingError(f"a {type(value).__name__} stands where a tuple belongs")
    return value


class _Dtype:
    """A dtype, made from a code and then, once, given a state: the state that NumPy gives the dtype described."""

    def __init__(self, code: object, align: object, copy: object) -> None:
        # With copy=False it would be NumPy's own dtype, and the state would change it for the whole process.
        if type(code) is not str or (align, copy) != (False, True):
            _refuse("dtype", f"it is made from {(code, align, copy)}")
        self._code = code
        self.fields: dict[str, Any] | None = None
        self.made: np.dtype[Any] | None = None

    def set_state(self, state: object) -> None:
        if self.made is not None:
            _refuse("dtype", "its state is set twice")
        version, order, subarray, names, fields, nbytes, alignment, flags, *unit = _tuple(state)
        made: Any
        if subarray is not None:
            base, shape = subarray
            subarray = (base.made, shape)
            made = np.dtype(subarray)
        elif names is not None:
            self.fields = fields
            fields = {name: (part.made, offset) for name, (part, offset) in fields.items()}
            layout = {
                "names": [*names],
                "formats": [fields[name][0] for name in names],
                "offsets": [fields[name][1] for name in names],
                "itemsize": nbytes,
            }
            made = np.dtype(layout, align=bool(flags & _ALIGNED_STRUCT))  # type: ignore[call-overload]
        else:
            step, count = unit[0][1][:2] if unit else (b"generic", 1)
            made = np.dtype(self._code + ("" if step == b"generic" else f"[{count}{step.decode()}]")).newbyteorder(
                order
            )
        found = (version, order, subarray, names, fields, nbytes, alignment, flags, *unit)
        expected = made.__reduce__()
        if (expected[1][0], _normal(expected[2])) != (self._code, _normal(found)):
            _refuse("dtype", f"{self._code!r} has the state {found}")
        if made.hasobject and made.kind != "O":
            # Their items are converted by what attributes say, and an attribute can name any address.
            _refuse("dtype", f"{made} has objects inside a structure")
        self.made = made


def _normal(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """A dtype's state without what depends on the NumPy that wrote it: a signed byte of flags, {} for no metadata."""
    *begin, flags = state[:8]
    return (*begin, flags + 256 if -128 <= flags < 0 else flags, *((about or None, unit) for about, unit in state[8:]))


class _Array:
    """An array, made empty and then, once, given a shape, a dtype and exactly the data that fill it."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        if (kind, shape, code) != (_Global("numpy.ndarray"), (0,), b"b"):
            _refuse("array", "it is not made empty")
        self.made: np.dtype[Any] | None = None

    def set_state(self, state: object) -> None:
        if self.made is not None:
            _refuse("array", "its state is set twice")
        _, shape, dtype, _, data = _tuple(state)
        if any(type(length) is not int or length < 0 for length in _tuple(shape)):
            _refuse("array", f"its shape is {shape}")
        self.made = _dtype_of_items(dtype)
        kind, nbytes = (list, 1) if self.made.hasobject else (bytes, self.made.itemsize)
        if type(data) is not kind or len(data) != math.prod(shape) * nbytes:
            _refuse("array", f"its data do not fill {shape} items of {self.made}")


class _Random:
    """A bit generator, a Generator or a RandomState. NumPy reads their states without checking an index."""

    def __init__(self, source: object, maker: object = None) -> None:
        named = source.path if isinstance(source, _Global) else source
        if not isinstance(source, _Random) and named not in {
            name for kind in _BIT_GENERATORS for name in (kind.__name__, _path(kind))
        }:
            _refuse("generator", f"it is made from {named!r}")
        if maker not in (None, _Global(_BIT_GENERATOR_MAKER)):
            _refuse("generator", f"it is made by {maker!r}")

    def set_state(self, state: object) -> None:
        if type(state) is tuple and len(state) == 2 and (state[1] is None or isinstance(state[1], _Seed)):
            state = state[0]
        words = state.get("state") if isinstance(state, dict) else None
        if not isinstance(state, dict) or not isinstance(words, dict):
            _refuse("generator", "its state is not a dict with a dict in it")
        for name, value in (*state.items(), *words.items()):
            is_number = type(value) in (int, float) and 0 <= value <= _LAST_POSITIONS.get(name, math.inf)
            if not (is_number or type(value) is str or value is words or _is_words(value)):
                _refuse("generator", f"its state has {name!r} = {value!r}")


class _Seed:
    """A SeedSequence, made empty and given a state of integers."""

    def __init__(self, kind: object, checksum: object, state: object) -> None:
        if kind != _Global(_path(np.random.SeedSequence)) or state is not None:
            _refuse("seed", "it is not made empty")

    def set_state(self, state: object) -> None:
        pending = [state]
        while pending:
            part = pending.pop()
            if type(part) is tuple or type(part) is list:
                pending.extend(part)
            elif not (type(part) is int or part is None or _is_words(part)):
                _refuse("seed", f"its state has {part!r}")


def _is_words(value: object) -> bool:
    return isinstance(value, _Array) and value.made is not None and value.made.kind == "u"


def _dtype_of_items(dtype: object) -> np.dtype[Any]:
    if not isinstance(dtype, _Dtype) or dtype.made is None or dtype.made.subdtype is not None:
        _refuse("dtype", f"it is {dtype!r}")
    return dtype.made


def _scalar(dtype: object, data: object) -> _Inert:
    made = _dtype_of_items(dtype)
    if type(data) is not bytes or len(data) != made.itemsize or made.hasobject:
        _refuse("scalar", f"its data are no {made}")
    return _Inert()


_NUMPY_CALLS: dict[str, Callable[..., object]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _scalar,
    _BIT_GENERATOR_MAKER: _Random,
    "numpy.random._pickle.__generator_ctor": _Random,
    "numpy.random._pickle.__randomstate_ctor": _Random,
    _SEED_MAKER: _Seed,
}
