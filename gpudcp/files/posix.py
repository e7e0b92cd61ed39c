"""POSIX files: buffered, or direct (O_DIRECT). Short transfers go on, everything else raises."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import weakref
from contextlib import suppress
from types import TracebackType

from gpudcp.errors import CheckpointNotFoundError, TransferError
from gpudcp.files.regular import open_regular
from gpudcp.options import SLAB_ALIGNMENT_NBYTES


class PosixWriter:
    """A new file, which must not exist yet; leaving its context without `finish` removes it.

    With ``is_direct`` every write is whole blocks of 4096 bytes, the last one padded; `finish` cuts the padding off.
    Room for ``nbytes`` is made at once for direct writes, and with ``is_reserved``, for those that others make.
    """

    def __init__(self, path: str, *, nbytes: int, is_direct: bool, fsync: bool, is_reserved: bool = False) -> None:
        self.path = path
        self.is_direct = is_direct
        self.alignment_nbytes = SLAB_ALIGNMENT_NBYTES if is_direct else 1
        self._fsync = fsync
        self._is_finished = False
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
        try:
            self._fd = os.open(path, flags, 0o666)
        except FileExistsError:
            raise
        except OSError as err:
            raise _transfer_error(path, "cannot be created", err, byte_offset=0, expected=nbytes, moved=0) from err
        try:
            if is_direct or is_reserved:
                self._reserve(nbytes)
        except BaseException:
            self._remove()
            raise

    def _reserve(self, nbytes: int) -> None:
        # Direct writes that make a file longer wait for one another, and for the journal: blocks allocated at once, and
        # the length with them, spare them that; and a full disk is found before the first byte. Where a file system
        # cannot do it, nothing is lost.
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            # Where the kernel cannot, glibc writes a byte into every block itself, but not to a descriptor that
            # appends (glibc's bug 15661). NFS has none that both appends and is direct.
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT | os.O_APPEND)
            os.posix_fallocate(self._fd, 0, max(nbytes, 1))
        except OSError as err:
            if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF):
                raise _transfer_error(self.path, "no room", err, byte_offset=0, expected=nbytes, moved=0) from err
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)

    def fileno(self) -> int:
        """The descriptor, for those who reach the same file in another way."""
        return self._fd

    def write(self, data: memoryview, byte_offset: int) -> None:
        moved, nbytes = 0, len(data)
        while moved < nbytes:
            try:
                count = os.pwrite(self._fd, data[moved:], byte_offset + moved)
            except OSError as err:
                raise _transfer_error(
                    self.path, "write failed", err, byte_offset=byte_offset, expected=nbytes, moved=moved
                ) from err
            if self.is_direct:
                # A short direct write may end off the block: that block is written once more, from its start.
                count -= count % SLAB_ALIGNMENT_NBYTES
            if count == 0:
                raise TransferError(
                    f"{self.path}: write of {nbytes} bytes at {byte_offset} stopped after {moved}",
                    path=self.path,
                    byte_offset=byte_offset,
                    expected_nbytes=nbytes,
                    moved_nbytes=moved,
                )
            moved += count

    def finish(self, nbytes: int) -> None:
        try:
            os.ftruncate(self._fd, nbytes)
            if self._fsync:
                os.fsync(self._fd)
        except OSError as err:
            raise _transfer_error(
                self.path, "cannot be finished", err, byte_offset=nbytes, expected=nbytes, moved=nbytes
            ) from err
        self._is_finished = True

    def __enter__(self) -> PosixWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_finished:
            os.close(self._fd)
        else:
            self._remove()

    def _remove(self) -> None:
        os.close(self._fd)
        # The file was made by this writer a moment ago; when even unlink fails, the next save cleans up.
        with suppress(OSError):
            os.unlink(self.path)


class PosixReader:
    """A file open for reads of any alignment: through the page cache, with its read-ahead.

    With ``is_direct`` whole blocks of 4096 bytes go past it, where the file offset and the memory are aligned to them.
    """

    def __init__(self, path: str, *, is_direct: bool = False) -> None:
        self.path = path
        self.alignment_nbytes = 1
        self._direct_fd: int | None = None
        try:
            self._fd = open_regular(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"{path}: a file that the checkpoint names does not exist") from None
        except OSError as err:
            raise _transfer_error(path, "cannot be opened", err, byte_offset=0, expected=None, moved=None) from err
        self.nbytes = os.fstat(self._fd).st_size
        # Also when the reader becomes garbage: a load that fails between two of DCP's calls has nobody to close it.
        self.close = weakref.finalize(self, _close, self._fd, None)
        """Close the file; a second call does nothing."""
        if is_direct:
            try:
                self.read_directly()
            except BaseException:
                self.close()
                raise

    def read_directly(self) -> None:
        """From now on whole blocks go past the page cache, as with ``is_direct``. No read is running.

        Raises:
            TransferError: the file system opens no file with O_DIRECT; the file is read as before.
        """
        try:
            # The very file, whatever has become of its name.
            self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as err:
            raise _transfer_error(
                self.path, "cannot be opened with O_DIRECT", err, byte_offset=0, expected=None, moved=None
            ) from err
        self.alignment_nbytes = SLAB_ALIGNMENT_NBYTES
        self.close.detach()
        self.close = weakref.finalize(self, _close, self._fd, self._direct_fd)

    def fileno(self) -> int:
        """The descriptor, for those who reach the same file in another way."""
        return self._fd

    def read(self, into: memoryview, byte_offset: int) -> None:
        if not self.close.alive:  # the number of its descriptor may be another file's by now
            raise TransferError(f"{self.path}: the file is closed", path=self.path, byte_offset=byte_offset)
        nbytes = len(into)
        moved = 0 if self._direct_fd is None else self._read_directly(self._direct_fd, into, byte_offset)
        while moved < nbytes:
            try:
                count = os.preadv(self._fd, [into[moved:]], byte_offset + moved)
            except OSError as err:
                raise _transfer_error(
                    self.path, "read failed", err, byte_offset=byte_offset, expected=nbytes, moved=moved
                ) from err
            if count == 0:
                raise TransferError(
                    f"{self.path}: the file ends at byte {byte_offset + moved}; "
                    f"{nbytes} bytes at {byte_offset} were expected, {moved} are there",
                    path=self.path,
                    byte_offset=byte_offset,
                    expected_nbytes=nbytes,
                    moved_nbytes=moved,
                )
            moved += count

    def _read_directly(self, fd: int, into: memoryview, byte_offset: int) -> int:
        """Read as many whole blocks as there are, and return their bytes; what is left is for the page cache."""
        whole_nbytes = len(into) - len(into) % SLAB_ALIGNMENT_NBYTES
        if whole_nbytes == 0 or byte_offset % SLAB_ALIGNMENT_NBYTES or _address_of(into) % SLAB_ALIGNMENT_NBYTES:
            return 0
        moved = 0
        while moved < whole_nbytes:
            try:
                count = os.preadv(fd, [into[moved:whole_nbytes]], byte_offset + moved)
            except OSError as err:
                raise _transfer_error(
                    self.path, "read failed", err, byte_offset=byte_offset, expected=len(into), moved=moved
                ) from err
            if count < SLAB_ALIGNMENT_NBYTES:
                break
            # A short read may end off the block: that block is read once more, from its start.
            moved += count - count % SLAB_ALIGNMENT_NBYTES
        return moved


def _address_of(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _close(fd: int, direct_fd: int | None) -> None:
    os.close(fd)
    if direct_fd is not None:
        os.close(direct_fd)


def fsync_directory(path: str) -> None:
    """Bring the names in a directory to stable storage, where the file system can: some, over FUSE, cannot.

    Raises:
        TransferError: it failed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise TransferError(f"{path}: fsync failed: {err.strerror}", path=path, errno=err.errno) from err


def _transfer_error(
    path: str, what: str, err: OSError, *, byte_offset: int, expected: int | None, moved: int | None
) -> TransferError:
    place = "" if expected is None else f" ({moved} of {expected} bytes at byte {byte_offset} moved)"
    return TransferError(
        f"{path}: {what}: {err.strerror or err}{place}",
        path=path,
        byte_offset=byte_offset,
        expected_nbytes=expected,
        moved_nbytes=moved,
        errno=err.errno,
    )
