"""`make gpu-report`: what it does about parts that fail, hang or find no time. Needs no GPU: the parts are its own."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

from bench.gpu.report import Part, all_parts, pack_up, run_all, summary


def part(name: str, code: str, *, limit_s: float = 20.0, keeps: str | None = None) -> Part:
    """A part that runs a line of Python."""
    return Part(name=name, command=(sys.executable, "-c", code), limit_s=limit_s, keeps=keeps)


def test_a_part_that_fails_or_hangs_takes_no_other_with_it(tmp_path: Path) -> None:
    """Its end is said, and the next one runs."""
    parts = [
        part("good", "import sys; print('found'); print('a warning', file=sys.stderr)", keeps="found.txt"),
        part("bad", "raise SystemExit('broken')"),
        part("slow", "import time; print('begun', flush=True); time.sleep(60)", limit_s=0.5),
        part("last", "print('still here')"),
    ]
    outcomes = run_all(parts, tmp_path, limit_s=60)
    results = [outcome.result for outcome in outcomes]
    assert results == ["ok", "FAILED, exit code 1", "STOPPED after 0 s", "ok"]
    assert (tmp_path / "results" / "found.txt").read_text() == "found\n"
    text = summary(outcomes, tmp_path / "results")
    assert "broken" in text
    assert "begun" in text
    assert text.endswith(f"last | ok | {outcomes[-1].seconds:.1f} | still here\n")


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "results.tar.gz"]
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/one.txt" in archive.getnames()


def test_every_gpu_test_and_bench_is_part_of_the_report(tmp_path: Path) -> None:
    """A new file is not forgotten; all files that are named exist."""
    root = Path(__file__).parents[1]
    named = {word for each in all_parts(tmp_path, commit="") for word in each.command if word.endswith(".py")}
    assert all((root / name).exists() for name in named)
    written = [*root.glob("tests/gpu/test_gpu_*.py"), *root.glob("bench/gpu/bench_gpu_*.py")]
    missing = {str(path.relative_to(root)) for path in written} - named
    assert missing == {"tests/gpu/test_gpu_sanitized.py"}  # `make sanitize-gpu` runs it
