"""`make gpu-report`: what it does about parts that fail, hang or find no time. Needs no GPU: the parts are its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import report
from bench.gpu.report import Part, all_parts, chosen, pack_up, run_all, summary

SLOW = """
import signal, sys, time
if sys.argv[1:]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
print('begun', flush=True)
try:
    time.sleep(60)
finally:
    print('cleaned up')
"""


def part(name: str, code: str, *arguments: str, share_s: float = 20.0, keeps: str | None = None) -> Part:
    """A part that runs some Python."""
    return Part(name=name, command=(sys.executable, "-c", code, *arguments), share_s=share_s, keeps=keeps)


def test_a_part_that_fails_or_hangs_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is said, and the next one runs. One that does not end when it is asked is ended."""
    monkeypatch.setattr(report, "_LEAST_S", 0.1)
    monkeypatch.setattr(report, "_GRACE_S", 1.0)
    parts = [
        part("slow", SLOW, share_s=1.0),
        part("hanging", SLOW, "deaf", share_s=1.9),
        part("good", "import sys; print('found'); print('a warning', file=sys.stderr)", keeps="found.txt"),
        part("bad", "raise SystemExit('broken')"),
        part("last", "print('still here')"),
    ]
    outcomes = run_all(parts, tmp_path, limit_s=63.9)
    results = [outcome.result.partition(" after ")[0] for outcome in outcomes]
    assert results == ["STOPPED", "STOPPED", "ok", "FAILED, exit code 1", "ok"]
    assert ["cleaned up" in outcome.log for outcome in outcomes[:2]] == [True, False]
    assert (tmp_path / "results" / "found.txt").read_text() == "found\n"
    text = summary(outcomes, tmp_path / "results")
    assert "broken" in text
    assert "begun" in text
    assert text.endswith(f"last | ok | {outcomes[-1].seconds:.1f} | still here\n")
    assert (tmp_path / "report.txt").read_text() == text  # written after each part: somebody may end all of it


def test_what_a_part_leaves_of_its_time_is_for_those_after_it(tmp_path: Path) -> None:
    """And nobody takes what is another's."""
    asked = "import sys, time; time.sleep(float(sys.argv[1]))"
    parts = [part("short", asked, "0", share_s=4), part("long", asked, "2", share_s=1), part("late", asked, "0")]
    assert [outcome.result for outcome in run_all(parts, tmp_path, limit_s=30)] == ["ok", "ok", "ok"]


def test_what_finds_no_time_is_said_not_to_have_run(tmp_path: Path) -> None:
    """A limit for everything together, for a machine that is there only so long."""
    (outcome,) = run_all([part("late", "print(1)")], tmp_path, limit_s=1.0)
    assert (outcome.result, outcome.is_good) == ("not run: no time left", False)


def test_targets_stand_beside_what_was_found(tmp_path: Path) -> None:
    """Of every suite's result, met or missed; then everything is two archives."""
    targets = [
        {"what": "pack", "found": 0.93, "relation": "at least", "target": 0.9, "unit": "x", "is_met": True},
        {"what": "CRC", "found": 1.2, "relation": "at least", "target": 2, "unit": " TB/s", "is_met": False},
    ]
    outcomes = run_all([part("one", "print(1)")], tmp_path, limit_s=60)
    (tmp_path / "results" / "2026-01-01-gpu-pack.json").write_text(json.dumps({"targets": targets}))
    text = summary(outcomes, tmp_path / "results")
    assert "pack | 0.93x | at least 0.9x | met" in text
    assert "CRC | 1.2 TB/s | at least 2 TB/s | MISSED" in text
    pack_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "report.txt", "results.tar.gz"]
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/one.txt" in archive.getnames()


def test_every_part_has_its_share_of_less_than_ten_minutes(tmp_path: Path) -> None:
    """So the last ones run too, and what matters most runs first."""
    parts = all_parts(tmp_path, commit="")
    assert sum(part.share_s for part in parts) == 570
    assert [part.name for part in parts].index("files") < [part.name for part in parts].index("memory")


def test_some_parts_are_run_alone(tmp_path: Path) -> None:
    """In their own order; a name that is none is refused, and the names are told."""
    parts = all_parts(tmp_path, commit="")
    assert chosen(parts, "") == parts
    assert [part.name for part in chosen(parts, "transfers, files")] == ["files", "transfers"]
    with pytest.raises(ValueError, match=r"no part is called benches; there are: machine, kernels, pack"):
        chosen(parts, "files,benches")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="compute-sanitizer is here")
def test_a_tool_that_is_not_there_is_not_said_to_have_found_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sanitizer's part without it, inside of a `make` of its own, as `make gpu-report` is one."""
    monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("MAKEFLAGS", "w")
    (part,) = (each for each in all_parts(tmp_path, commit="") if each.name == "sanitizer")
    (outcome,) = run_all([part], tmp_path, limit_s=30)
    assert (outcome.result, outcome.is_good) == ("skipped", True)
    assert "sanitizer | skipped | " in summary([outcome], tmp_path)


def test_what_tests_counted_is_shown_though_another_tool_has_the_last_word(tmp_path: Path) -> None:
    """As compute-sanitizer has."""
    lines = "==== 3 skipped in 1.20s ====\n========= ERROR SUMMARY: 0 errors"
    (outcome,) = run_all([part("memcheck", f"print({lines!r})")], tmp_path, limit_s=30)
    assert outcome.last_line == "3 skipped in 1.20s"


def test_an_interrupt_ends_the_tests_though_somebody_makes_an_error_of_it(tmp_path: Path) -> None:
    """As stock DCP does: the next test does not begin, and what was set up is torn down."""
    (tmp_path / "test_it.py").write_text(
        """
import os, signal

class CheckpointException(BaseException):
    pass

def test_first():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt as err:
        raise CheckpointException from err

def test_second():
    print("went on")
"""
    )
    command = (sys.executable, "-m", "pytest", "-p", "bench.gpu.interrupts", "-s", "-c", os.devnull, str(tmp_path))
    (outcome,) = run_all([Part(name="tests", command=command, share_s=20)], tmp_path / "out", limit_s=30)
    assert "went on" not in outcome.log
    assert "interrupted" in outcome.log
    assert outcome.last_line.startswith("1 failed in")


def test_every_gpu_test_and_bench_is_part_of_the_report(tmp_path: Path) -> None:
    """A new file is not forgotten; all files that are named exist."""
    root = Path(__file__).parents[1]
    named = {word for each in all_parts(tmp_path, commit="") for word in each.command if word.endswith(".py")}
    assert all((root / name).exists() for name in named)
    written = [*root.glob("tests/gpu/test_gpu_*.py"), *root.glob("bench/gpu/bench_gpu_*.py")]
    missing = {str(path.relative_to(root)) for path in written} - named
    assert missing == {"tests/gpu/test_gpu_sanitized.py"}  # `make sanitize-gpu` runs it
