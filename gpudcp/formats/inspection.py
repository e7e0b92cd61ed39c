"""Inspect the pickle of an object before NumPy gets to see it, by running it over stand-ins that do nothing.

NumPy trusts its pickles: a dtype's flags can turn the bytes of a file into addresses, a generator's position can lie
outside its state. So every NumPy object in a pickle must look as NumPy itself writes it, or the pickle is refused.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

BIT_GENERATORS = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
_BIT_GENERATOR_MAKER = "numpy.random._pickle.__bit_generator_ctor"
SEED_MAKER = "numpy.random.bit_generator.__pyx_unpickle_SeedSequence"
# Where a generator reads next in its block of words. NumPy takes any number, and would read outside the block.
_LAST_POSITIONS = {"pos": 624, "buffer_pos": 4}
_ALIGNED_STRUCT = 0x80


class RefusedError(Exception):
    """A pickle asks for what is not known to be harmless."""

    def __init__(self, refused: str, reason: str, *, registrable: Sequence[str] = ()) -> None:
        names = ", ".join(registrable)
        registration = f"torch.serialization.add_safe_globals([{names}]) if you know that to be harmless, or "
        super().__init__(
            f"{reason}; use {registration if names else ''}"
            "Options(trust_pickle=True), or DefaultLoadPlanner(trust_pickle=True) where you give a planner, which runs "
            "whatever code the file names, if you trust its author"
        )
        self.refused = refused
        self.reason = reason


class UnmeasuredError(RefusedError):
    """A pickle asks for memory or time out of all proportion to its length."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, f"{path} is called with {reason}, for which an honest pickle has no use")


def refused_opcode(name: str) -> RefusedError:
    return RefusedError(f"opcode {name}", f"the weights-only unpickler does not take the opcode {name}")


def path_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def in_a_line(error: Exception) -> str:
    # torch wraps what its unpickler says in advice, and what its C++ says in a backtrace.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.partition(chr(10))[0][:200]}".removesuffix(": ")


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


class _Range(_Inert):
    """A range: small, until something is made of all its numbers."""


class Inspector:
    """Runs a pickle over stand-ins, with the opcodes of torch's weights-only unpickler: imports and calls nothing.

    NumPy believes its pickles: a dtype with false flags has its items taken for object pointers, a list that is too
    short is read past its end, a second state frees memory in use. So NumPy must be told only what NumPy itself writes.
    And as some functions call what they are given, or what they find as an attribute, NumPy's classes and functions are
    called by the pickle directly or not at all: they lie in no container, in no state, and in no arguments but NumPy's.
    """

    def __init__(self, *, nbytes: int) -> None:
        self._nbytes = nbytes
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
                _check_measure(stack[-1], arguments, self._nbytes)
                stack[-1] = _called(stack[-1], arguments)
            case "NEWOBJ":
                arguments = stack.pop()
                _check_data(arguments, stack[-1])
                _check_measure(stack[-1], arguments, self._nbytes)
                stack[-1] = _Inert()
            case "BUILD":
                state = stack.pop()
                self._set_state(stack[-1], state)
            case "BINPERSID":
                _check_data(stack[-1])
                _check_storage(stack[-1], self._nbytes)
                stack[-1] = _Inert()
            case "STOP":
                _check_data(stack[-1])
            case _:
                raise refused_opcode(opcode)

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
                _refuse("object", f"its state gives {in_a_line(error)}")
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
    raise RefusedError(f"NumPy {kind}", f"it has a NumPy {kind} that NumPy does not write: {reason}")


def is_measured(path: str) -> bool:
    """Whether a call of this global can take memory or time that its arguments alone do not show."""
    return path in _MEASURED or _TENSOR_CLASS.fullmatch(path) is not None


