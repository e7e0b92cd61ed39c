"""Run in a process of its own: overwrite a checkpoint in forked ranks, one of which is sent SIGKILL at some instant.

Usage: sigkilled_saves.py DIRECTORY NRANKS INSTANTS_A_PHASE. An instant is the n-th call or return, of Python or C, that
the main thread makes in one phase of the save; instants are spread evenly over each phase. Prints JSON: what was left,
by phase, and what was wrong.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import storage_cases
import torch
import torch.distributed as dist

import gpudcp
from gpudcp import api
from gpudcp.files import commit
from gpudcp.files.posix import PosixWriter
from gpudcp.storage import committing
from gpudcp.storage import writer as writer_module
from gpudcp.storage.writer import GpuStorageWriter

PHASES = ("plan", "write", "fsync", "rename", "clean-up")
GROUP_TIMEOUT = datetime.timedelta(minutes=10)
SURVIVED, HEARD = 3, 4


class Clock:
    """Counts what the main thread calls in each phase of a save, and kills the process at one count of one phase."""

    def __init__(self, phase: str, count: int) -> None:
        self.counts = dict.fromkeys(("", *PHASES, "end"), 0)
        self._now, self._phase, self._count = "", phase, count
        self._around(api, "run_save", "plan", "end")
        self._around(GpuStorageWriter, "write_data", "write", "end")
        self._around(PosixWriter, "finish", "fsync", "write")
        self._around(writer_module, "fsync_directory", "fsync", "write")
        self._around(committing, "_replace_metadata", "write", "end")
        self._around(commit, "_put_in_place", "rename", "end")
        self._around(committing, "_clean_up", "clean-up", "end")
        sys.setprofile(self._tick)

    def _around(self, owner: Any, name: str, phase: str, after: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(real)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._now = phase
            try:
                return real(*arguments, **keywords)
            finally:
                self._now = after

        setattr(owner, name, timed)

    def _tick(self, *_: Any) -> None:
        self.counts[self._now] += 1
        if self._now == self._phase and self.counts[self._now] == self._count:
            os.kill(os.getpid(), signal.SIGKILL)


def rank_main(directory: Path, rank: int, nranks: int, phase: str, count: int, report: int | None) -> int:
    """One rank's overwrite; its exit code."""
    if nranks > 1:
        store = dist.FileStore(str(directory.with_name("store")), nranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=nranks, timeout=GROUP_TIMEOUT)
        try:
            dist.barrier()  # nobody dies before all are connected: the others would still wait for that
        except RuntimeError:
            return HEARD  # the victim was killed as soon as it had left the barrier
    clock = Clock(phase, count)
    try:
        gpudcp.save(storage_cases.state_of(2.0), directory, options=gpudcp.Options(slab_nbytes=65536))
    except gpudcp.errors.GpuDcpError:
        return HEARD
    finally:
        sys.setprofile(None)
    if report is not None:
        os.write(report, json.dumps(clock.counts).encode())
    return SURVIVED


def overwrite(
    directory: Path, nranks: int, victim: int, phase: str, count: int, report: int | None
) -> tuple[list[int], float]:
    """Save on all ranks, of which ``victim`` dies; exit codes, and the seconds until the last rank has ended."""
    directory.with_name("store").unlink(missing_ok=True)
    children = []
    for rank in range(nranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                own = (phase, count) if rank == victim else ("", 0)
                code = rank_main(directory, rank, nranks, *own, report if rank == victim else None)
            finally:
                os._exit(code)
        children.append(pid)
    started = time.monotonic()
    codes: list[int | None] = [None] * nranks
    while None in codes:
        for rank, pid in enumerate(children):
            if codes[rank] is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() - started > 60:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [code for code in codes if code is not None], time.monotonic() - started


def counted(directory: Path, nranks: int, victim: int) -> dict[str, int]:
    """How many instants each phase has on one rank."""
    reading, writing = os.pipe()
    overwrite(directory, nranks, victim, "", 0, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        counts: dict[str, int] = json.loads(pipe.read())
    return counts


def main(directory: Path, nranks: int, instants: int) -> dict[str, Any]:
    """All instants of all phases in turn."""
    torch.set_num_threads(1)
    old, new = storage_cases.state_of(1.0), storage_cases.state_of(2.0)
    original, victim_directory = directory / "original", directory / "victim"
    gpudcp.save(old, original)
    shutil.copytree(original, victim_directory)
    # What Python caches at first use, children inherit: from here on they all count alike.
    for state in (new, old):
        gpudcp.save(state, victim_directory)
        storage_cases.load(victim_directory)
    counts = [counted(victim_directory, nranks, rank) for rank in range(nranks)]
    left: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    slowest_s = 0.0
    for phase in PHASES:
        left[phase] = {"killed": 0, "old": 0, "new": 0}
        for number in range(instants):
            # Only the coordinator renames and cleans up.
            victim = 0 if phase in ("rename", "clean-up") else number % nranks
            # Not up to the very last one: ranks that wait for each other do not count the same every time.
            count = 1 + int(0.9 * number * counts[victim][phase] / instants)
            shutil.rmtree(victim_directory)
            shutil.copytree(original, victim_directory)
            codes, seconds = overwrite(victim_directory, nranks, victim, phase, count, None)
            slowest_s = max(slowest_s, seconds)
            where = f"{phase}, instant {count} of {counts[victim][phase]} on rank {victim}: exit codes {codes}"
            left[phase]["killed"] += codes[victim] == -signal.SIGKILL
            if any(code not in (SURVIVED, HEARD) for rank, code in enumerate(codes) if rank != victim):
                problems.append(where)
            found = storage_cases.load(victim_directory)
            is_old, is_new = storage_cases.is_same(found, old), storage_cases.is_same(found, new)
            left[phase]["old"] += is_old
            left[phase]["new"] += is_new
            again = storage_cases.state_of(3.0)
            gpudcp.save(again, victim_directory)
            if not (is_old or is_new) or not storage_cases.is_same(storage_cases.load(victim_directory), again):
                problems.append(f"{where}: neither old nor new")
            if len(storage_cases.names(victim_directory)) != 2:
                problems.append(f"{where}: {storage_cases.names(victim_directory)} after the next save")
    return {"left": left, "problems": problems, "slowest_s": slowest_s}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
