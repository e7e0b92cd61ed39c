"""How files are written on which file system, and what is said about it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.errors import BackendUnavailableError, PlanError
from gpudcp.files import tune
from gpudcp.files.figures import Direction, Figure, Origin, Way, place_of, write_figures
from gpudcp.files.filesystems import file_system_type, supports_direct_io
from gpudcp.files.tune import WriteChoice, choose_way, choose_write


def refuse_open(monkeypatch: pytest.MonkeyPatch, refused: dict[int, int]) -> None:
    """Opening with one of these flags fails with its error, as on file systems that lack it."""
    real = os.open

    def call(path: str, flags: int, mode: int = 0o777) -> int:
        for flag, number in refused.items():
            if flags & flag == flag:
                if flag == os.O_DIRECT and flags & os.O_CREAT and flags & os.O_TMPFILE != os.O_TMPFILE:
                    # As Linux does it: the name is made before the flag is refused.
                    os.close(real(path, flags & ~os.O_DIRECT, mode))
                raise OSError(number, os.strerror(number), path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", call)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_auto_writes_directly_on_local_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where direct writes were measured to win."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: kind)
    monkeypatch.setattr(tune, "supports_direct_io", lambda _: True)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(True, f"direct writes on {kind}")
    monkeypatch.setattr(tune, "supports_direct_io", lambda _: False)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(
        False, f"buffered writes: O_DIRECT refused, though this is {kind}"
    )


@pytest.mark.parametrize("kind", ["tmpfs", "lustre", "nfs4", "overlay", "unknown"])
def test_auto_writes_buffered_everywhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Some of them open files with O_DIRECT, and are several times slower then."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: kind)
    assert choose_write(str(tmp_path), "auto") == WriteChoice(False, f"buffered writes on {kind}")


def test_off_is_buffered_anywhere(tmp_path: Path) -> None:
    """The user's word needs no other reason."""
    assert choose_write(str(tmp_path), "off") == WriteChoice(False, "Options(direct_io='off')")


def test_on_is_direct_where_that_is_possible(tmp_path: Path) -> None:
    """Also on file systems that auto would write buffered."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    assert choose_write(str(tmp_path), "on") == WriteChoice(True, "Options(direct_io='on')")


def test_on_is_refused_where_no_file_opens_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it is no fallback's turn: the message has the remedy, and nothing is left behind."""
    refuse_open(monkeypatch, {os.O_DIRECT: errno.EINVAL})
    with pytest.raises(BackendUnavailableError) as caught:
        choose_write(str(tmp_path), "on")
    assert str(caught.value).startswith(f"{tmp_path}: {file_system_type(str(tmp_path))} opens no file with O_DIRECT")
    assert str(caught.value).endswith("use Options(direct_io='auto') or 'off'")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_on_is_direct_where_only_unnamed_files_are_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """NFS and Lustre know O_DIRECT, and no O_TMPFILE."""
    if not supports_direct_io(str(tmp_path)):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    refuse_open(monkeypatch, {os.O_TMPFILE: number})
    assert choose_write(str(tmp_path), "on") == WriteChoice(True, "Options(direct_io='on')")
    assert os.listdir(tmp_path) == []


def test_on_is_refused_where_neither_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the kernel makes before it refuses the flag is removed."""
    refuse_open(monkeypatch, {os.O_TMPFILE: errno.EOPNOTSUPP, os.O_DIRECT: errno.EINVAL})
    with pytest.raises(BackendUnavailableError):
        choose_write(str(tmp_path), "on")
    assert os.listdir(tmp_path) == []


# --- by figures ------------------------------------------------------------------------------------------------------

ALL_WAYS = get_args(Way)
BOTH: tuple[Way, Way] = ("direct", "buffered")


def remember(directory: Path, origin: Origin, speeds: dict[Way, float], *, ntransfers: int = 8) -> None:
    """Writes of host memory went this fast."""
    figures = [
        Figure(
            direction="write",
            way=way,
            threads=2,
            request_nbytes=1 << 20,
            gb_per_s=speed,
            ntransfers=ntransfers,
        )
        for way, speed in speeds.items()
    ]
    assert write_figures(place_of(str(directory), "cpu"), origin, figures)


@pytest.fixture(params=["ext4", "lustre"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test's directory says that it is on such a file system, and opens files directly."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: request.param)
    monkeypatch.setattr(tune, "supports_direct_io", lambda _: True)
    return str(request.param)


def test_without_figures_the_table_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUDirect Storage first; after it what the type of the file system is known for."""
    monkeypatch.setattr(tune, "file_system_type", lambda _: "ext4")
    for ways, best in ((ALL_WAYS, "gds"), (ALL_WAYS[1:], "direct"), (("compat", "buffered"), "compat")):
        choice = choose_way(str(tmp_path), direction="write", device="cpu", ways=ways)
        assert choice == (best, None, None, f"{best} writes on ext4")
    monkeypatch.setattr(tune, "file_system_type", lambda _: "lustre")
    assert choose_way(str(tmp_path), direction="write", device="cpu", ways=ALL_WAYS[1:]).way == "buffered"
    assert choose_way(str(tmp_path), direction="read", device="cpu", ways=ALL_WAYS[1:]).way == "buffered"
    with pytest.raises(PlanError, match="no way to read"):
        choose_way(str(tmp_path), direction="read", device="cpu", ways=())


