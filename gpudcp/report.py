"""What a transfer did: a value, and the stopwatch that fills it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One rank's save or load. GB is 10^9 bytes."""

    direction: Literal["save", "load"]
    path: str
    nitems: int
    payload_nbytes: int
    """Bytes of tensors and objects."""
    file_nbytes: int
    """Bytes written to, or read from, files."""
    total_s: float
    phases_s: MappingProxyType[str, float]
    """Seconds by phase, on the calling thread: what it did, or what it waited for."""
    executor: str
    files: str
    checksum: str
    """The library that computed CRC-32, or why none was computed."""
    reasons: tuple[str, ...]
    """Why this executor and these files, one sentence each."""

    @property
    def gb_per_s(self) -> float:
        return self.payload_nbytes / self.total_s / 1e9 if self.total_s > 0 else 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.phases_s.items())
        return (
            f"{self.direction} {self.path}: {self.nitems} items, {self.payload_nbytes / 1e9:.3f} GB in "
            f"{self.total_s:.3f} s ({self.gb_per_s:.2f} GB/s; {phases}); executor {self.executor}, files {self.files}, "
            f"checksum {self.checksum} ({'; '.join(self.reasons)})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The mappingproxy does not pickle; a writer, which holds a report, goes to another process for async_save.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _rebuild, ({**values, "phases_s": dict(self.phases_s)},)


def _rebuild(values: dict[str, Any]) -> TransferReport:
    return TransferReport(**{**values, "phases_s": MappingProxyType(values["phases_s"])})


class Stopwatch:
    """Adds up seconds by phase; for one thread. Time of a phase inside a phase counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block and add it to ``name``."""
        start = time.perf_counter()
        self._open.append(name)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            if self._open:
                self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) - elapsed

    def total_s(self) -> float:
        """Seconds since this stopwatch was made."""
        return time.perf_counter() - self._started
