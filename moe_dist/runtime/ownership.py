"""Checks who owns a run folder, because only the owner may write to a run. A Unix group may share the files.

The check prevents accidents, not attacks: a user with write permission on the folder can do everything that its owner can
do (docs/security.md).
"""

import contextlib
import errno
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_dist.errors import ConfigError, MoeDistError

# Errors that a retry cannot fix: this user may not use the path, or the path leads to no regular file (EINVAL).
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class RunFolderError(MoeDistError):
    """The run folder cannot be read or written at the moment, because the disk is full or the file system is lost."""


def user_name(uid: int) -> str:
    """Returns a user's name and uid."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def other_owner(folder: Path) -> str | None:
    """Returns the folder's owner if it is another user; None if this user owns the folder, or if it is missing.

    Some file systems show one owner for all files (root over NFS, mounts in a container). If the folder seems to belong to
    another user, this function therefore creates a temporary file in it. If this file gets the same owner as the folder,
    the folder counts as this user's.
    """
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return None
    if owner == os.geteuid():
        return None
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".owner_") as probe:
        if os.fstat(probe.fileno()).st_uid == owner:  # this file system maps all users to one owner
            return None
    return user_name(owner)


def refuse_planted_files(folder: Path) -> None:
    """Raises ConfigError if a run folder, or a folder in it to which runs write, contains a dangerous link or file. Writes
    would follow a symbolic link that leads out of the run folder or belongs to another user. A FIFO, device or socket could
    make a reader wait forever."""
    inside = os.path.join(os.path.realpath(folder), "")
    deep = [folder / name for name in ("log", "tensorboard", "trace", "traces", "adapters")]
    below = [each for place in deep if place.is_dir() for each in place.glob("*/")]
    for place in (folder, folder / "checkpoints", folder / "profile", folder / "slurm", *deep, *below):
        for entry in list(os.scandir(place)) if place.is_dir() else ():
            # A folder's listing usually includes the entries' types, so that thousands of logs need no further requests.
            if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # a running attempt has just renamed the entry
                continue
            if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
                raise ConfigError(
                    f"{entry.path} is a symbolic link created by {user_name(found.st_uid)}; a run uses no links of "
                    "other users; delete it, and remove that user's write permission (docs/security.md)"
                )
            if stat.S_ISLNK(found.st_mode) and not os.path.realpath(entry.path).startswith(inside):
                raise ConfigError(
                    f"{entry.path} is a symbolic link out of the run folder, and a run writes through no such link; delete "
                    "it, or set run.root to the disk that the run is to write to (docs/security.md)"
                )
            if stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                raise ConfigError(
                    f"{entry.path} is no regular file, but {stat.filemode(found.st_mode)} of {user_name(found.st_uid)}; "
                    "a run has no such file; delete it (docs/security.md)"
                )


def give_to_group(folder: Path, group: str) -> None:
    """Sets a folder's group and setgid bit, so that new files in the folder get this group. Keeps all other permissions.
    Raises ConfigError if the node has no group with this name, and OSError if this user may not change the folder."""
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"run.group={group!r}: no group of that name on this node") from None
    if folder.stat().st_gid != gid:
        os.chown(folder, -1, gid)  # keeps the owner
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not mode & stat.S_ISGID:
        os.chmod(folder, mode | stat.S_ISGID)


@contextlib.contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Converts an OSError of the block into an error that says how to fix it.

    Raises:
        ConfigError: this user cannot use the path, and a retry would not help.
        RunFolderError: any other error occurred (such as a full disk or an I/O error).
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in _LASTING:
            raise ConfigError(
                f"run folder {path}: {error.strerror} ({where}), as {user_name(os.geteuid())}; choose another run.root, or "
                "ask the owner for permission"
            ) from error
        raise RunFolderError(
            f"run folder {path}: {error.strerror or error} ({where}); repair that file system or choose another run.root"
        ) from error
