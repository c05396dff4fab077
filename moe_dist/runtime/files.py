"""Writes files atomically, checks that a folder is writable, and reads the last lines of a large file."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_dist.config.regular_file import open_regular
from moe_dist.errors import ConfigError

BLOCK = 1 << 16  # number of bytes that `lines_from_end` reads at a time


def write_atomically(
    path: Path, content: str | bytes, *, before_rename: Callable[[], None] | None = None, mode: int = 0o666
) -> None:
    """Replaces a file atomically: a reader sees either the old or the new content, even after a crash of the machine.

    Args:
        before_rename: Called right before the rename, for example to check a lease. If it raises, the old file is kept.
        mode: Permissions of the file, before the umask is applied.
    """
    # The random name and the flags O_EXCL and O_NOFOLLOW prevent another user's link from redirecting the write.
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())  # before the rename, so that a crash leaves no empty file under the final name
        if before_rename is not None:
            before_rename()
        os.replace(new, path)  # atomic: readers see the old or the new file
    except BaseException:
        new.unlink(missing_ok=True)  # runs also after Ctrl-C
        raise


def make_writable(folder: Path, *, option: str) -> None:
    """Creates a folder if it is missing, and raises ConfigError if the folder is not writable. Call this function before
    long work whose results go to the folder. The message begins with `option`, an option's name and value."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):  # creating a file in a folder needs write and execute permission
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{option}: not writable: {error.strerror}; choose another folder") from error


def lines_from_end(path: Path, *, most_bytes: int) -> Iterator[bytes]:
    """Yields the complete lines within the last `most_bytes` of a file, the last line first. Yields nothing if the file is
    missing. Skips a last line without newline, because its writing was interrupted or has not ended."""
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        return
    with stream:
        at = stream.seek(0, 2)
        begin = max(0, at - most_bytes)
        parts: list[bytes] = []  # of the line that begins before the block; the last part first
        torn = True
        while at > begin:
            size = min(BLOCK, at - begin)
            at -= size
            stream.seek(at)
            first, *lines = stream.read(size).split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(parts))
                yield from reversed(lines[:-1] if torn else lines)
                parts, torn = [], False
            if not torn:
                parts.append(first)
        if at == 0 and not torn:
            yield b"".join(reversed(parts))
