"""Which way of moving bytes to take on a file system: what was measured, what transfers taught, else a table by type.

Writes no file. `gpudcp.tune` measures on request; `figures.record_transfer` learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpudcp.errors import BackendUnavailableError, PlanError
from gpudcp.files.figures import Direction, Figure, Way, place_of, read_figures
from gpudcp.files.filesystems import file_system_type, opens_named_file_directly, supports_direct_io

# Direct writes skip a copy and the page cache. On these local file systems they win (ext4 in bench/results: 2.1 GB/s
# with fsync, buffered 0.5); on tmpfs there is nothing to skip, and on some parallel file systems they lose
# several-fold, so every type that is not named is written through the page cache.
_DIRECT_WRITE_TYPES = frozenset({"ext4", "xfs"})

# Best first. KvikIO's compat mode stands behind our own way of the same kind: it writes with O_DIRECT where it can,
# one copy and one write after the other, where a ring of pinned slabs overlaps them.
_DIRECT_FIRST: tuple[Way, ...] = ("gds", "direct", "compat", "buffered")
_BUFFERED_FIRST: tuple[Way, ...] = ("gds", "buffered", "direct", "compat")

# A learned figure counts when it is the mean of a few transfers, and a difference when it is more than their scatter.
_ENOUGH_TRANSFERS = 3
_CLEARLY_FASTER = 1.1
# Transfers do more than move bytes: they may be slower than what was measured with any way to the files.
_FAR_FASTER = 2.0
_TUNED = "gpudcp.tune measured"


class Choice(NamedTuple):
    """The way to take, how many threads and bytes a request, where they were measured, and why, for the report."""

    way: Way
    threads: int | None
    """Of the whole node: its ranks share them."""
    request_nbytes: int | None
    reason: str


class WriteChoice(NamedTuple):
    """Direct or buffered, and why, for the report; threads and bytes a request as in `Choice`."""

    is_direct: bool
    reason: str
    threads: int | None = None
    request_nbytes: int | None = None


def choose_write(directory: str, direct_io: str) -> WriteChoice:
    """How to write host memory to files in ``directory``; ``direct_io`` is ``auto``, ``on`` or ``off`` as in Options.

    Raises:
        BackendUnavailableError: ``on``, where the file system opens no file with O_DIRECT.
    """
    if direct_io == "off":
        return WriteChoice(False, "Options(direct_io='off')")
    kind = file_system_type(directory)
    if direct_io == "on":
        if not (supports_direct_io(directory) or opens_named_file_directly(directory)):
            raise BackendUnavailableError(
                f"{directory}: {kind} opens no file with O_DIRECT; use Options(direct_io='auto') or 'off'"
            )
        return WriteChoice(True, "Options(direct_io='on')")
    choice = choose_way(directory, direction="write", device="cpu", ways=("direct", "buffered"))
    if choice.way == "direct" and not supports_direct_io(directory):
        return WriteChoice(False, f"buffered writes: O_DIRECT refused, though this is {kind}")
    return WriteChoice(choice.way == "direct", choice.reason, choice.threads, choice.request_nbytes)


def choose_way(directory: str, *, direction: Direction, device: str, ways: Sequence[Way]) -> Choice:
    """Choose among ``ways``, those that work here, for memory of ``device``: "cpu", or a GPU's name.

    Raises:
        PlanError: there is none to choose from.
    """
    kind = file_system_type(directory)
    order = _DIRECT_FIRST if direction == "write" and kind in _DIRECT_WRITE_TYPES else _BUFFERED_FIRST
    candidates = [way for way in order if way in ways]
    if not candidates:
        raise PlanError(f"{directory}: no way to {direction} files among {tuple(ways)}")
    place = place_of(directory, device)
    learned = _by_way(read_figures(place, "learned"), direction, least_ntransfers=_ENOUGH_TRANSFERS)
    tuned = _by_way(read_figures(place, "tuned"), direction, least_ntransfers=1)
    best, reason = candidates[0], f"{candidates[0]} {direction}s on {kind}"
    for way in candidates[1:]:
        # What transfers taught goes before what was measured once; like is compared with like.
        known, how = (learned, "earlier transfers reached") if {best, way} <= learned.keys() else (tuned, _TUNED)
        if {best, way} <= known.keys() and known[way].gb_per_s > _CLEARLY_FASTER * known[best].gb_per_s:
            reason = (
                f"{way} {direction}s on {kind}: {how} {known[way].gb_per_s:.2f} GB/s, {best} {known[best].gb_per_s:.2f}"
            )
            best = way
    # Where transfers are far from what a way without any was measured at, that one gets some, too.
    untried = [tuned[way] for way in candidates if way in tuned and way not in learned]
    other = max(untried, key=lambda figure: figure.gb_per_s, default=None)
    if other is not None and best in learned and other.gb_per_s > _FAR_FASTER * learned[best].gb_per_s:
        reason = (
            f"{other.way} {direction}s on {kind}: {_TUNED} {other.gb_per_s:.2f} GB/s, "
            f"{best} reached {learned[best].gb_per_s:.2f} in earlier transfers"
        )
        best = other.way
    measured = tuned.get(best)
    if measured is None:
        return Choice(best, None, None, reason)
    return Choice(best, measured.threads, measured.request_nbytes, reason)


def _by_way(figures: Sequence[Figure], direction: Direction, *, least_ntransfers: int) -> dict[Way, Figure]:
    return {
        figure.way: figure
        for figure in figures
        if figure.direction == direction and figure.ntransfers >= least_ntransfers
    }
