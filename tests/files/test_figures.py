"""Figures are remembered whole or not at all, by any number of writers at once, and never stop a transfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpudcp.files import figures
from gpudcp.files.figures import Figure, Place, place_of, read_figures, record_transfer, write_figures

PLACE = Place("ext4 /dev/nvme0n1 /data", "NVIDIA H200")
FIGURE = Figure(direction="write", way="gds", threads=4, request_nbytes=4 << 20, gb_per_s=12.5, ntransfers=3)
LARGE = 1 << 30


def files_in(cache_directory: str) -> list[str]:
    """What stands in the cache."""
    directory = os.path.join(cache_directory, "gpudcp")
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def record(directory: Path, *, gb_per_s: float = 1.0, nbytes: int = LARGE, **changed: Any) -> None:
    """A write of host memory at such a speed."""
    keywords = {"direction": "write", "way": "direct", "threads": 2, "request_nbytes": 4 << 20, **changed}
    record_transfer(str(directory), "cpu", nbytes=nbytes, seconds=nbytes / gb_per_s / 1e9, **keywords)


def learned(directory: Path) -> tuple[Figure, ...]:
    """What host memory has taught."""
    return read_figures(place_of(str(directory), "cpu"), "learned")


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_figures_come_back_as_they_were(cache_directory: str) -> None:
    """By place and origin, each in a file of its own."""
    second = replace(FIGURE, direction="read", way="buffered")
    assert read_figures(PLACE, "tuned") == ()
    assert write_figures(PLACE, "tuned", [FIGURE, second])
    assert write_figures(PLACE, "learned", [second])
    assert write_figures(PLACE._replace(device="cpu"), "tuned", [])
    assert read_figures(PLACE, "tuned") == (FIGURE, second)
    assert read_figures(PLACE, "learned") == (second,)
    assert read_figures(PLACE._replace(device="cpu"), "tuned") == ()
    assert read_figures(PLACE._replace(file_system="xfs /dev/sda /"), "tuned") == ()
    assert len(files_in(cache_directory)) == 3


def test_the_cache_is_the_users_as_xdg_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative XDG_CACHE_HOME is ignored, as its specification says; without a home nothing is remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert write_figures(PLACE, "tuned", [FIGURE])
        assert len(list((tmp_path / "home" / ".cache" / "gpudcp").iterdir())) == 1
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not write_figures(PLACE, "tuned", [FIGURE])
    assert read_figures(PLACE, "tuned") == ()
    assert [each.name for each in tmp_path.iterdir()] == ["home"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the directory should be, as on any disk that is full or read-only."""
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert not write_figures(PLACE, "tuned", [FIGURE])
    assert read_figures(PLACE, "tuned") == ()
    record(tmp_path)


def test_a_replacement_that_fails_leaves_the_old_figures_alone(
    cache_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no temporary file."""
    write_figures(PLACE, "tuned", [FIGURE])

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    assert not write_figures(PLACE, "tuned", [])
    assert read_figures(PLACE, "tuned") == (FIGURE,)
    assert len(files_in(cache_directory)) == 1


def broken(name: str, value: Any) -> str:
    """A file with one value of its figure changed."""
    data = json.loads(WHOLE)
    data["figures"][0][name] = value
    return json.dumps(data)


WHOLE = json.dumps(
    {
        "version": 1,
        "file_system": PLACE.file_system,
        "device": PLACE.device,
        "figures": [{name: getattr(FIGURE, name) for name in Figure.__slots__}],
    }
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "[" * 10_000,
        WHOLE.replace('"version": 1', '"version": 2'),
        WHOLE.replace("H200", "H100"),
        WHOLE + " " * (1 << 16),
        broken("gb_per_s", 0.0),
        broken("gb_per_s", float("nan")),
        broken("gb_per_s", float("inf")),
        broken("gb_per_s", "fast"),
        broken("threads", 0),
        broken("threads", True),
        broken("ntransfers", 1.5),
        broken("way", "teleport"),
        broken("direction", None),
        broken("way", []),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_ignored_and_replaced(cache_directory: str, text: str) -> None:
    """Another version's, a torn disk's, somebody's edit: as if there were none."""
    write_figures(PLACE, "tuned", [FIGURE])
    path = Path(cache_directory, "gpudcp", files_in(cache_directory)[0])
    path.write_text(WHOLE)
    assert read_figures(PLACE, "tuned") == (FIGURE,)
    path.write_text(text)
    assert read_figures(PLACE, "tuned") == ()
    write_figures(PLACE, "tuned", [FIGURE])
    assert read_figures(PLACE, "tuned") == (FIGURE,)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), at=st.integers(0, len(WHOLE)), cut=st.integers(0, 40))
