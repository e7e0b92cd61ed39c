"""`gpudcp.tune`: measure the ways of moving bytes to and from a directory, on request, and remember what came of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from gpudcp.errors import PlanError, TransferError
from gpudcp.executors.devicememory import allocate
from gpudcp.files.figures import LEAST_NBYTES, Direction, Figure, Place, Way, place_of, write_figures
from gpudcp.files.measure import REQUESTS_NBYTES, THREADS, measure
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.ranks import Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """What `tune` measured, every setting of it. GB is 10^9 bytes."""

    path: str
    place: Place
    """The file system and the device that the figures hold for."""
    figures: tuple[Figure, ...]
    not_measured: Mapping[Way, str]
    """The ways that do not work here, and why."""
    is_remembered: bool
    """False where the user has no cache directory that can be written to, and after too few bytes."""

    def best(self, direction: Direction) -> tuple[Figure, ...]:
        """The fastest setting of each way, the fastest way first."""
        best: dict[Way, Figure] = {}
        for figure in self.figures:
            if figure.direction == direction and (
                figure.way not in best or figure.gb_per_s > best[figure.way].gb_per_s
            ):
                best[figure.way] = figure
        return tuple(sorted(best.values(), key=lambda figure: -figure.gb_per_s))

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.place.file_system}, {self.place.device}"]
        for direction in ("write", "read"):
            lines += [
                f"{direction:5} {figure.way:8} {figure.gb_per_s:7.2f} GB/s  "
                f"{figure.threads} threads, {figure.request_nbytes >> 10} KiB a request"
                for figure in self.best(direction)
            ]
        lines += [f"no    {way:8} {why}" for way, why in self.not_measured.items()]
        return "\n".join(lines)


def tune(
    path: str | os.PathLike[str],
    *,
    nbytes: int = 256 << 20,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> TuneReport:
    """Measure how fast files in ``path`` are written and read: GDS, KvikIO's compat mode, O_DIRECT, the page cache.

    The best settings are remembered in the user's cache directory for the file system and the device, and ``auto`` uses
    them from then on. Writes and reads ``nbytes`` some twenty times, in files that are removed; memory is that of the
    current GPU, or the host's where there is none. Where torch.distributed is initialised every rank calls it, one rank
    of each node measures, and all get their node's report.

    Figures of fewer than 64 MiB are reported and not remembered: they say more about fixed costs than about files.

    Raises:
        PlanError: ``nbytes`` is less than a block of 4096.
        TransferError: ``path`` is no directory, there is no room, or a transfer failed; on every rank.
    """
    if nbytes < SLAB_ALIGNMENT_NBYTES:
        raise PlanError(f"tune(nbytes={nbytes}): must be at least {SLAB_ALIGNMENT_NBYTES}")
    directory = os.fspath(path)
    ranks = Ranks(process_group, no_dist=no_dist or not (dist.is_available() and dist.is_initialized()))
    nodes = ranks.reduce_broadcast("tune", platform.node, list)
    leader = nodes.index(platform.node())
    reports = ranks.reduce_broadcast(
        "tune", lambda: _measured(directory, nbytes) if ranks.rank == leader else None, _by_rank
    )
    return reports[leader]


def _by_rank(reports: list[TuneReport | None]) -> dict[int, TuneReport]:
    return {rank: report for rank, report in enumerate(reports) if report is not None}


def _measured(directory: str, nbytes: int) -> TuneReport:
    if not os.path.isdir(directory):
        why = "is no directory" if os.path.lexists(directory) else "No such file or directory"
        raise TransferError(f"{directory}: {why}; give one that exists and that checkpoints go to", path=directory)
    device, name = torch.device("cpu"), "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
    requests_nbytes = [each for each in REQUESTS_NBYTES if each <= nbytes] or [nbytes - nbytes % SLAB_ALIGNMENT_NBYTES]
    found = measure(
        directory, device, nbytes=nbytes, threads=THREADS, requests_nbytes=requests_nbytes, allocate=allocate
    )
    place = place_of(directory, name)
    report = TuneReport(
        path=directory, place=place, figures=found.figures, not_measured=found.not_measured, is_remembered=False
    )
    if nbytes < LEAST_NBYTES:
        return report
    kept = (*report.best("write"), *report.best("read"))
    return replace(report, is_remembered=write_figures(place, "tuned", kept))
