"""Reads regular files only. Opening a FIFO would wait for a writer, and a device such as /dev/zero has no end."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class IrregularFileError(OSError):
    """A path is not a regular file, is a symbolic link that must not be followed, or leads to a too large file."""


def open_regular(path: Path, *, links: bool = True) -> BufferedReader:
    """Opens a file for reading, without waiting.

    Args:
        links: Whether `path` may be a symbolic link. Pass `links=False` for a file that runs replace by a rename. Such a
            file is never a link, unless another program or person made one.

    Raises:
        IrregularFileError: the path is not a regular file, or is a link although `links` is False.
        OSError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not links:
            raise IrregularFileError(errno.EINVAL, "is a symbolic link", str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode  # mode of the open file, as `path` may have been replaced
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise IrregularFileError(errno.EINVAL, "is a folder" if stat.S_ISDIR(mode) else "is no regular file", str(path))


def read_regular(path: Path, *, most_bytes: int, links: bool = True) -> bytes:
    """Opens a file with `open_regular` and reads all of it. Raises the errors of `open_regular`, and IrregularFileError if
    the file has more than `most_bytes` bytes."""
    with open_regular(path, links=links) as stream:
        if os.fstat(stream.fileno()).st_size > most_bytes:
            raise IrregularFileError(errno.EINVAL, f"is larger than {most_bytes:,} bytes", str(path))
        return stream.read()
