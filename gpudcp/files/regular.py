"""Open what has to be a regular file: whoever writes a checkpoint may have put a pipe or a device in its place."""

from __future__ import annotations

import errno
import os
import stat


def open_regular(path: str, flags: int) -> int:
    """The descriptor of an existing regular file, as `os.open` gives it; an `opener` for `open`.

    Raises:
        OSError: there is none. Of a pipe too, at once: opening one waits for its other end, and reading a device like
            /dev/zero never ends.
    """
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        if stat.S_ISDIR(mode := os.fstat(fd).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no regular file", path)
        # Only the opening is not to wait: some file systems in user space would hear of it at every read.
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd
