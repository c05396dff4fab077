"""Writing a file whole or not at all, and whether there is a place for it."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from moe_dist.errors import ConfigError


def write_atomically(path: Path, content: str | bytes, *, before_rename: Callable[[], None] | None = None) -> None:
    """Replaces a file: a reader sees the old or the new content whole, also after a crash of the machine. Permissions are
    as the umask says.

    Args:
        before_rename: The last look before the new content takes its place (a lease's `check`); what it raises keeps the
            old.
    """
    # A name that nobody can have prepared, and O_EXCL: never through a link that somebody left there.
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def make_writable(folder: Path, *, said: str) -> None:
    """Makes a folder where there is none, before long work whose results are to lie in it.

    Args:
        said: The option and its value, for the message.

    Raises:
        ConfigError: it cannot be made, or nothing can be written in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{said}: cannot be written: {error.strerror}; choose another place") from error
