"""What the bytes of an object item mean: dumped as torch.save does, loaded without running the code that they name.

torch's weights-only unpickler loads them. It takes too little (no NumPy, dates, paths), so it is lent a list of
harmless types for the time of a load. And of NumPy, which trusts its pickles, it checks too little: so a pickle that
needs the list is run over stand-ins first, and every NumPy object in it must look as NumPy itself writes it.

Memory and time are in proportion to the item's length, for pickles of up to 64 MiB: opcodes are checked first, and
calls that make much of little (``bytearray(10**12)``, which torch's own list allows) are refused.
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
import pathlib
import pickle
import pickletools
import re
import threading
import types
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gpudcp.errors import CorruptCheckpointError, UnsafeCheckpointError
from gpudcp.formats.archive import check_record_sizes
from gpudcp.formats.inspection import (
    BIT_GENERATORS,
    SEED_MAKER,
    Inspector,
    RefusedError,
    UnmeasuredError,
    in_a_line,
    is_measured,
    path_of,
    refused_opcode,
)
from gpudcp.formats.opcodes import check_opcodes

# Longer integers take an opcode, LONG4, that the weights-only unpickler does not know.
_MAX_INTEGER_BITS = 8 * 255 - 1
# The format before torch 1.6: a magic number, a version, the system, the object, the keys of the storages.
_LEGACY_PICKLES = 5
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


class DumpedObject(io.BytesIO):
    """The dump of an object, and the object that it is of."""

    def __init__(self, value: object) -> None:
        super().__init__(dump_object(value))
        self.value = value


def load_object(data: io.BytesIO, *, fqn: str, trust_pickle: bool) -> object:
    """The object in ``data``, read from its start, with its tensors on the CPU.

    Raises:
        UnsafeCheckpointError: the bytes ask for something that is not known to be harmless; it was not run.
        CorruptCheckpointError: the bytes are no torch.save file, or what they describe cannot be built.
    """
    try:
        if not trust_pickle:
            return _load_harmless(data, map_location="cpu")
        return _loaded(data, map_location="cpu", weights_only=False)
    except RefusedError as refusal:
        raise UnsafeCheckpointError(f"object {fqn!r} was not loaded: {refusal}", refused=refusal.refused) from None
    except MemoryError:
        raise
    # Arbitrary bytes make an unpickler, and the types that it calls, raise almost anything.
    except Exception as error:
        raise CorruptCheckpointError(f"object {fqn!r} cannot be loaded: {in_a_line(error)}", fqn=fqn) from error


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
    except RefusedError as refusal:
        return refusal.refused, refusal.reason
    except MemoryError:
        raise
    except Exception as error:
        return path_of(type(value)), in_a_line(error)
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


def _load_harmless(data: io.BytesIO, *, map_location: str) -> object:
    """torch.load with ``weights_only=True``, and with our list where torch's and the user's do not suffice."""
    _check_measures(data)
    # Held from the start: a load that met what another thread registered would take NumPy's objects uninspected.
    with _REGISTRATION:
        try:
            return _load_weights_only(data, map_location)
        except pickle.UnpicklingError as error:
            refusal = error
        except RuntimeError as error:
            if "TorchScript" in str(error):
                raise RefusedError("TorchScript archive", "it is a TorchScript archive, a program") from None
            raise
        unlisted = _unlisted_globals(data, refusal)
        Inspector(nbytes=len(data.getbuffer())).run(_pickle_bytes(data))
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


def _check_measures(data: io.BytesIO) -> None:
    """That loading takes memory and time in proportion to the length of ``data``.

    Raises:
        UnmeasuredError: a call in it does not.
        ValueError: an opcode or a record in it does not.
    """
    nbytes = len(data.getbuffer())
    if is_archive := _is_archive(data):
        check_record_sizes(data.getbuffer())
    rest = _pickle_bytes(data)
    for _ in range(1 if is_archive else _LEGACY_PICKLES):
        seen = check_opcodes(rest, may_be_cyclic=True)
        if seen is None:
            return
        if any(map(is_measured, seen.names)):
            try:
                Inspector(nbytes=nbytes).run(rest)
            except UnmeasuredError:
                raise
            # torch stops where the inspector does, and has the better reason.
            except Exception:
                return
        if not (rest := rest[seen.end :]):
            return


def _load_weights_only(data: io.BytesIO, map_location: str) -> object:
    return _loaded(data, map_location=map_location, weights_only=True)


def _loaded(data: io.BytesIO, *, map_location: str, weights_only: bool) -> object:
    data.seek(0)
    try:
        return torch.load(data, map_location=map_location, weights_only=weights_only)
    except UserWarning as warning:
        # Torch 2.11 warns so, once in a process, of the first sparse tensor that it loads itself. Where the user made
        # warnings errors, that is no fault of the data. Ignored only then: filters are every thread's.
        if "Sparse invariant checks" not in str(warning):
            raise
    data.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(data, map_location=map_location, weights_only=weights_only)


def _unlisted_globals(data: io.BytesIO, refusal: pickle.UnpicklingError) -> set[str]:
    """What the pickle names that only our list allows.

    Raises:
        RefusedError: it names what no list allows.
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


def _refused_globals(refused: list[str], error: Exception) -> RefusedError:
    # torch itself lists its nested and distributed tensors once their modules are imported, and says which.
    if needed := re.search(r".* must be imported to load .*", str(error)):
        return RefusedError(refused[0], needed[0].removeprefix("Weights only load failed. "))
    names = refused[0] if len(refused) == 1 else f"each of {', '.join(refused)}"
    return RefusedError(refused[0], f"{names} is not known to be harmless", registrable=refused)


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
        return refused_opcode(opcodes.get(int(found[1]), found[1]))
    if found := re.search(r"Can only .*but got <class '([^']+)'>", text):
        return RefusedError(found[1], f"the weights-only unpickler neither fills a {found[1]} nor gives it a state")
    return RefusedError("pickle", in_a_line(error))


def _is_archive(data: io.BytesIO) -> bool:
    return bytes(data.getbuffer()[:4]) == b"PK\x03\x04"


def _pickle_bytes(data: io.BytesIO) -> bytes:
    if not _is_archive(data):
        return data.getvalue()
    data.seek(0)
    # The reader of torch.load: another could find another record in an archive made to deceive.
    return torch._C.PyTorchFileReader(data).get_record("data.pkl")


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
    arrays = (np.dtype, np.ndarray, np.random.SeedSequence, *BIT_GENERATORS)
    listed |= {path_of(kind): kind for kind in (*builtin, *records, *values, *times, *arrays)}
    generator = np.random.Generator(np.random.PCG64(0))
    randoms = (np.random.RandomState(0), generator, generator.bit_generator)
    listed |= {path_of(maker): maker for maker in map(_maker_of, randoms)}
    listed[SEED_MAKER] = _maker_of(np.random.SeedSequence(0))
    return types.MappingProxyType(listed)


@functools.cache
def _stateful_types() -> frozenset[type[Any]]:
    """What NumPy gives a state in its pickles."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    randoms = (*BIT_GENERATORS, np.random.SeedSequence, np.random.RandomState, np.random.Generator)
    return frozenset({*dtypes, *randoms, np.ndarray})


def _maker_of(value: object) -> Any:
    return value.__reduce__()[0]
