"""How a checkpoint becomes visible: file names, the lock, the atomic replacement of `.metadata`, the clean-up.

At every instant the directory holds one whole checkpoint. Data files carry the id of their save, so an overwrite
touches no file that the old `.metadata` names; `.metadata` is replaced in one rename, after everything that it names is
on stable storage; only then the old files go.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, ClassVar

from gpudcp.errors import CheckpointBusyError, TransferError
from gpudcp.files.posix import fsync_directory

_logger = logging.getLogger(__name__)

LOCK_NAME = ".gpudcp.lock"
TEMPORARY_SUFFIX = ".tmp"
# Of a thousand digits, as a hostile name may have them, Python makes no number.
_DATA_NAME = re.compile(r"__(?P<rank>\d{1,9})_\d+(_(?P<save_id>[0-9a-f]{16}))?\.distcp")
_METADATA_NAME = re.compile(r"(__\d+)?\.metadata")
_COMMITTED_NAME = re.compile(r"((__\d+)?\.metadata)(\.index)?")
# What flock answers on file systems without locks, Lustre mounted without its flock option among them.
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def draw_save_id() -> str:
    """A name for one save that no other save has: 64 random bits as 16 hexadecimal digits."""
    return secrets.token_hex(8)


def data_file_name(rank: int, number: int, save_id: str) -> str:
    """The name of a rank's data file of one save."""
    return f"__{rank}_{number}_{save_id}.distcp"


def is_data_file_name(name: str, *, has_save_id: bool) -> bool:
    """Whether a DCP writer names its data files so: ours with the id of the save, stock's without one."""
    match = _DATA_NAME.fullmatch(name)
    return match is not None and (match["save_id"] is not None) == has_save_id


def rank_of_data_file(name: str) -> int | None:
    """The rank that wrote a data file; None where the name does not say."""
    match = _DATA_NAME.fullmatch(name)
    return None if match is None else int(match["rank"])


def metadata_file_name(rank: int | None) -> str:
    """``.metadata``, or a rank's own where ranks save without collectives."""
    return ".metadata" if rank is None else f"__{rank}.metadata"


def make_directory(path: str, *, fsync: bool) -> None:
    """Make the directory and its missing parents, each brought to stable storage in its own parent."""
    missing = []
    parent = os.path.abspath(path)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with _os_errors_named(path):
        os.makedirs(path, exist_ok=True)
        if fsync:
            for made in reversed(missing):
                fsync_directory(os.path.dirname(made))


def replace_file(directory: str, name: str, parts: Iterable[bytes | memoryview], *, fsync: bool) -> None:
    """Put a file of these parts in place at once: a temporary file, fsynced, renamed; then the directory fsynced."""
    with file_to_replace(directory, name, parts, fsync=fsync):
        pass


@contextmanager
def file_to_replace(directory: str, name: str, parts: Iterable[bytes | memoryview], *, fsync: bool) -> Iterator[None]:
    """As `replace_file`: in the context the temporary file is there, at its end it is put in place."""
    path = os.path.join(directory, name)
    temporary = path + TEMPORARY_SUFFIX
    try:
        with _os_errors_named(path), _new_file(temporary) as file:
            file.writelines(parts)
            file.flush()
            if fsync:
                os.fsync(file.fileno())
        yield
        _put_in_place(temporary, path, fsync=fsync)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _put_in_place(temporary: str, path: str, *, fsync: bool) -> None:
    with _os_errors_named(path):
        os.replace(temporary, path)
        if fsync:
            fsync_directory(os.path.dirname(path))


def _new_file(path: str) -> BinaryIO:
    try:
        return open(path, "xb")
    except FileExistsError:
        # What a dead save left; or a link, through which a file elsewhere would be written.
        os.unlink(path)
        return open(path, "xb")


def metadata_names(directory: str) -> list[str]:
    """The names of every metadata file in the directory, of all ranks, sorted."""
    return sorted(name for name in os.listdir(directory) if _METADATA_NAME.fullmatch(name))


def is_committed(directory: str) -> bool:
    """Whether the directory holds a checkpoint, or ranks' own; not where it may not be listed."""
    try:
        return bool(metadata_names(directory))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as err:  # no other error: what is not committed may be removed
        _logger.warning("%s: may not be listed, so it counts as no checkpoint: %s", directory, err)
        return False