def _check_measure(maker: object, arguments: Any, nbytes: int) -> None:
    """That a call in a pickle of an item of ``nbytes`` bytes makes nothing out of proportion to it.

    Raises:
        UnmeasuredError: it does.
    """
    if not isinstance(maker, _Global) or isinstance(arguments, _NumPyArguments):
        return
    path = maker.path.replace("__builtin__", "builtins")
    if not isinstance(arguments, tuple):  # torch would call it with all the items that this has
        raise UnmeasuredError(path, "arguments that are no tuple")
    if any(isinstance(argument, _Range) for argument in arguments):
        raise UnmeasuredError(path, "a range")
    if path == "torch._tensor._rebuild_from_type_v2":  # calls its first argument with its third
        _check_measure(arguments[0], arguments[2], nbytes)
    elif _TENSOR_CLASS.fullmatch(path):
        raise UnmeasuredError(path, "arguments")
    elif path.endswith((".bytearray", ".bytes")) and any(type(argument) is int for argument in arguments):
        raise UnmeasuredError(path, "an integer")
    elif path == "fractions.Fraction" and not all(_is_plain_number(argument) for argument in arguments):
        raise UnmeasuredError(path, "an exponent")  # 1e999999999 has as many digits
    elif path == "_codecs.encode" and arguments[1:] not in ((), ("latin1",)):
        raise UnmeasuredError(path, "another encoding than latin1")
    elif path == "torch._utils._rebuild_qtensor" and math.prod(arguments[2]) > 8 * nbytes:
        raise UnmeasuredError(path, f"sizes of {math.prod(arguments[2])} elements in an item of {nbytes} bytes")


def _is_plain_number(argument: object) -> bool:
    return type(argument) is int or (type(argument) is str and "e" not in argument.lower())


def _check_storage(pid: Any, nbytes: int) -> None:
    """That the storage of a persistent id, which torch makes before it reads it, is no longer than the item.

    Raises:
        UnmeasuredError: it is.
    """
    if isinstance(pid, tuple) and len(pid) > 4 and not (type(pid[4]) is int and 0 <= pid[4] <= nbytes):
        raise UnmeasuredError("torch.storage.TypedStorage", f"{pid[4]} elements in an item of {nbytes} bytes")


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
            raise RefusedError("builtins.bytes", "builtins.bytes is called with an argument")
        return b""
    return _Range() if maker.path in ("builtins.range", "__builtin__.xrange") else _Inert()


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
        known = (*(kind.__name__ for kind in BIT_GENERATORS), *(_Global(path_of(kind)) for kind in BIT_GENERATORS))
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
        if kind != _Global(path_of(np.random.SeedSequence)) or state is not None:
            _refuse("seed", "it is not made empty")

    def set_state(self, state: Any) -> None:
        for part in state:
            items = part if type(part) in (tuple, list) else (part,)
            if not all(type(item) is int or item is None or _is_words(item) for item in items):
                _refuse("seed", f"its state has {part!r}")


def _is_words(value: object) -> bool:
    return isinstance(value, _Array) and value.dtype is not None and value.dtype.kind == "u"


_NUMPY_CLASSES = frozenset({"numpy.ndarray", *map(path_of, (np.random.SeedSequence, *BIT_GENERATORS))})
_NUMPY_CALLS: dict[str, Callable[..., object]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _scalar,
    _BIT_GENERATOR_MAKER: _Random,
    "numpy.random._pickle.__generator_ctor": _Random,
    "numpy.random._pickle.__randomstate_ctor": _Random,
    SEED_MAKER: _Seed,
}
# The classes of tensors and storages, which allocate what a number says. Nothing that torch saves calls them.
_TENSOR_CLASS = re.compile(r"torch\.([a-z_.]*\.)?[A-Za-z]*(Tensor|Storage|Parameter)")
_MEASURED = frozenset(
    {
        *("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_qtensor", "fractions.Fraction"),
        *(
            f"{home}.{name}"
            for home in ("builtins", "__builtin__")
            for name in ("bytearray", "bytes", "range", "xrange")
        ),
        *("_codecs.encode", "__builtin__.xrange"),
    }
)
