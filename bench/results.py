"""What a suite found: tables and targets, printed, and written as JSON and Markdown. Measures nothing."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import gpudcp
from bench.measure import Timings
from gpudcp.files.tune import file_system_type

Cell = str | float | int | None
_VERSIONS_OF = ("torch", "numpy", "isal", "safetensors", "pytest-benchmark")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Figures side by side. ``seconds``: of every turn, where the figures are medians of such."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that was promised, beside the one that was found."""

    what: str
    found: float
    relation: Literal["at least", "at most"]
    target: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.found >= self.target if self.relation == "at least" else self.found <= self.target

    @property
    def ratio_to_target(self) -> float:
        return self.found / self.target


@dataclass(slots=True)
class Suite:
    """One bench module's tables, targets and notes, in the order in which they were found."""

    name: str
    is_full: bool = True
    """Whether the sizes are those that the targets are for; if not, nothing is called met or missed."""
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_timings(self, title: str, timings: Timings, *, nbytes: int) -> None:
        """A table of seconds and GB/s (10^9 bytes). ``nbytes`` are those of the tensors, whatever a file has more."""
        first = next(iter(timings))
        self.tables.append(
            Table(
                title=title,
                columns=("", "median s", "min s", "max s", "GB/s", f"{first} is"),
                rows=tuple(
                    (
                        name,
                        timing.median_s,
                        timing.min_s,
                        timing.max_s,
                        nbytes / timing.median_s / 1e9,
                        "" if name == first else f"{timing.median_s / timings[first].median_s:.2f}x as fast",
                    )
                    for name, timing in timings.items()
                ),
                seconds={name: timing.seconds for name, timing in timings.items()},
            )
        )

    def expect_speed(self, what: str, timings: Timings, subject: str, beside: Sequence[str], at_least: float) -> None:
        """``subject`` should be ``at_least`` so many times as fast as the fastest of those named in ``beside``."""
        fastest = min((name for name in beside if name in timings), key=lambda name: timings[name].median_s)
        speed = timings[fastest].median_s / timings[subject].median_s
        self.expect(f"{what}: {subject} beside {fastest}", speed, "at least", at_least, "x")

    def expect(
        self, what: str, found: float, relation: Literal["at least", "at most"], target: float, unit: str
    ) -> None:
        """Write a target down, met or not: nothing is asserted."""
        self.targets.append(Target(what=what, found=found, relation=relation, target=target, unit=unit))

    def as_text(self) -> str:
        """For the terminal."""
        tables = "\n\n".join(_text_table(table) for table in self._all_tables())
        return "\n".join([tables, *self.notes, self._verdict()])

    def as_markdown(self, environment: dict[str, str]) -> str:
        """The page in ``bench/results``."""
        parts = [f"# {self.name}", _markdown_table(("", ""), [*environment.items()])]
        parts += [f"## {table.title}\n\n" + _markdown_table(table.columns, table.rows) for table in self._all_tables()]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        parts += [self._verdict()]
        return "\n\n".join(parts) + "\n"

    def as_json(self, environment: dict[str, str]) -> str:
        """Everything, the seconds of every turn too."""
        targets = [
            {**asdict(target), "ratio_to_target": target.ratio_to_target, "is_met": target.is_met}
            for target in self.targets
        ]
        tables = [asdict(table) for table in self.tables]
        found = {"environment": environment, "tables": tables, "targets": targets, "notes": self.notes}
        return json.dumps({"name": self.name, **found}, indent=1) + "\n"

    def write(self, directory: Path, environment: dict[str, str]) -> list[Path]:
        """``<date>-<name>.json`` and ``.md`` in ``directory``; those of the same day are replaced, each at once."""
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"{environment['date'][:10]}-{self.name}"
        paths = [directory / f"{stem}.json", directory / f"{stem}.md"]
        for path, content in zip(paths, (self.as_json(environment), self.as_markdown(environment)), strict=True):
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(content, encoding="utf-8")
            unfinished.replace(path)
        return paths

    def _verdict(self) -> str:
        if not self.is_full:
            return "Sizes are small: the targets are not for them."
        missed = [target.what for target in self.targets if not target.is_met]
        return "\n".join([f"Targets missed: {len(missed)} of {len(self.targets)}", *(f"- {what}" for what in missed)])

    def _all_tables(self) -> list[Table]:
        rows = tuple(
            (
                target.what,
                f"{_cell(target.found)}{target.unit}",
                f"{target.relation} {target.target:g}{target.unit}",
                target.ratio_to_target,
                ("met" if target.is_met else "MISSED") if self.is_full else "",
            )
            for target in self.targets
        )
        columns = (self.name, "found", "target", "found / target", "")
        return [*self.tables, Table(title=f"{self.name}: targets", columns=columns, rows=rows)]


def describe_environment(*, command: str, size: str, directories: dict[str, str], commit: str = "") -> dict[str, str]:
    """The machine, the versions and the command, for the reader of a result. Paths are left out: only their kind.

    ``commit`` is what a tree without git is of.
    """
    versions = {name: _version_of(name) for name in _VERSIONS_OF}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "size": size,
        "CPU": f"{_first_value('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "file systems": ", ".join(f"{name}: {file_system_type(path)}" for name, path in directories.items()),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "Python": platform.python_version(),
        "gpudcp": f"{gpudcp.__version__} ({_commit() if not commit else f'commit {commit}'})",
        **versions,
    }


def in_words(nbytes: int) -> str:
    """MiB up to 1 GiB, then GiB."""
    return f"{nbytes / 2**20:.4g} MiB" if nbytes < 1 << 30 else f"{nbytes / 2**30:.3g} GiB"


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_value(path: str, key: str) -> str:
    with open(path, encoding="utf-8") as file:
        values = [line.partition(":")[2].strip() for line in file if line.startswith(key)]
    return values[0] if values else platform.processor() or "unknown"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", os.path.dirname(__file__), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # What results and notes say does not change what was measured.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../gpudcp", "../kernels", "../bench/*.py")
        return f"commit {git('rev-parse', '--short', 'HEAD')}{', with changes' if changed else ''}"
    except (OSError, subprocess.CalledProcessError):
        return "no git commit"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def _text_table(table: Table) -> str:
    return _laid_out(table.columns, table.rows, lambda cells: "  ".join(cells).rstrip(), title=f"{table.title}\n")


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    rule = tuple("---" if number == 0 else "---:" for number in range(len(columns)))
    return _laid_out(columns, [rule, *rows], lambda cells: "| " + " | ".join(cells) + " |", title="")


def _laid_out(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], line: Callable[[Sequence[str]], str], *, title: str
) -> str:
    lines = [tuple(columns), *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return title + "\n".join(
        line([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in lines
    )
