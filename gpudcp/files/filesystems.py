"""What the kernel says about the file system that a directory is on. Decides nothing."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import NamedTuple


class Mount(NamedTuple):
    """A mounted file system, as the kernel names its parts."""

    type: str
    source: str
    point: str


_UNKNOWN = Mount("unknown", "unknown", "unknown")


def mount_of(path: str) -> Mount:
    """The mount that ``path`` is on; "unknown" in every part where the kernel does not say."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    kind, source = fields[fields.index("-") + 1 :][:2]
                    return Mount(kind, source, fields[4])
    except (OSError, ValueError, IndexError):
        pass
    return _UNKNOWN


def file_system_type(path: str) -> str:
    """The type of the file system that holds ``path``, as the kernel names it; "unknown" where it does not say."""
    return mount_of(path).type


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


def has_unnamed_files(directory: str) -> bool:
    """Whether files without a name can be made in ``directory``, of which nothing is left behind."""
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except (OSError, AttributeError):  # no such file system, or no such flag in this system's Python
        return False
    return True


def opens_named_file_directly(directory: str) -> bool:
    """Whether it works with a name, where there are no unnamed files (NFS, Lustre). The name is gone afterwards."""
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