def remove_checkpoint(directory: str, *, fsync: bool) -> None:
    """Remove a checkpoint and its directory; what else lies there stays, and the directory with it.

    The metadata goes first, so that what is left after a crash is no checkpoint.

    Raises:
        CheckpointBusyError: a save into it is running.
        TransferError: it cannot be removed.
    """
    lock = DirectoryLock.acquire(directory)
    try:
        with _os_errors_named(directory):
            names = os.listdir(directory)
            for name in [*metadata_names(directory), *(name for name in names if _COMMITTED_NAME.fullmatch(name))]:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))
            if fsync:
                fsync_directory(directory)
            remove_files(directory, [name for name in names if _DATA_NAME.fullmatch(name)], fsync=False)
    finally:
        lock.release()
    with suppress(OSError):  # somebody's own files
        os.rmdir(directory)


def stale_data_names(directory: str, *, rank: int | None) -> list[str]:
    """Data files by our name pattern, with a save id: those a clean-up may remove unless some metadata names them.

    ``rank`` limits them to those of one rank: what a rank may clean that saves without collectives.
    """
    found = []
    for name in os.listdir(directory):
        match = _DATA_NAME.fullmatch(name)
        if match and match["save_id"] and (rank is None or int(match["rank"]) == rank):
            found.append(name)
    return sorted(found)


def remove_files(directory: str, names: Collection[str], *, fsync: bool, rank: int | None = None) -> None:
    """Remove these and left-over temporary metadata files. A file that will not go is left for the next save.

    ``rank`` limits the latter to that rank's: the others may be committing theirs, where they save without collectives.
    """
    temporary = [
        name
        for name in os.listdir(directory)
        if name.endswith(TEMPORARY_SUFFIX)
        and (match := _COMMITTED_NAME.fullmatch(name.removesuffix(TEMPORARY_SUFFIX)))
        and (rank is None or match[1] == metadata_file_name(rank))
    ]
    for name in (*names, *temporary):
        with suppress(OSError):
            os.unlink(os.path.join(directory, name))
    if fsync and (names or temporary):
        with suppress(OSError):
            fsync_directory(directory)


class DirectoryLock:
    """One save at a time into a directory: an flock on a file in it, so that a dead owner's lock is free at once.

    A thread that asks again for a directory takes its own lock over: it can only be back because its first save failed
    where no hook told the writer so. A lock that becomes garbage is released.
    """

    _held: ClassVar[weakref.WeakValueDictionary[str, DirectoryLock]] = weakref.WeakValueDictionary()
    _guard = threading.Lock()

    def __init__(self, path: str, fd: int) -> None:
        self._thread = threading.get_ident()
        self.release = weakref.finalize(self, _release_lock, fd, path)
        """Let the directory go; a second call does nothing."""
        # At exit the kernel frees the lock.
        self.release.atexit = False

    @property
    def is_of_another_thread(self) -> bool:
        """Whether a thread that still runs, and not this one, holds the directory."""
        if not self.release.alive or self._thread == threading.get_ident():
            return False
        return any(thread.ident == self._thread for thread in threading.enumerate())

    @classmethod
    def acquire(cls, directory: str) -> DirectoryLock:
        """Hold the directory until ``release()``.

        Raises:
            CheckpointBusyError: another save, of any process, holds it.
        """
        path = os.path.join(os.path.realpath(directory), LOCK_NAME)
        with cls._guard:
            mine = cls._held.get(path)
            if mine is not None and mine._thread == threading.get_ident():
                mine.release()
            with _os_errors_named(path):
                lock = cls._held[path] = cls(path, _lock_file(path))
            return lock

    @classmethod
    def _forget_in_child(cls) -> None:
        # A forked child's copy of the descriptor would hold the lock for as long as the child lives, and releasing it
        # would release the parent's. The guard may have been held by a thread that the child does not have.
        cls._guard = threading.Lock()
        for lock in cls._held.values():
            if (finalizer := lock.release.detach()) is not None:
                os.close(finalizer[2][0])


os.register_at_fork(after_in_child=DirectoryLock._forget_in_child)


def _lock_file(path: str) -> int:
    while True:
        # Through a link somebody else's file would be made, and locked.
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before may have removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)
        except BlockingIOError:
            os.close(fd)
            raise CheckpointBusyError(
                f"{os.path.dirname(path)}: another save into this directory is running (it holds {LOCK_NAME})"
            ) from None
        except OSError as err:
            if err.errno in _NO_LOCKS_HERE:
                _logger.warning("%s: this file system has no locks; two saves at once would not be refused", path)
                return fd
            os.close(fd)
            raise


def _release_lock(fd: int, path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
    # By name, not only by close: a child between its fork and its exec has the descriptor too, and would keep the lock.
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


@contextmanager
def _os_errors_named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if isinstance(err, TransferError):
            raise
        raise TransferError(f"{path}: {err.strerror or err}", path=path, errno=err.errno) from err
