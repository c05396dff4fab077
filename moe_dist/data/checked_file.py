"""Reads parts of a file, and names the file if a read fails or is short."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.errors import DataError, StorageError


class CheckedFile:
    """A file that is open for random reads. Thread-safe.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _readable(self.path):
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self.size = self._size()

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Reads `num_bytes` bytes from byte `offset` on. Costs one system call, which the page cache usually answers.

        Raises:
            DataError: the file was truncated after it was opened.
            StorageError: the file system does not answer.
        """
        parts: list[bytes] = []
        missing = num_bytes
        while missing:
            with _readable(self.path):
                part = os.pread(self._fd, missing, offset + num_bytes - missing)
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
        with _readable(self.path):
            return os.fstat(self._fd).st_size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read: {error.strerror or error}; look at the disk or file system that holds it, then start "
            "again from the last checkpoint",
            see="docs/reliability.md",
        ) from error
