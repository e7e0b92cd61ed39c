"""Reports and their stopwatch, on a clock that a test moves."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import MappingProxyType

import pytest

from gpudcp import report
from gpudcp.report import Stopwatch, TransferReport


class FakeClock:
    """Stands in for the module time; shows what it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of the module under test alone."""
    fake = FakeClock()
    monkeypatch.setattr(report, "time", fake)
    return fake


def make_report(total_s: float = 2.0) -> TransferReport:
    return TransferReport(
        direction="save",
        path="some/where",
        nitems=3,
        payload_nbytes=5 * 10**9,
        file_nbytes=5 * 10**9 + 4096,
        total_s=total_s,
        phases_s=MappingProxyType({"pack": 0.5, "write": 1.25}),
        executor="cpu",
        files="posix direct",
        checksum="isal",
        reasons=("no GPU", "ext4 on a local disk"),
    )


def test_the_rate_is_payload_bytes_over_seconds_in_units_of_ten_to_the_ninth() -> None:
    """Framing does not count; a transfer of no measurable time has the rate 0, not infinity."""
    assert make_report().gb_per_s == 2.5
    assert make_report(0.0).gb_per_s == 0.0


def test_a_report_reads_as_one_line_with_everything_in_it() -> None:
    """What was moved, how fast, by what, and why."""
    assert str(make_report()) == (
        "save some/where: 3 items, 5.000 GB in 2.000 s (2.50 GB/s; pack 0.500, write 1.250); "
        "executor cpu, files posix direct, checksum isal (no GPU; ext4 on a local disk)"
    )


def test_a_report_is_a_value() -> None:
    """Unchangeable, its phases too; equal, also after pickling, which is how ranks and child processes send it."""
    original = make_report()
    for again in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original), dataclasses.replace(original)):
        assert again == original
        assert str(again) == str(original)
        with pytest.raises(TypeError):
            again.phases_s["pack"] = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        original.nitems = 4  # type: ignore[misc]


def test_seconds_of_a_phase_add_up(clock: FakeClock) -> None:
    """Over all its blocks; what lies between them counts for the total alone."""
    stopwatch = Stopwatch()
    for seconds in (0.5, 0.25):
        with stopwatch.phase("write"):
            clock.now += seconds
        clock.now += 4
    assert stopwatch.seconds == {"write": 0.75}
    assert stopwatch.total_s() == 8.75


def test_a_phase_inside_a_phase_counts_once_for_the_inner_one(clock: FakeClock) -> None:
    """So that phases never add up to more than the total; also three deep, also by the same name."""
    stopwatch = Stopwatch()
    with stopwatch.phase("outer"):
        clock.now += 1
        with stopwatch.phase("inner"):
            clock.now += 2
            with stopwatch.phase("innermost"):
                clock.now += 4
            clock.now += 8
        with stopwatch.phase("outer"):
            clock.now += 16
        clock.now += 32
    assert stopwatch.seconds == {"outer": 49, "inner": 10, "innermost": 4}
    assert sum(stopwatch.seconds.values()) == stopwatch.total_s() == 63


def test_a_phase_that_raises_is_counted_and_closed(clock: FakeClock) -> None:
    """The next phase is not taken for one inside it."""
    stopwatch = Stopwatch()

    def fail_in_a_phase() -> None:
        with stopwatch.phase("pack"):
            clock.now += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_a_phase()
    with stopwatch.phase("write"):
        clock.now += 2
    assert stopwatch.seconds == {"pack": 1, "write": 2}
