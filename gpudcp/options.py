"""The options of a transfer, validated once: the only home of defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gpudcp.errors import PlanError

Executor = Literal["auto", "cpu", "cuda", "interpret"]
Files = Literal["auto", "gds", "kvikio", "posix"]
DirectIO = Literal["auto", "on", "off"]
Verify = Literal["payload", "full", "off"]
UnsafeObjects = Literal["warn", "error"]

SLAB_ALIGNMENT_NBYTES = 4096
"""Every slab starts and ends on a multiple of this, the page and the strictest block size in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How bytes move. Host memory taken by a transfer is ``lanes * slab_nbytes``, whatever the model's size."""

    executor: Executor = "auto"
    files: Files = "auto"
    slab_nbytes: int = 4 << 20
    """One slab, and so the largest single read or write, in bytes: a multiple of 4096."""
    lanes: int = 4
    """Slabs in the ring: one being packed or unpacked, the others on their way."""
    threads: int = 2
    """Threads that read or write files."""
    direct_io: DirectIO = "auto"
    """O_DIRECT for writes: ``auto`` decides by file-system type, ``on`` raises where it is not possible."""
    fsync: bool = True
    """False skips every fsync: faster, and a power cut may then leave no checkpoint at all."""
    checksum: bool = True
    """CRC-32 of every payload, in the file and in ``.metadata``."""
    verify: Verify = "payload"
    """On load: ``payload`` checks what is read whole, ``full`` reads slices' payloads whole too, ``off`` nothing."""
    trust_pickle: bool = False
    """Load objects with Python's own pickle, which runs whatever code they name."""
    unsafe_objects: UnsafeObjects = "warn"
    """What a save does about an object that a load without ``trust_pickle`` would refuse."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise PlanError(f"Options({name}={value!r}): must be one of {', '.join(map(repr, allowed))}")
        for name, least in (("slab_nbytes", SLAB_ALIGNMENT_NBYTES), ("lanes", 1), ("threads", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"Options({name}={value!r}): must be an integer of at least {least}")
        for name in ("fsync", "checksum", "trust_pickle"):
            if not isinstance(value := getattr(self, name), bool):
                raise PlanError(f"Options({name}={value!r}): must be True or False")
        if self.slab_nbytes % SLAB_ALIGNMENT_NBYTES:
            raise PlanError(f"Options(slab_nbytes={self.slab_nbytes}): must be a multiple of {SLAB_ALIGNMENT_NBYTES}")


_CHOICES = {
    "executor": get_args(Executor),
    "files": get_args(Files),
    "direct_io": get_args(DirectIO),
    "verify": get_args(Verify),
    "unsafe_objects": get_args(UnsafeObjects),
}
