"""Read the opcodes of a pickle before the C unpickler does, and refuse what would take memory or time without measure.

Nine bytes can make it take 4 GB (a memo of 2^32 places, bytes said to be that many), a hundred can keep it busy for
ever (a tuple of twice a tuple of twice a tuple, as a key), a few kilobytes can end the process (the hash of a deep
tuple). A pickler writes none of that. What the pickle names is not looked at here: that is for who resolves the names.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

MOST_CHECKED_NBYTES: Final = 64 << 20
"""Longer pickles are not looked at: some seconds for a metadata of a million chunks would be paid at every load, and
by the honest. What a longer pickle may take is not bounded."""
MOST_NBYTES_PER_BYTE: Final = 256
"""Memory that a checked pickle can take for each of its bytes, beyond 1 MiB. An opcode of one byte makes an object of
up to 100 bytes (an empty dict, a tuple of one), and as much again goes for what calls and states copy: see `_CREDIT`.
An honest pickle takes about 20."""

# Places of containers, of up to 100 bytes each, that calls and states may copy for each byte of the pickle. A pickler
# writes some ten bytes for a call, which gets a handful of arguments.
_CREDIT = 1
_LEAST_CREDIT = 1 << 10
# An empty set is 216 bytes, and one opcode.
_PLACES_OF_A_SET = 2
# How much larger than its pickle an object may look to those who walk through it without knowing what is shared.
_MOST_EXPANSION = 64
# The weight of a dict's key or a set's item, which is what hashing it takes: names of up to 256 KiB.
_MOST_KEY_WEIGHT = 1 << 16
# The hash of a tuple goes as deep as the tuple, on the stack of C.
_MOST_DEPTH = 200

# 0 is for the rare ones.
_LEAF, _PUT_NEXT, _GET, _PUT, _COUNTED, _LINE, _TUPLE_OF, _MARK, _REDUCE, _BUILD, _FILL, _FILL_ONE, _STOP = range(1, 14)
_KINDS = bytearray(256)
_NUMBERS = bytearray(256)
for _codes, _kind, _number in (
    (b"N\x88\x89)", _LEAF, 0),  # NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE
    (b"K", _LEAF, 1),  # BININT1
    (b"M", _LEAF, 2),  # BININT2
    (b"J", _LEAF, 4),  # BININT
    (b"G", _LEAF, 8),  # BINFLOAT
    (b"\x94", _PUT_NEXT, 0),  # MEMOIZE
    (b"h", _GET, 1),  # BINGET
    (b"j", _GET, 4),  # LONG_BINGET
    (b"q", _PUT, 1),  # BINPUT
    (b"r", _PUT, 4),  # LONG_BINPUT
    (b"\x8cUC\x8a", _COUNTED, 1),  # SHORT_BINUNICODE, SHORT_BINSTRING, SHORT_BINBYTES, LONG1
    (b"XTB\x8b", _COUNTED, 4),  # BINUNICODE, BINSTRING, BINBYTES, LONG4
    (b"\x8d\x8e\x96", _COUNTED, 8),  # BINUNICODE8, BINBYTES8, BYTEARRAY8
    (b"IFLSV", _LINE, 1),  # INT, FLOAT, LONG, STRING, UNICODE
    (b"c", _LINE, 2),  # GLOBAL
    (b"\x85", _TUPLE_OF, 1),
    (b"\x86", _TUPLE_OF, 2),
    (b"\x87", _TUPLE_OF, 3),
    (b"(", _MARK, 0),
    (b"R", _REDUCE, 0),
    (b"b", _BUILD, 0),
    (b"u", _FILL, 2),  # SETITEMS; the number is the distance of the keys
    (b"\x90", _FILL, 1),  # ADDITEMS
    (b"e", _FILL, 0),  # APPENDS
    (b"s", _FILL_ONE, 2),  # SETITEM
    (b"a", _FILL_ONE, 1),  # APPEND
    (b".", _STOP, 0),
):
    for _code in _codes:
        _KINDS[_code], _NUMBERS[_code] = _kind, _number


# A tuple's depth stands above its weight, so that the sum of the weights and the largest depth come at the speed of C.
_DEPTH_UNIT = 1 << 64
_WEIGHT_MASK = _DEPTH_UNIT - 1
# Of an object that a pickle names: nothing can be put into it, and its weight is 1.
_GLOBAL = type("_Global", (int,), {})(1)
# NEWOBJ of no arguments, MEMOIZE, EMPTY_DICT, MEMOIZE, MARK: how a dataclass begins.
_NEW_RECORD = b")\x81\x94}\x94("
_INTEGER = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"
# A tuple of integers, MEMOIZE, TUPLE1, MEMOIZE, REDUCE, MEMOIZE: how a torch.Size ends.
_CALL_OF_INTEGERS = re.compile(
    rb"(?:%b\x85|%b{2}\x86|%b{3}\x87|\(%b*t)\x94\x85\x94R\x94" % ((_INTEGER,) * 4), re.DOTALL
)


class RefusedPickleError(ValueError):
    """The opcodes are none that a pickler writes."""


class _Made:
    """What can change after it was made: a list, a dict, a set, an instance."""

    __slots__ = ("is_shared", "nplaces", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        """All that stands in it, as often as it stands there."""
        self.nplaces = weight
        """What a copy of it copies, at most."""
        self.is_shared = False

    def __radd__(self, weight: int) -> int:
        return weight + self.weight


class Opcodes(NamedTuple):
    """What was seen in a pickle."""

    end: int
    """The byte after its STOP."""
    names: frozenset[str]
    """The globals that GLOBAL opcodes name: ``module.name``."""


def check_opcodes(data: bytes, *, may_be_cyclic: bool = False) -> Opcodes | None:
    """That unpickling ``data``, from its start, takes time and memory in proportion to its length.

    Args:
        data: the pickle, and anything after it.
        may_be_cyclic: whether something in it may hold itself, and so be filled after it was used.

    Returns None for what is longer than `MOST_CHECKED_NBYTES`, and was not looked at.

    Raises:
        RefusedPickleError: it would not, or it is no whole pickle.
    """
    if len(data) > MOST_CHECKED_NBYTES:
        return None
    walk = _Walk(data, may_be_cyclic)
    try:
        return Opcodes(walk.run(), frozenset(walk.names))
    except (IndexError, KeyError, AttributeError, ValueError) as err:
        if isinstance(err, RefusedPickleError):
            raise
        raise RefusedPickleError("its opcodes are no whole pickle") from None


class _Walk:
    """Runs the opcodes over weights: an integer for what cannot change, a `_Made` for what can.

    A weight is the number of parts, each as often as it is met: a text or a number of many bytes is of several parts.
    """

    def __init__(self, data: bytes, may_be_cyclic: bool) -> None:
        self.names: set[str] = set()
        self._may_be_cyclic = may_be_cyclic
        self._late_weight = 0
        self._data = data
        self._credit = max(_LEAST_CREDIT, _CREDIT * len(data))
        self._most_weight = max(_LEAST_CREDIT, _MOST_EXPANSION * len(data))
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> int:
        # One loop, as it is passed some ten million times for a large metadata; what always comes together is passed
        # over together.
        data, memo, kinds, numbers, position = self._data, self._memo, _KINDS, _NUMBERS, 0
        stack, outer_stacks = self._stack, self._outer_stacks
        while True:
            opcode = data[position]
            position += 1
            kind, number = kinds[opcode], numbers[opcode]
            if kind == _PUT_NEXT:
                memo[len(memo)] = stack[-1]
            elif kind == _GET:
                value = memo[int.from_bytes(data[position : position + number], "little")]
                position += number
                if value is _GLOBAL:
                    if data.startswith(_NEW_RECORD, position):
                        for _ in range(2):
                            memo[len(memo)] = made = _Made(1)
                            stack.append(made)
                        position += len(_NEW_RECORD)
                        outer_stacks.append(stack)
                        stack = []
                        continue
                    if (found := _CALL_OF_INTEGERS.match(data, position)) is not None:
                        weight = found.end() - position  # each integer takes two bytes at least
                        self._spend(weight)
                        for _ in range(3):
                            memo[len(memo)] = weight
                        position += weight
                        value = weight
                elif value.__class__ is _Made:
                    value.is_shared = True
                stack.append(value)
            elif kind == _LEAF:
                stack.append(1)
                position += number
            elif kind == _COUNTED:
                end = position + number
                nbytes = int.from_bytes(data[position:end], "little")
                position = self._moved(end, nbytes)
                stack.append(1 + (nbytes >> 2))
            elif kind == _MARK:
                outer_stacks.append(stack)
                stack = []
            elif kind == _TUPLE_OF:
                stack[-number:] = [self._tuple_of(stack[-number:])]
            elif kind == _FILL:
                items, stack = stack, outer_stacks.pop()
                self._fill(stack[-1], items, number)
            elif kind == _FILL_ONE:
                items = stack[-number:]
                del stack[-number:]
                self._fill(stack[-1], items, number if number == 2 else 0)
            elif kind == _REDUCE:
                self._spend(arguments := self._weight_of([stack.pop()]))
                stack[-1] = _Made(arguments)
            elif kind == _BUILD:
                state = stack.pop()
                self._spend(state.nplaces if state.__class__ is _Made else state & _WEIGHT_MASK)
                self._fill(stack[-1], [state], 0)
            elif kind == _STOP:
                return position
            elif kind == _PUT:
                self._put(int.from_bytes(data[position : position + number], "little"), stack[-1])
                position += number
            elif kind == _LINE:
                start = position
                for _ in range(number):
                    position = data.index(b"\n", position) + 1
                if number == 2:
                    self.names.add(data[start : position - 1].decode("utf-8", "replace").replace("\n", "."))
                stack.append(_GLOBAL if number == 2 else 1 + (position - start >> 2))
            else:
                self._stack = stack
                position = self._step(opcode, position)
                stack = self._stack

    def _step(self, opcode: int, position: int) -> int:
        """One of the other opcodes; returns where the next one stands."""
        stack = self._stack
        match bytes((opcode,)):
            case b"\x80":  # PROTO
                return position + 1
            case b"\x95":  # FRAME
                return position + 8
            case b"]" | b"}":  # EMPTY_LIST, EMPTY_DICT
                stack.append(_Made(1))
            case b"\x8f":  # EMPTY_SET
                self._spend(_PLACES_OF_A_SET)
                stack.append(_Made(1))
            case b"t" | b"l" | b"d" | b"\x91":  # TUPLE, LIST, DICT, FROZENSET
                self._stack = self._outer_stacks.pop()
                self._stack.append(self._collected(opcode, stack))
            case b"\x81":  # NEWOBJ
                self._spend(arguments := self._weight_of([stack.pop()]))
                stack[-1] = _Made(arguments)
            case b"\x92":  # NEWOBJ_EX
                self._spend(arguments := self._weight_of([stack.pop(), stack.pop()]))
                stack[-1] = _Made(arguments)
            case b"\x93":  # STACK_GLOBAL
                stack.pop()
                stack[-1] = _GLOBAL
            case b"Q":  # BINPERSID
                stack[-1] = _Made(self._weight_of(stack[-1:]))
            case b"0":  # POP, which takes a mark where one stands on top
                self._stack = stack if stack else self._outer_stacks.pop()
                del stack[-1:]
            case b"1":  # POP_MARK
                self._stack = self._outer_stacks.pop()
            case b"g" | b"p":  # GET, PUT
                end = self._data.index(b"\n", position)
                number = int(self._data[position:end])
                if opcode == ord("p"):
                    self._put(number, stack[-1])
                else:
                    stack.append(value := self._memo[number])
                    if isinstance(value, _Made):
                        value.is_shared = True
                return end + 1
            case code:
                raise RefusedPickleError(f"it has the opcode {code!r}, which no pickler writes")
        return position

    def _collected(self, opcode: int, items: list[Any]) -> Any:
        if opcode == ord("t"):
            return self._tuple_of(items)
        if opcode == 0x91:
            self._spend(_PLACES_OF_A_SET)
        made = _Made(1)
        self._fill(made, items, {ord("l"): 0, ord("d"): 2, 0x91: 1}[opcode])
        return made

    def _moved(self, position: int, nbytes: int) -> int:
        if nbytes > len(self._data) - position:
            raise RefusedPickleError(f"it speaks of {nbytes} bytes where {len(self._data) - position} are left")
        return position + nbytes

    def _put(self, number: int, value: Any) -> None:
        # The unpickler's memo is an array as long as the largest number; a pickler counts up from 0.
        if number > len(self._data):
            raise RefusedPickleError(
                f"it puts an object at number {number} of its memo, and has {len(self._data)} bytes"
            )
        self._memo[number] = value

    def _weight_of(self, items: list[Any]) -> int:
        weight: int = sum(items, 1) & _WEIGHT_MASK
        if weight > self._most_weight:
            raise RefusedPickleError(f"an object in it holds others {weight} times over")
        return weight

    def _tuple_of(self, items: list[Any]) -> int:
        depth: int = max([item for item in items if item.__class__ is not _Made], default=0) // _DEPTH_UNIT + 1
        if depth > _MOST_DEPTH:
            raise RefusedPickleError(f"tuples in it are {depth} deep")
        return self._weight_of(items) + depth * _DEPTH_UNIT

    def _fill(self, target: Any, items: list[Any], key_distance: int) -> None:
        """Put items into a container, or a state into an instance; ``key_distance``: every how manyeth is hashed."""
        if target.is_shared:
            # It was taken for lighter than it is, by whatever holds it: from now on all pay for it.
            if not self._may_be_cyclic:
                raise RefusedPickleError("an object in it is filled after it was used")
            self._late_weight += self._weight_of(items)
        if key_distance:
            keys = items[::key_distance]
            if sum(keys) & _WEIGHT_MASK > len(keys) << 4:
                self._check_keys(keys)
        target.weight += self._weight_of(items)
        target.nplaces += len(items)
        if target.weight > self._most_weight:
            raise RefusedPickleError(f"an object in it holds others {target.weight} times over")

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            weight: int = (0 + key) & _WEIGHT_MASK
            if weight > _MOST_KEY_WEIGHT:
                raise RefusedPickleError(f"a key in it is made of {weight} parts")
            self._spend(weight >> 4)

    def _spend(self, nplaces: int) -> None:
        self._credit -= nplaces + self._late_weight
        if self._credit < 0:
            raise RefusedPickleError("its calls copy more than it says")
