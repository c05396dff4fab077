"""The folder of a run's checkpoints: which there are, which one `latest` names, and what may go. Imports no torch."""

import contextlib
import logging
import re
import shutil
from pathlib import Path

from moe_dist.checkpoint.index import INDEX_FILE
from moe_dist.checkpoint.state_file import STATE_FILE
from moe_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"
NONE_YET = b"none\n"  # what `latest` holds from the beginning of the first save to its end

_COMMITTED = re.compile(r"step_(\d{1,18})")
_POINTER = re.compile(rb"(step_\d{1,18})\n?")
_LEFTOVER = re.compile(r"(step_\d+|latest)\.[0-9a-f]+\.(tmp|removed)")


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None where its name says nothing about it."""
    match = _COMMITTED.fullmatch(folder.absolute().name)
    return int(match[1]) if match else None


class CheckpointDirectory:
    """The checkpoints in a folder.

    Args:
        folder: It need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = (step_of(path) for path in self.folder.iterdir() if path.is_dir())
        return sorted(step for step in found if step is not None)

    def latest_step(self) -> int:
        """Step that `latest` names; -1 where nothing was saved yet.

        Raises:
            DataError: it names no checkpoint in this folder, or is missing though there are some.
        """
        path = self.folder / LATEST_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if self.steps():
                raise DataError(
                    f"{path} is missing, but there are checkpoints beside it; nothing is begun anew over them. {self.fix()}"
                ) from None
            return -1
        if content == NONE_YET:
            return -1
        match = _POINTER.fullmatch(content)
        name = match[1].decode() if match else content.decode(errors="replace").strip()
        if match is None or not (self.folder / name / STATE_FILE).is_file():
            raise DataError(f"{path} names {name!r}, which is no checkpoint in that folder. {self.fix()}")
        return int(name.removeprefix("step_"))

    def fix(self, failed: Path | None = None) -> str:
        """How to go on without the checkpoint that failed, as a sentence: the others that are there."""
        others = [self.path_of(step).name for step in self.steps() if self.path_of(step) != failed]
        if not others:
            return "There is no other checkpoint in that folder: start with --overwrite, or choose another run.name."
        pointer = self.folder / LATEST_FILE
        return f"There are {', '.join(others)}: to go on from the newest, `echo {others[-1]} > {pointer}` and start again."

    def remove_beyond(self, keep: int, step: int) -> None:
        """Removes committed checkpoints up to `step` but for the last `keep`. The save stands already: a failure here is
        only reported."""
        try:
            for old in [each for each in self.steps() if each <= step][:-keep]:
                # Renamed first: what is half removed never looks like a checkpoint.
                self.path_of(old).rename(self.folder / f"step_{old}.0.removed")
            self.remove_leftovers()
        except OSError as error:
            logger.warning("cannot remove old checkpoints in %s: %s", self.folder, error)

    def remove_leftovers(self) -> None:
        """Removes what crashes and `remove_beyond` left. Only the holder of the lease may: others' files look the same."""
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # a writer that lost the lease removes its own as well
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user's path means: its own folder, or the newest of a run or of a folder of checkpoints.

    Raises:
        ConfigError: there is none.
        DataError: `latest` there names none.
    """
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
        f"{path}: no checkpoint there; give the folder of one (step_N), a folder of checkpoints with `{LATEST_FILE}` in "
        "it, or the folder of a run"
    )
