"""Reads a data file that may be truncated, or whose disk may fail, while the run uses it.

With a memory map either fault raises SIGBUS, which kills the process without a message. Here each read is a `pread` on an
open descriptor. A short or failed read raises an error that names the file; a file replaced by rename is read as it was.
"""

import os
import weakref
from pathlib import Path

from moe_dist.errors import DataError, StorageError


class CheckedFile:
    """A file opened for random reads. Thread-safe.

    Args:
        path: The file.

    Raises:
        StorageError: it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        weakref.finalize(self, os.close, self._fd)
        self.size = self._size()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Reads `num_bytes` from byte `offset` on. Costs one system call, usually answered by the page cache.

        Raises:
            DataError: the file ends earlier; it was truncated after it was opened.
            StorageError: the file system does not answer.
        """
        parts: list[bytes] = []
        missing = num_bytes
        while missing:
            try:
                part = os.pread(self._fd, missing, offset + num_bytes - missing)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not part:
                raise DataError(
                    f"{self.path}: {self._size()} bytes, but there were {self.size} when it was opened: cut short while "
                    "the run reads it; copy or prepare it again, then start again from the last checkpoint",
                    see="docs/reliability.md",
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _size(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise _unreadable(self.path, error) from error


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot be read: {error.strerror or error}; look at the disk or file system that holds it, then start "
        "again from the last checkpoint",
        see="docs/reliability.md",
    )
