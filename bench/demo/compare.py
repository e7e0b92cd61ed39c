"""The table: the same real weights saved and loaded by each library, one after the other, several times over."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from equality import find_differences
from libraries import LIBRARIES, Library, Tensors
from memory import measure_peak_extra_nbytes
from weights import places_for, spoil

ROUNDS = 5


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one library did: seconds of every round, the peaks, and what its loads got wrong."""

    save_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    save_peak_nbytes: int = 0
    load_peak_nbytes: int = 0
    differences: list[str] = field(default_factory=list)


def measure(tensors: Tensors, directory: Path) -> dict[str, Measured]:
    """One round that does not count, then ROUNDS that do. Each starts with another library, so none is always first."""
    results = {library.name: Measured() for library in LIBRARIES}
    places = places_for(tensors)
    for number in range(-1, ROUNDS):
        first = number % len(LIBRARIES)
        for library in LIBRARIES[first:] + LIBRARIES[:first]:
            save_s, load_s, differences = _run_round(library, tensors, places, directory)
            results[library.name].differences += differences
            if number >= 0:
                results[library.name].save_s.append(save_s)
                results[library.name].load_s.append(load_s)
    for library in LIBRARIES:
        _measure_memory(library, directory, results[library.name])
    return results


def format_table(results: dict[str, Measured], nbytes: int) -> list[str]:
    """One line a library: medians of the seconds, GB/s (10^9 bytes) and MiB."""
    lines = [
        f"{'':16}{'save':>7}{'':>8}{'load':>9}{'':>8}{'peak extra memory':>22}",
        f"{'':16}{'s':>7}{'GB/s':>8}{'s':>9}{'GB/s':>8}{'save MiB':>12}{'load MiB':>10}",
    ]
    for name, result in results.items():
        save_s, load_s = statistics.median(result.save_s), statistics.median(result.load_s)
        lines.append(
            f"{name:16}{save_s:7.3f}{nbytes / save_s / 1e9:8.2f}{load_s:9.3f}{nbytes / load_s / 1e9:8.2f}"
            f"{result.save_peak_nbytes / 2**20:12.1f}{result.load_peak_nbytes / 2**20:10.1f}"
        )
    return lines


def _run_round(library: Library, tensors: Tensors, places: Tensors, directory: Path) -> tuple[float, float, list[str]]:
    """Seconds of a save, seconds of a load, and what is different afterwards."""
    target = directory / "round"
    target.mkdir()
    save_s = _time(lambda: library.save(tensors, target))
    _read_all(target)
    spoil(places)
    load_s = _time(lambda: library.load(places, target))
    shutil.rmtree(target)
    return save_s, load_s, find_differences(tensors, places)


def _measure_memory(library: Library, directory: Path, result: Measured) -> None:
    target = directory / "memory"
    target.mkdir()
    result.save_peak_nbytes = measure_peak_extra_nbytes(library, "save", target)
    result.load_peak_nbytes = measure_peak_extra_nbytes(library, "load", target)
    shutil.rmtree(target)


def _read_all(directory: Path) -> None:
    # All loads start alike, from the page cache, also of a library that wrote around it.
    for path in directory.iterdir():
        path.read_bytes()


def _time(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
