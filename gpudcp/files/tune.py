"""Which way of writing is fastest on a file system: for now a table by type, never a test file of its own accord."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import NamedTuple

from gpudcp.errors import BackendUnavailableError

# Direct writes skip a copy and the page cache. On these local file systems they win (ext4 in bench/results: 2.1 GB/s
# with fsync, buffered 0.5); on tmpfs there is nothing to skip, and on some parallel file systems they lose
# several-fold, so every type that is not named is written through the page cache.
_DIRECT_WRITE_TYPES = frozenset({"ext4", "xfs"})


class WriteChoice(NamedTuple):
    """Direct or buffered, and why, for the report."""

    is_direct: bool
    reason: str


def choose_write(directory: str, direct_io: str) -> WriteChoice:
    """How to write files into ``directory``; ``direct_io`` is ``auto``, ``on`` or ``off`` as in Options.

    Raises:
        BackendUnavailableError: ``on``, where the file system opens no file with O_DIRECT.
    """
    if direct_io == "off":
        return WriteChoice(False, "Options(direct_io='off')")
    kind = file_system_type(directory)
    if direct_io == "on":
        if not (supports_direct_io(directory) or _opens_named_file_directly(directory)):
            raise BackendUnavailableError(
                f"{directory}: {kind} opens no file with O_DIRECT; use Options(direct_io='auto') or 'off'"
            )
        return WriteChoice(True, "Options(direct_io='on')")
    if kind not in _DIRECT_WRITE_TYPES:
        return WriteChoice(False, f"buffered writes on {kind}")
    if not supports_direct_io(directory):
        return WriteChoice(False, f"buffered writes: O_DIRECT refused, though this is {kind}")
    return WriteChoice(True, f"direct writes on {kind}")


def file_system_type(path: str) -> str:
    """The type of the file system that holds ``path``, as the kernel names it; "unknown" where it does not say."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return "unknown"


def supports_direct_io(directory: str) -> bool:
    """Whether a file in ``directory`` can be opened with O_DIRECT. Uses an unnamed file: nothing is left behind."""
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "O_TMPFILE")):
        return False
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    os.close(fd)
    return True


def _opens_named_file_directly(directory: str) -> bool:
    """Whether it works with a name, where there are no unnamed files (NFS, Lustre). Asked only for ``on``."""
    path = os.path.join(directory, f".gpudcp-{secrets.token_hex(8)}")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except (OSError, AttributeError):  # no O_DIRECT, here or in this system's Python
        return False
    finally:
        # Also after a refusal: Linux makes the name before it looks at the flag.
        with suppress(OSError):
            os.unlink(path)
    return True
