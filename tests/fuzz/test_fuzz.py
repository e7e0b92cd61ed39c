"""Mutated inputs to every parser: no crash, no hang, no memory beyond the bound, no code run, only gpudcp's errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_child import input_of
from fuzz_run import fuzz
from fuzz_targets import NAMES, attempt, target
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints stand that seeds are taken from."""
    return tmp_path_factory.mktemp("seeds")


@pytest.mark.parametrize("name", NAMES)
def test_what_nobody_damaged_is_taken(name: str, directory: Path) -> None:
    """Else the fuzzing would begin at what is refused at once. Files of the corpus may be hostile, the rest is not."""
    fuzzed = target(name, directory)
    assert attempt(fuzzed, fuzzed.seeds[0])


def test_mutated_inputs_do_no_harm(tmp_path: Path) -> None:
    """A few thousand, in a child that has 128 MiB to spend and dies at the first sign of code."""
    for counts in fuzz(*NAMES, ninputs=500, seed=1, directory=tmp_path):
        assert counts["taken"] + counts["refused"] == 500
        assert counts["refused"] > 50


@pytest.mark.slow
def test_a_hundred_thousand_mutated_inputs_do_no_harm(tmp_path: Path) -> None:
    """The same, as `make fuzz` does it, from another seed."""
    ninputs = 100_000 // len(NAMES)
    counts = fuzz(*NAMES, ninputs=ninputs, seed=2, directory=tmp_path)
    assert [each["taken"] + each["refused"] for each in counts] == [ninputs] * len(NAMES)


def test_an_input_is_the_same_in_parent_and_child(directory: Path) -> None:
    """The parent writes down what ended the child."""
    seeds = target("envelope", directory).seeds
    assert input_of("envelope", 1, 7, seeds) == input_of("envelope", 1, 7, seeds) != input_of("envelope", 1, 8, seeds)


@pytest.mark.parametrize(
    ("harm", "sign"),
    [
        ("os.system('true')", "code was run: os.system"),
        ("open('written', 'w')", "code was run: open"),
        ("bytearray(1 << 31)", "MemoryError"),
        ("1 / 0", "ZeroDivisionError"),
        ("os.abort()", "exit -6"),
    ],
)
def test_harm_is_seen(tmp_path: Path, harm: str, sign: str) -> None:
    """A parser that does it ends the child."""
    script = tmp_path / "child.py"
    script.write_text(
        "import fuzz_child, mmap, os\n"
        "from fuzz_targets import Target\n"
        f"def parse(data):\n    {harm}\n"
        "fuzz_child.bound_memory()\n"
        "watch = fuzz_child.Watch()\n"
        "watch.is_on = True\n"
        "fuzz_child.fuzz('harm', 0, 1, Target(parse, [b'x']), mmap.mmap(-1, 8), 0)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    child = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert child.returncode
    assert sign in f"{child.stderr} exit {child.returncode}"


@given(data=st.binary(max_size=200), name=st.sampled_from(NAMES))
@settings(max_examples=300, deadline=None)
def test_any_bytes_at_all_are_taken_or_refused(data: bytes, name: str, directory: Path) -> None:
    """Hypothesis finds other short inputs than mutations of long ones do, and shrinks what it finds."""
    fuzzed = target(name, directory)
    attempt(fuzzed, data)
    attempt(fuzzed, fuzzed.seeds[0][: len(data)] + data)
