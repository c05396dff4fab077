"""Lists a run's checkpoints, reads the file `latest`, and deletes old checkpoints. Does not import torch."""

import contextlib
import difflib
import logging
import os
import re
import shutil
from pathlib import Path

from moe_dist.checkpoint.index import INDEX_FILE, STATE_FILE
from moe_dist.config.bundled import NEAR
from moe_dist.config.regular_file import IrregularFileError, read_regular
from moe_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"
CHECKPOINTS = "the folder of a checkpoint (step_N), a folder of checkpoints, or a run folder"  # for error texts
NONE_YET = b"none\n"  # content of `latest` before the run's first commit

_COMMITTED = re.compile(r"step_(\d{1,18})")
_POINTER = re.compile(rb"(step_\d{1,18})\n?")
_LEFTOVER = re.compile(r"(step_\d+|latest)\.[0-9a-f]+\.(tmp|removed)")


def step_of(folder: Path) -> int | None:
    """Returns N if the folder is named step_N, else None."""
    match = _COMMITTED.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


class CheckpointDirectory:
    """Lists and deletes the checkpoints in a folder. The folder need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def steps(self) -> list[int]:
        """Returns the step of each committed checkpoint, in ascending order."""
        if not self.folder.is_dir():
            return []
        with os.scandir(self.folder) as entries:  # 400,000 paths would take 20 s; temporary folders do not match
            return sorted(int(found[1]) for each in entries if (found := _COMMITTED.fullmatch(each.name)) and each.is_dir())

    def latest_step(self) -> int:
        """Returns the step of the checkpoint that the file `latest` names; -1 before the first save. Raises DataError if
        `latest` names no checkpoint in this folder, is not a regular file, or is missing although there are checkpoints."""
        path = self.folder / LATEST_FILE
        try:
            content = read_regular(path, most_bytes=64, links=False)  # read once, as it may be replaced meanwhile
        except IrregularFileError as error:
            raise DataError(f"{path}: {error.strerror}, so it was not read; delete it first. {self.fix()}") from error
        except FileNotFoundError:
            if self.steps():
                raise DataError(
                    f"{path} is missing, but the folder has checkpoints; a new start would overwrite them. {self.fix()}"
                ) from None
            return -1
        if content == NONE_YET:
            return -1
        match = _POINTER.fullmatch(content)
        name = match[1].decode() if match else content.decode(errors="replace").strip()
        if match is None or not (self.folder / name / STATE_FILE).is_file():  # a user may have edited `latest`
            raise DataError(f"{path} names {name!r}, which is not a checkpoint in that folder. {self.fix()}")
        return int(name.removeprefix("step_"))

    def fix(self, failed: Path | None = None) -> str:
        """Returns a sentence that tells the user how to resume from a checkpoint other than `failed`."""
        others = [self.path_of(step).name for step in self.steps() if self.path_of(step) != failed]
        if not others:
            return "There is no other checkpoint in that folder: start with --overwrite, or choose another run.name."
        pointer = self.folder / LATEST_FILE
        return f"There are {', '.join(others)}: to resume from the newest, `echo {others[-1]} > {pointer}` and start again."

    def remove_beyond(self, keep: int, step: int) -> None:
        """Of the checkpoints up to `step`, keeps the `keep` newest and deletes the others. Logs errors instead of
        raising them, because the save of `step` has already succeeded."""
        try:
            for old in [each for each in self.steps() if each <= step][:-keep]:
                # The folder is renamed first, so that a half-deleted folder never looks like a checkpoint.
                self.path_of(old).rename(self.folder / f"step_{old}.0.removed")
            self.remove_leftovers()
        except OSError as error:
            logger.warning("cannot remove old checkpoints in %s: %s", self.folder, error)

    def remove_leftovers(self) -> None:
        """Deletes temporary files and folders that a crash or `remove_beyond` left. Only the process that holds the run's
        lease may call this method, because the temporary files of another process's unfinished save look like leftovers."""
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                # A process that has lost the lease may be deleting its own files at the same time.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_path(path: Path, wanted: str = "", *, option: str = "") -> Path:
    """Returns `path`, or `runs/<path>` if only the latter exists. By default runs are stored in `runs`.

    Args:
        wanted: Text of the error, which says which folders the command accepts. Without `wanted`, a missing `path` is
            returned unless its name resembles a folder's name.
        option: Command-line option whose value is `path`; empty if `path` is a positional argument.

    Raises:
        ConfigError: neither `path` nor `runs/<path>` exists, and either a folder has a similar name or `wanted` is given.
    """
    named = Path("runs") / path
    if path.exists() or named.is_dir():
        return path if path.exists() else named
    near = _near_folder(path)
    if near or wanted:
        fix = f"did you mean {near}?" if near else f"give {wanted}"
        raise ConfigError(f"{option} {path}: no such folder; {fix}".lstrip())
    return path


def _near_folder(path: Path) -> Path | None:
    """Returns the folder in `runs` or beside `path` whose name is most similar to `path`'s; None if none is similar."""
    for parent in dict.fromkeys(((Path("runs") / path).parent, path.parent)):
        with contextlib.suppress(OSError):  # the parent is missing, or this user may not list it
            names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
            if near := difflib.get_close_matches(path.name, names, 1, NEAR):
                return parent / near[0]
    return None


def find_checkpoint(path: Path) -> Path:
    """Returns the folder of a checkpoint. This is `path` itself, or the newest checkpoint if `path` is a run folder or a
    folder of checkpoints. `path` may omit the leading `runs/`, as in `run_path`.

    Raises:
        ConfigError: there is no checkpoint.
        DataError: `latest` names no checkpoint.
    """
    path = run_path(path, CHECKPOINTS)
    looks_like_one = _COMMITTED.fullmatch(path.name) or any((path / name).exists() for name in (INDEX_FILE, STATE_FILE))
    if looks_like_one and path.is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        directory = CheckpointDirectory(folder)
        if (folder / LATEST_FILE).is_file() or directory.steps():
            step = directory.latest_step()
            if step >= 0:
                return directory.path_of(step)
    raise ConfigError(
        f"{path}: contains no checkpoint; give the folder of a checkpoint (step_N), a folder of checkpoints with "
        f"`{LATEST_FILE}` in it, or a run folder"
    )
