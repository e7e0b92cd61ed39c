"""What a verification found: values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProblemKind = Literal[
    "metadata",  # a metadata file cannot be read, or contradicts itself
    "index",  # an index is damaged, or is not what its metadata says
    "record",  # an item without a storage record, a record without an item, or one that makes no sense
    "cover",  # the chunks of a tensor overlap, leave it, or do not cover it
    "file",  # a data file is missing, or is no file
    "length",  # a file is too short for what it should hold, or longer than that
    "overlap",  # two items claim the same bytes
    "envelope",  # bytes around a payload are not what was written
    "checksum",  # a CRC-32 differs
    "archive",  # an item is no torch-save archive, or not of the tensor that the metadata describes
    "gap",  # bytes between two items are not zeros
    "read",  # the file system gave an error
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    kind: ProblemKind
    fqn: str | None = None
    """The tensor or object; None: no single one."""
    file: str | None = None
    """Relative to the checkpoint's directory."""
    byte_offset: int | None = None
    """The first byte of the file that is wrong or, of a checksum, that it is of."""
    expected: str
    found: str

    def __str__(self) -> str:
        place = "" if self.byte_offset is None else f" at byte {self.byte_offset}"
        where = [*([] if self.file is None else [f"{self.file}{place}"]), *([] if self.fqn is None else [self.fqn])]
        return printable(": ".join([self.kind, *where, f"expected {self.expected}; found {self.found}"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The answer of `verify`. GB is 10^9 bytes."""

    path: str
    problems: tuple[Problem, ...]
    """By file and byte; what belongs to no file comes first."""
    unverified: tuple[str, ...]
    """Items of which some bytes carry no checksum: nobody can tell whether they are right."""
    stale: tuple[str, ...]
    """Files that no load reads: indexes of other metadata, and data files of a save that is not committed, or that was
    replaced. The next save removes them."""
    nfiles: int
    nitems: int
    nbytes: int
    """Read of data files."""
    total_s: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.total_s / 1e9 if self.total_s > 0 else 0.0

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [
            f"{printable(self.path)}: {verdict}: {self.nitems} items in {self.nfiles} files, "
            f"{self.nbytes / 1e9:.3f} GB in {self.total_s:.3f} s ({self.gb_per_s:.2f} GB/s)",
            *(f"  {problem}" for problem in self.problems),
        ]
        if self.unverified:
            lines.append(f"  unverified, for want of checksums: {_some(self.unverified)}")
        if self.stale:
            lines.append(f"  stale, read by no load: {_some(self.stale)}")
        return "\n".join(lines)


_MOST_NAMED = 5


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_NAMED
    return printable(", ".join(names[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """The text as one line, with escapes for what is no character to look at.

    A checkpoint chooses the names in it: a line break would make lines of a report that nobody wrote, an escape
    sequence would change the ones above.
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)
