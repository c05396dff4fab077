"""Whose a run folder is: one user writes it, a group may share it, and others are refused by name.

What stands here keeps people from each other's runs by accident. Who may write into a folder by its permissions can do
there what its owner can (docs/security.md).
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

# What trying again does not mend: the path as given cannot be used by this user.
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class RunFolderError(MoeDistError):
    """The run folder cannot be read or written just now: a full disk, a lost file system."""


def user_name(uid: int) -> str:
    """A user as people know him."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def other_owner(folder: Path) -> str | None:
    """The user that a folder belongs to, if that is another than this process's; None also where there is no folder.

    Some file systems give all files one owner whoever makes them (root over NFS, mounts of a container): where a file of
    ours would have the folder's owner, the folder is ours. Only where the owner differs is such a file made, and removed.
    """
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return None
    if owner == os.geteuid():
        return None
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".owner_") as probe:
        if os.fstat(probe.fileno()).st_uid == owner:
            return None
    return user_name(owner)


def refuse_planted_links(folder: Path) -> None:
    """Refuses symbolic links of other users, in a run folder and its logs, that our files would be written through.

    Links that this user or root has made are meant (checkpoints on another disk).

    Raises:
        ConfigError: names the link and its maker.
    """
    for place in (folder, folder / "log"):
        for entry in place.iterdir() if place.is_dir() else ():
            found = entry.lstat()
            if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.geteuid()):
                raise ConfigError(
                    f"{entry} is a symbolic link that {user_name(found.st_uid)} has made: a run does not write through it; "
                    "remove it, and close the folder to that user (docs/security.md)"
                )


def give_to_group(folder: Path, group: str) -> None:
    """Gives a folder to a Unix group and sets its setgid bit, so that all that is made in it belongs to the group. All
    other permissions stay as they are.

    Raises:
        ConfigError: there is no such group.
        OSError: this user may not.
    """
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"run.group={group!r}: no group of that name on this node") from None
    if folder.stat().st_gid != gid:
        os.chown(folder, -1, gid)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not mode & stat.S_ISGID:
        os.chmod(folder, mode | stat.S_ISGID)


@contextlib.contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Around what reads or writes a run folder: a failure of the file system becomes an error that says the way out.

    Raises:
        ConfigError: this user cannot use the path; trying again would not help.
        RunFolderError: anything else (no room, an I/O error).
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        me = user_name(os.geteuid())
        if error.errno in _LASTING:
            raise ConfigError(
                f"run folder {path}: {error.strerror} ({where}), as {me}; choose another run.root, or have the folder "
                "opened to you"
            ) from error
        raise RunFolderError(
            f"run folder {path}: {error.strerror or error} ({where}); mend that file system or choose another run.root, "
            "then start again: the last checkpoint is untouched"
        ) from error
