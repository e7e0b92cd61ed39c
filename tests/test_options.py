"""Options: validated once, when they are made, with a message that names option, value and choices."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from gpudcp.errors import PlanError
from gpudcp.options import SLAB_ALIGNMENT_NBYTES, Options

CHOICES = {
    "async_mode": ("thread", "process"),
    "executor": ("auto", "cpu", "cuda", "interpret"),
    "files": ("auto", "gds", "kvikio", "posix"),
    "direct_io": ("auto", "on", "off"),
    "verify": ("payload", "full", "off"),
    "unsafe_objects": ("warn", "error"),
}
SWITCHES = {"fsync": True, "checksum": True, "trust_pickle": False}
INTEGERS = {"slab_nbytes": 4096, "lanes": 1, "threads": 1}


def test_the_defaults_are_safe() -> None:
    """Checked, synced and without trust, unless somebody says otherwise."""
    options = Options()
    assert {name: getattr(options, name) for name in SWITCHES} == SWITCHES
    assert (options.executor, options.files, options.direct_io) == ("auto", "auto", "auto")
    assert (options.verify, options.unsafe_objects) == ("payload", "warn")


def test_every_option_is_named_in_this_file() -> None:
    """A new option needs its tests."""
    assert {field.name for field in dataclasses.fields(Options)} == {*CHOICES, *SWITCHES, *INTEGERS}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_its_values_and_no_other(name: str) -> None:
    """The message lists what it could have been."""
    for value in CHOICES[name]:
        assert getattr(Options(**{name: value}), name) == value
    for wrong in ("", "AUTO", "all", None, True, 1, ["auto"]):
        with pytest.raises(PlanError) as caught:
            Options(**{name: wrong})  # type: ignore[arg-type]
        assert str(caught.value) == (f"Options({name}={wrong!r}): must be one of {', '.join(map(repr, CHOICES[name]))}")


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_a_boolean(name: str) -> None:
    """A string such as "false" would otherwise be true."""
    for value in (True, False):
        assert getattr(Options(**{name: value}), name) is value
    for wrong in ("false", 0, 1, None):
        with pytest.raises(PlanError, match=rf"^Options\({name}={wrong!r}\): must be True or False$"):
            Options(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", INTEGERS)
def test_a_number_is_an_integer_of_at_least_its_least(name: str) -> None:
    """No fraction, no boolean, nothing below."""
    least = INTEGERS[name]
    assert getattr(Options(**{name: least}), name) == least
    for wrong in (least - 1, 0, -4096, float(least), str(least), True):
        with pytest.raises(PlanError, match=rf"^Options\({name}=.*\): must be an integer of at least {least}$"):
            Options(**{name: wrong})  # type: ignore[arg-type]


def test_slabs_and_threads_need_not_be_said() -> None:
    """Their defaults depend on where the tensors are; a ring of no lanes is none."""
    assert Options(slab_nbytes=None, threads=None) == Options()
    with pytest.raises(PlanError, match=r"^Options\(slab_nbytes=1073745920\): must be at most 1073741824$"):
        Options(slab_nbytes=(1 << 30) + 4096)
    with pytest.raises(PlanError, match=r"^Options\(lanes=None\): must be an integer of at least 1$"):
        Options(lanes=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [4097, 8191, 4096 + 64, (1 << 20) + 1])
def test_a_slab_is_a_whole_number_of_blocks(wrong: int) -> None:
    """Direct I/O moves whole blocks, and payloads must end between two elements at a slab's end."""
    assert Options(slab_nbytes=3 * SLAB_ALIGNMENT_NBYTES).slab_nbytes == 12288
    with pytest.raises(PlanError, match=rf"^Options\(slab_nbytes={wrong}\): must be a multiple of 4096$"):
        Options(slab_nbytes=wrong)


def test_options_are_a_value() -> None:
    """Keyword-only, unchangeable, comparable, and the same after pickling and replacing; replacing checks again."""
    options = Options(lanes=3, verify="full")
    assert options == Options(verify="full", lanes=3) != Options()
    assert hash(options) == hash(Options(verify="full", lanes=3))
    assert pickle.loads(pickle.dumps(options)) == options
    make: Any = Options
    with pytest.raises(TypeError):
        make("cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.lanes = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        make(slab_bytes=4096)
    with pytest.raises(PlanError):
        dataclasses.replace(options, threads=0)
