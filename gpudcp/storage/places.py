"""Which checkpoint ids are places that gpudcp can write to and read from: directories of mounted file systems."""

from __future__ import annotations

import os

from gpudcp.errors import PlanError


def is_directory_id(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether this could be a path on a mounted file system, and is no URL."""
    return "://" not in os.fspath(checkpoint_id)


def directory_of(checkpoint_id: str | os.PathLike[str]) -> str:
    """The path.

    Raises:
        PlanError: it is a URL, which as a path would be a directory of that name, here.
    """
    path = os.fspath(checkpoint_id)
    if not is_directory_id(path):
        raise PlanError(
            f"{path}: gpudcp reads and writes mounted file systems; for a URL use torch's FsspecWriter and FsspecReader"
        )
    return path