def test_what_was_measured_overrules_the_table(tmp_path: Path, kind: str) -> None:
    """With the threads and the request size of the measurement, and both figures in the reason."""
    remember(tmp_path, "tuned", {"direct": 4.0, "buffered": 2.0}, ntransfers=1)
    assert choose_write(str(tmp_path), "auto").is_direct
    choice = choose_way(str(tmp_path), direction="write", device="cpu", ways=("direct", "buffered"))
    assert choice[:3] == ("direct", 2, 1 << 20)
    remember(tmp_path, "tuned", {"direct": 2.0, "buffered": 4.0}, ntransfers=1)
    assert not choose_write(str(tmp_path), "auto").is_direct
    if kind == "ext4":
        assert choose_write(str(tmp_path), "auto").reason == (
            "buffered writes on ext4: gpudcp.tune measured 4.00 GB/s, direct 2.00"
        )


@pytest.mark.usefixtures("kind")
def test_what_transfers_taught_goes_before_what_was_measured(tmp_path: Path) -> None:
    """Where both ways were taken often enough; one that was not is no evidence."""
    remember(tmp_path, "tuned", {"direct": 4.0, "buffered": 2.0}, ntransfers=1)
    remember(tmp_path, "learned", {"direct": 1.0, "buffered": 2.0}, ntransfers=2)
    assert choose_write(str(tmp_path), "auto").is_direct
    remember(tmp_path, "learned", {"buffered": 9.0})
    assert choose_write(str(tmp_path), "auto").is_direct
    remember(tmp_path, "learned", {"direct": 1.0, "buffered": 2.0}, ntransfers=3)
    assert not choose_write(str(tmp_path), "auto").is_direct


@pytest.mark.usefixtures("kind")
def test_transfers_far_from_what_another_way_was_measured_at_give_it_its_turn(tmp_path: Path) -> None:
    """Then both are known by their transfers, and the better one stays."""
    remember(tmp_path, "tuned", {"direct": 4.0, "buffered": 2.0}, ntransfers=1)
    remember(tmp_path, "learned", {"direct": 1.5})
    assert choose_write(str(tmp_path), "auto").is_direct, "transfers do more than move bytes"
    remember(tmp_path, "learned", {"direct": 0.1})
    assert not choose_write(str(tmp_path), "auto").is_direct
    remember(tmp_path, "learned", {"direct": 0.1, "buffered": 0.05})
    assert choose_write(str(tmp_path), "auto").is_direct


def test_a_difference_within_the_scatter_changes_nothing(tmp_path: Path, kind: str) -> None:
    """Else the choice would swing to and fro with the noise."""
    expected = kind == "ext4"
    for speeds in ({"direct": 1.0, "buffered": 1.05}, {"direct": 1.05, "buffered": 1.0}):
        remember(tmp_path, "learned", speeds)  # type: ignore[arg-type]
        assert choose_write(str(tmp_path), "auto").is_direct is expected


@pytest.mark.usefixtures("kind")
def test_figures_of_another_device_or_direction_say_nothing(tmp_path: Path) -> None:
    """A GPU's way into a file is not the host's."""
    before = choose_write(str(tmp_path), "auto")
    places: list[tuple[Direction, str]] = [("write", "NVIDIA H200"), ("read", "cpu")]
    for direction, device in places:
        for direct, buffered in ((1.0, 9.0), (9.0, 1.0)):
            figures = [
                Figure(direction=direction, way=way, threads=1, request_nbytes=4096, gb_per_s=speed, ntransfers=8)
                for way, speed in zip(BOTH, (direct, buffered), strict=True)
            ]
            assert write_figures(place_of(str(tmp_path), device), "tuned", figures)
            assert choose_write(str(tmp_path), "auto") == before


def test_what_the_user_asks_for_needs_no_figures(tmp_path: Path, kind: str) -> None:
    """On and off are words, not guesses."""
    remember(tmp_path, "tuned", {"direct": 9.0, "buffered": 1.0}, ntransfers=1)
    assert not choose_write(str(tmp_path), "off").is_direct
    remember(tmp_path, "tuned", {"direct": 1.0, "buffered": 9.0}, ntransfers=1)
    assert choose_write(str(tmp_path), "on").is_direct, kind


def test_a_choice_leaves_no_file(tmp_path: Path, kind: str) -> None:
    """Neither in the directory nor among the figures: choosing measures nothing."""
    (tmp_path / "checkpoint").mkdir()
    for direct_io in ("auto", "on", "off"):
        choose_write(str(tmp_path / "checkpoint"), direct_io)
    assert os.listdir(tmp_path / "checkpoint") == [], kind
    assert os.listdir(os.environ["XDG_CACHE_HOME"]) == []


speeds = st.dictionaries(st.sampled_from(ALL_WAYS), st.floats(0.01, 100))


@settings(deadline=None, max_examples=60)
@given(tuned=speeds, learned=speeds, ways=st.sets(st.sampled_from(ALL_WAYS), min_size=1), direction=...)
def test_the_way_that_is_chosen_is_one_of_those_offered(
    tuned: dict[Way, float], learned: dict[Way, float], ways: set[Way], direction: Direction
) -> None:
    """Whatever is remembered; and where all offered ways were measured alike, none is clearly faster."""
    directory = os.environ["XDG_CACHE_HOME"]
    remember(Path(directory), "tuned", tuned, ntransfers=1)
    remember(Path(directory), "learned", learned)
    choice = choose_way(directory, direction=direction, device="cpu", ways=sorted(ways))
    assert choice.way in ways
    if direction == "write" and ways <= learned.keys():
        assert max(learned[way] for way in ways) <= 1.1**3 * learned[choice.way]
