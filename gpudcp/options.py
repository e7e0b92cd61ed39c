"""The options of a transfer, validated once: the only home of defaults."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Literal, get_args

from gpudcp.errors import PlanError

Executor = Literal["auto", "cpu", "cuda", "interpret"]
Files = Literal["auto", "gds", "kvikio", "posix"]
DirectIO = Literal["auto", "on", "off"]
Verify = Literal["payload", "full", "off"]
AsyncMode = Literal["thread", "process"]
UnsafeObjects = Literal["warn", "error"]

SLAB_ALIGNMENT_NBYTES = 4096
"""Every slab starts and ends on a multiple of this, the page and the strictest block size in use."""


MOST_SLAB_NBYTES = 1 << 30
"""Linux moves at most 2 GiB in one call, and kernels count a slab's elements with 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How bytes move. Memory taken by a transfer is ``lanes * slab_nbytes``, whatever the model's size.

    The cuda executor takes it on the device and as pinned host memory, and keeps both for the next transfer: once for
    each device where a state dict has tensors on several.
    """

    executor: Executor = "auto"
    files: Files = "auto"
    """How bytes reach files. For a GPU's tensors, and where KvikIO is installed, ``auto`` tries it once in a process
    and file system, with 256 KiB of a file that has no name, or none for long (see `gpudcp.files.trial`)."""
    slab_nbytes: int | None = None
    """One slab, and so the largest single read or write, in bytes: a multiple of 4096. None: 32 MiB on a device, on the
    host the request that `gpudcp.tune` found best, or 4 MiB."""
    lanes: int = 4
    """Slabs in the ring, of which each device has its own: one being packed or unpacked, the others on their way."""
    threads: int | None = None
    """Threads that read or write files. None: this rank's share of what `gpudcp.tune` found best, or 2, or
    its one core's one; in the background no more than leave one of this rank's cores to training."""
    direct_io: DirectIO = "auto"
    """O_DIRECT for writes: ``auto`` decides by file-system type, ``on`` raises where it is not possible. Reads of a
    GPU's tensors are direct where that was measured to be faster, and with ``off`` never."""
    fsync: bool = True
    """False skips every fsync: faster, and a power cut may then leave no checkpoint at all."""
    checksum: bool = True
    """CRC-32 of every payload, in the file and in ``.metadata``."""
    verify: Verify = "payload"
    """On load: ``payload`` checks what is read whole, ``full`` reads slices' payloads whole too, ``off`` nothing."""
    async_mode: AsyncMode = "thread"
    """Who writes after `gpudcp.async_save`: a thread, or a process, which takes nothing from training's interpreter."""
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
            if value is None and name != "lanes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"Options({name}={value!r}): must be an integer of at least {least}")
        for name in ("fsync", "checksum", "trust_pickle"):
            if not isinstance(value := getattr(self, name), bool):
                raise PlanError(f"Options({name}={value!r}): must be True or False")
        if self.slab_nbytes is not None and self.slab_nbytes > MOST_SLAB_NBYTES:
            raise PlanError(f"Options(slab_nbytes={self.slab_nbytes}): must be at most {MOST_SLAB_NBYTES}")
        if self.slab_nbytes is not None and self.slab_nbytes % SLAB_ALIGNMENT_NBYTES:
            raise PlanError(f"Options(slab_nbytes={self.slab_nbytes}): must be a multiple of {SLAB_ALIGNMENT_NBYTES}")


_CHOICES = {
    "executor": get_args(Executor),
    "files": get_args(Files),
    "direct_io": get_args(DirectIO),
    "verify": get_args(Verify),
    "async_mode": get_args(AsyncMode),
    "unsafe_objects": get_args(UnsafeObjects),
}


def ranks_of_this_node() -> int:
    """How many ranks share this machine, as torchrun says; 1 where nobody says."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) > 0 else 1


def cores_of_this_rank() -> int:
    """Its share of the cores that this process may run on."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_of_this_node())


def world_size_of_launcher() -> int:
    """How many ranks torchrun has started; 1 where nobody says."""
    given = os.environ.get("WORLD_SIZE", "")
    return int(given) if given.isdecimal() and int(given) > 0 else 1


def is_first_rank_of_node() -> bool:
    """Whether this process is the one of its machine that speaks for all; True where nobody says."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def user_cache_directory() -> str | None:
    """Where this user's programs keep what they can do without; None: nowhere."""
    for path in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(path):  # as the XDG specification says: a relative one is ignored
            return path
    return None


def c_compiler() -> str | None:
    """The C compiler that Triton takes, which every first launch of a kernel needs."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