def test_any_bytes_read_as_figures_or_as_none(cache_directory: str, data: bytes, at: int, cut: int) -> None:
    """Reading never raises."""
    write_figures(PLACE, "tuned", [])
    path = Path(cache_directory, "gpudcp", files_in(cache_directory)[0])
    whole = WHOLE.encode()
    path.write_bytes(whole[:at] + data + whole[at + cut :])
    assert all(isinstance(each, Figure) for each in read_figures(PLACE, "tuned"))


def test_a_mount_whose_name_is_no_utf8_is_a_place_like_any_other() -> None:
    """The kernel's names are bytes."""
    place = PLACE._replace(file_system="ext4 /dev/sda /data\udcff")
    assert write_figures(place, "tuned", [FIGURE])
    assert read_figures(place, "tuned") == (FIGURE,)


# --- learning --------------------------------------------------------------------------------------------------------


def test_transfers_of_a_way_become_one_figure_that_older_ones_fade_from(tmp_path: Path) -> None:
    """The plain mean at first; later each new one counts an eighth, so that a changed disk is noticed."""
    for speed in (1.0, 2.0, 3.0):
        record(tmp_path, gb_per_s=speed)
    (figure,) = learned(tmp_path)
    assert figure.gb_per_s == pytest.approx(2.0)
    assert (figure.ntransfers, figure.threads, figure.request_nbytes) == (3, 2, 4 << 20)
    for _ in range(60):
        record(tmp_path, gb_per_s=10.0, threads=7)
    (figure,) = learned(tmp_path)
    assert (figure.ntransfers, figure.threads) == (8, 7)
    assert 6.0 < figure.gb_per_s <= 10.0


def test_ways_and_directions_are_learned_apart(tmp_path: Path) -> None:
    """One file for all of a place."""
    record(tmp_path, gb_per_s=1.0)
    record(tmp_path, gb_per_s=2.0, way="buffered")
    record(tmp_path, gb_per_s=3.0, direction="read", way="buffered")
    found = {(each.direction, each.way): each.gb_per_s for each in learned(tmp_path)}
    assert found == {
        ("write", "direct"): pytest.approx(1.0),
        ("write", "buffered"): pytest.approx(2.0),
        ("read", "buffered"): pytest.approx(3.0),
    }


@pytest.mark.parametrize(("nbytes", "seconds"), [((64 << 20) - 1, 1.0), (LARGE, 0.0), (LARGE, -1.0), (0, 1.0)])
def test_small_and_timeless_transfers_teach_nothing(
    tmp_path: Path, cache_directory: str, nbytes: int, seconds: float
) -> None:
    """A small one tells of its fixed costs."""
    record_transfer(
        str(tmp_path),
        "cpu",
        direction="write",
        way="direct",
        threads=1,
        request_nbytes=1,
        nbytes=nbytes,
        seconds=seconds,
    )
    assert files_in(cache_directory) == []


def test_when_there_is_nothing_left_to_learn_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that saves for months writes its cache a few times."""
    for _ in range(8):
        record(tmp_path)
    written: list[object] = []
    monkeypatch.setattr(figures, "write_figures", lambda *arguments: written.append(arguments))
    for _ in range(20):
        record(tmp_path, gb_per_s=1.2)
    assert written == []
    record(tmp_path, gb_per_s=9.0)
    assert len(written) == 1


def test_what_was_tuned_is_not_touched_by_learning(tmp_path: Path) -> None:
    """They are files of their own, so that neither can undo the other."""
    place = place_of(str(tmp_path), "cpu")
    write_figures(place, "tuned", [FIGURE])
    record(tmp_path)
    assert read_figures(place, "tuned") == (FIGURE,)
    assert len(learned(tmp_path)) == 1


_CHILD = """
import sys, types
package = types.ModuleType("gpudcp")
package.__path__ = [sys.argv[1]]
sys.modules["gpudcp"] = package
from gpudcp.files.figures import *
place = place_of(sys.argv[2], "cpu")
sys.stdin.readline()
for number in range(150):
    record_transfer(sys.argv[2], "cpu", direction="write", way="direct", threads=2, request_nbytes=1 << 20,
                    nbytes=1 << 30, seconds=0.1 + number % 7)
    assert len(read_figures(place, "learned")) == 1
"""


def test_several_processes_learn_at_once_and_every_reader_sees_a_whole_file(
    tmp_path: Path, cache_directory: str
) -> None:
    """Ranks of a node; a file is there from the first transfer on, and never in part."""
    package = str(Path(figures.__file__).parents[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, package, str(tmp_path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
    assert len(files_in(cache_directory)) == 1
    assert learned(tmp_path)[0].ntransfers == 8
