"""The error tree: what a rank raises, every other rank gets whole."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
import re
import traceback
from typing import Any

import pytest

from gpudcp import errors
from gpudcp.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GpuDcpError,
    MissingKeyError,
    RankFailedError,
    TransferError,
    UnsafeCheckpointError,
)

MESSAGE = "model.weight: 7 bytes, not 8\nin two lines, ключ"
DETAILS = {
    "path": "dir/__0_0_ab.distcp",
    "byte_offset": 1 << 40,
    "expected_nbytes": 8,
    "moved_nbytes": 7,
    "errno": 28,
    "fqn": "model.weight",
    "expected_crc32": 0xFFFFFFFF,
    "found_crc32": 0,
    "refused": "os.system",
    "ranks": {0: "OSError: disk full", 7: "KeyError: 'x'"},
}


def every_class(root: type[GpuDcpError] = GpuDcpError) -> list[type[GpuDcpError]]:
    found = [root]
    for each in root.__subclasses__():
        found += every_class(each)
    return [each for each in found if each.__module__ == errors.__name__]


def details_of(cls: type[GpuDcpError]) -> dict[str, Any]:
    """A value for each keyword that the class names."""
    parameters = inspect.signature(cls).parameters.values()
    return {each.name: DETAILS[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}


@pytest.mark.parametrize("cls", every_class())
@pytest.mark.parametrize("protocol", [2, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_every_error_survives_pickle_with_its_message_and_attributes(cls: type[GpuDcpError], protocol: int) -> None:
    """An error that does not unpickle leaves the other ranks of a collective hanging."""
    details = details_of(cls)
    error = cls(MESSAGE, **details)
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == str(error) == MESSAGE
        assert again.args == error.args == (MESSAGE,)
        assert {name: getattr(again, name) for name in details} == details
        assert pickle.dumps(again, protocol) == pickle.dumps(error, protocol)


@pytest.mark.parametrize("cls", every_class())
def test_every_error_survives_pickle_without_its_optional_attributes(cls: type[GpuDcpError]) -> None:
    """What was not told stays None."""
    required = {
        each.name: DETAILS[each.name]
        for each in inspect.signature(cls).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.default is each.empty
    }
    again: Any = pickle.loads(pickle.dumps(cls(MESSAGE, **required)))
    for name in details_of(cls):
        assert getattr(again, name) == required.get(name)


def test_every_error_is_the_builtin_that_the_tree_in_the_docstring_says() -> None:
    """A caller's except clause for the built-in catches it; the drawing names every class and no other."""
    drawn = dict(re.findall(r"[├└]── (\w+)\((\w+)\)|$", errors.__doc__ or ""))
    drawn.pop("", None)
    drawn["CheckpointNotFoundError"], drawn["CheckpointExistsError"] = "FileNotFoundError", "FileExistsError"
    assert {cls.__name__ for cls in every_class()} == {*drawn, "GpuDcpError"}
    for cls in every_class()[1:]:
        assert issubclass(cls, getattr(builtins, drawn[cls.__name__]))
        assert cls.__bases__[0] is GpuDcpError
        assert cls.__name__ in (errors.__doc__ or "")


def test_every_error_is_public() -> None:
    """Listed, and documented in one sentence at least."""
    assert sorted(errors.__all__) == sorted(cls.__name__ for cls in every_class())
    assert all(cls.__doc__ for cls in every_class())


def test_a_missing_key_reads_as_a_sentence() -> None:
    """A plain KeyError would show the repr of its message, quotes and escapes included."""
    error = MissingKeyError("checkpoint: no item 'a\\b'\nat all")
    assert str(error) == "checkpoint: no item 'a\\b'\nat all"
    assert "MissingKeyError: checkpoint: no item" in "".join(traceback.format_exception_only(type(error), error))
    with pytest.raises(KeyError):
        raise error


def test_the_attributes_of_an_error_are_those_it_was_given() -> None:
    """By name, for programs that decide on them."""
    transfer: Any = TransferError("short read", path="p", byte_offset=5, expected_nbytes=9, moved_nbytes=4, errno=5)
    assert (transfer.path, transfer.byte_offset) == ("p", 5)
    assert (transfer.expected_nbytes, transfer.moved_nbytes, transfer.errno) == (9, 4, 5)
    corrupt: Any = CorruptCheckpointError("bad", path="p", fqn="f", expected_crc32=1, found_crc32=2)
    assert (corrupt.path, corrupt.fqn, corrupt.expected_crc32, corrupt.found_crc32) == ("p", "f", 1, 2)
    unsafe: Any = UnsafeCheckpointError("no", refused="os.system")
    assert unsafe.refused == "os.system"
    failed: Any = RankFailedError("two ranks", ranks={3: "why"})
    assert failed.ranks == {3: "why"}


def test_errors_that_are_os_errors_have_no_misleading_parts() -> None:
    """OSError's own formatting, with [Errno None], must not come through."""
    error = CheckpointNotFoundError("dir: no checkpoint")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "dir: no checkpoint"
    assert error.errno is None
    assert isinstance(error, FileNotFoundError)


class _TwoDetails(GpuDcpError, LookupError):
    """Of somebody who extends the tree, with a constructor of the tree's form."""

    def __init__(self, message: str, *, first: int, second: tuple[int, ...] = ()) -> None:
        super().__init__(message, first=first, second=second)


def test_an_error_that_extends_the_tree_survives_pickle_too() -> None:
    """Pickling needs no code of its own in a class."""
    again: Any = pickle.loads(pickle.dumps(_TwoDetails("text", first=1, second=(2, 3))))
    assert (str(again), again.first, again.second) == ("text", 1, (2, 3))
