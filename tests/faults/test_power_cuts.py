"""A power cut at any instant of an overwrite leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
from fault_cases import names, number_in, save
from filesystem import FileSystem, Operation
from power_cuts import Keep, left_after, write_files

from gpudcp.errors import GpuDcpError
from gpudcp.formats import index as index_format


def recorded(directory: Path, *, fsync: bool = True) -> tuple[dict[str, bytes], list[Operation]]:
    """The files of a checkpoint of 1, and the operations of a save of 2 over it."""
    save(1, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        system = FileSystem(directory).install(patch)
        save(2, directory, fsync=fsync)
    return before, system.operations


def cut(operations: list[Operation], before: dict[str, bytes], directory: Path, keep: Keep) -> set[str]:
    """Load what is left, save over it, and say which it was: "1", "2", or what was wrong."""
    victim = directory / "victim"
    write_files(victim, left_after(operations, before, keep))
    try:
        found = str(number_in(victim))
    except GpuDcpError as err:
        found = f"{type(err).__name__} after {len(operations)} operations"
    save(3, victim)
    if number_in(victim) != 3 or {name.split("_")[-1] for name in names(victim) if name.endswith(".tmp")}:
        found = f"after {len(operations)} operations the next save leaves {names(victim)}"
    shutil.rmtree(victim)
    return {found}


def outcomes(directory: Path, *, ncuts: int, fsync: bool = True) -> list[set[str]]:
    """What every prefix leaves: with all that was not fsynced lost, kept, and ``ncuts`` times at random."""
    before, operations = recorded(directory / "checkpoint", fsync=fsync)
    chance = Random(5)
    keeps: list[Keep] = [lambda: False, lambda: True, *[lambda: chance.random() < 0.5] * ncuts]
    return [
        set().union(*(cut(operations[:length], before, directory, keep) for keep in keeps))
        for length in range(len(operations) + 1)
    ]


@pytest.mark.parametrize("has_index", [False, True])
def test_every_prefix_of_an_overwrite_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_index: bool
) -> None:
    """Un-fsynced writes and names are lost, kept, or kept in part; with an index beside .metadata and without."""
    if has_index:
        monkeypatch.setattr(index_format, "LEAST_ROWS", 1)
    found = outcomes(tmp_path, ncuts=1)
    assert set().union(*found) == {"1", "2"}
    assert found[0] == {"1"}
    assert found[-1] == {"2"}
    # The new one is there for good from one operation on, and was not there at all before another.
    first, last = (
        next(n for n, each in enumerate(found) if "2" in each),
        max(n for n, each in enumerate(found) if "1" in each),
    )
    assert all(each == {"1"} for each in found[:first])
    assert all(each == {"2"} for each in found[last + 1 :])


@pytest.mark.slow
def test_every_prefix_of_an_overwrite_leaves_old_or_new_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty times each."""
    monkeypatch.setattr(index_format, "LEAST_ROWS", 1)
    assert set().union(*outcomes(tmp_path, ncuts=20)) == {"1", "2"}


def test_without_fsync_a_cut_may_leave_nothing(tmp_path: Path) -> None:
    """As `Options.fsync` says; and so this model can tell the difference."""
    assert set().union(*outcomes(tmp_path, ncuts=1, fsync=False)) - {"1", "2"}
