"""The executors of the conformance suite, in rings of several shapes. A new executor joins the suite here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpudcp.executors.base import Executor
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.cuda import DeviceExecutor
from gpudcp.executors.devices import Device, InterpretedDevice


def executor_of(
    *devices: Device,
    slab_nbytes: int = 8192,
    lanes: int = 2,
    threads: int = 2,
    has_checksum: bool = True,
    notes: list[str] | None = None,
) -> DeviceExecutor:
    """A device executor whose fallback is the cpu executor."""
    fallback = CpuExecutor(lanes=lanes, threads=threads, slab_nbytes=slab_nbytes, has_checksum=has_checksum)
    return DeviceExecutor(
        devices,
        name="interpret",
        lanes=lanes,
        threads=threads,
        slab_nbytes=slab_nbytes,
        has_checksum=has_checksum,
        registers_slabs=False,
        fallback=fallback,
        notes=[] if notes is None else notes,
    )


def _interpreted(*, lanes: int, threads: int, slab_nbytes: int, has_checksum: bool) -> Executor:
    return executor_of(
        InterpretedDevice(), lanes=lanes, threads=threads, slab_nbytes=slab_nbytes, has_checksum=has_checksum
    )


EXECUTORS: dict[str, Callable[..., Executor]] = {"cpu": CpuExecutor, "interpret": _interpreted}


@dataclass(frozen=True)
class Ring:
    """An executor with so many slabs of such a size, and so many threads."""

    executor: str
    lanes: int
    threads: int
    slab_nbytes: int

    @property
    def is_slow(self) -> bool:
        """Whether a case of many items stands for itself with a few: the interpreter takes 100 ms for a checksum."""
        return self.executor == "interpret"

    def make(self, *, has_checksum: bool = True) -> Executor:
        return EXECUTORS[self.executor](
            lanes=self.lanes, threads=self.threads, slab_nbytes=self.slab_nbytes, has_checksum=has_checksum
        )


_SHAPES = ((1, 1, 4096), (2, 3, 8192), (4, 2, 4096), (3, 1, 1 << 20))
RINGS = [Ring("cpu", *shape) for shape in _SHAPES] + [Ring("interpret", 2, 3, 8192), Ring("interpret", 1, 1, 4096)]
