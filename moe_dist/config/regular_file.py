"""Reads regular files only: opening a FIFO would wait for a writer, and a device such as /dev/zero has no end."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class IrregularFileError(OSError):
    """A path leads to no regular file, to a file that is too large, or through a symbolic link that is not followed."""


def open_regular(path: Path, *, links: bool = True) -> BufferedReader:
    """Opens a file for reading, without waiting.

    Args:
        links: Whether to follow `path` if `path` is a symbolic link. `links` is False for a file that runs replace by
            renames: a rename leaves no link, so a link at this path was made by another program or person.

    Raises:
        IrregularFileError: the path is no regular file, or a link although `links` is False.
        OSError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not links:
            raise IrregularFileError(errno.EINVAL, "is a symbolic link", str(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode  # mode of the open file, because `path` may name another file by now
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise IrregularFileError(errno.EINVAL, "is a folder" if stat.S_ISDIR(mode) else "is no regular file", str(path))


def read_regular(path: Path, *, most_bytes: int, links: bool = True) -> bytes:
    """Reads a whole file, which `open_regular` opens. Raises the errors of `open_regular`, and IrregularFileError for a
    file of more than `most_bytes`."""
    with open_regular(path, links=links) as stream:
        if os.fstat(stream.fileno()).st_size > most_bytes:
            raise IrregularFileError(errno.EINVAL, f"is larger than {most_bytes:,} bytes", str(path))
        return stream.read()
