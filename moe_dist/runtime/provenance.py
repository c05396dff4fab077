"""Records which code ran: commit, uncommitted changes and package versions. Each attempt adds one entry."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moe_dist.config.bundled import VERSION
from moe_dist.config.regular_file import read_regular
from moe_dist.errors import DataError
from moe_dist.runtime.environment import THREADS
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.secrets import without_secrets

PACKAGE = Path(__file__).parents[1]
_GIT_SECONDS = 20.0
SNAPSHOT_JSON, SNAPSHOT_PATCH = ".snapshot.json", ".snapshot.patch"  # files in a snapshot with its clone's `code_state`


def record_provenance(folder: Path, attempt_id: str) -> None:
    """Adds an entry to <folder>/provenance.json, and writes the uncommitted changes to diff_<hash>.patch. Equal diffs share
    one file. Raises DataError if provenance.json is damaged."""
    path = folder / "provenance.json"
    entries = _earlier(path)
    commit, raw, untracked = code_state(PACKAGE)
    # latin-1 preserves bytes that are not valid UTF-8, and ASCII secrets are still found.
    diff = without_secrets(raw.decode("latin-1"), os.environ).encode("latin-1")
    patch = None
    if diff:
        patch = f"diff_{hashlib.sha256(diff).hexdigest()[:12]}.patch"
        write_atomically(folder / patch, diff)  # written before the entry that names the diff
    entries.append(
        {
            "attempt_id": attempt_id,
            "time": time.time(),
            "command": [without_secrets(argument, os.environ) for argument in sys.argv],
            "moe_dist": VERSION,
            "commit": commit,
            "diff": patch,
            "untracked": untracked,
            "python": platform.python_version(),
            "platform": platform.platform(),
            # number of threads of rank 0; bit-equal results need the same number on every rank
            "threads": os.environ.get(THREADS),
            "packages": _packages(),
        }
    )
    write_atomically(path, json.dumps(entries, indent=1) + "\n")


@functools.cache
def _packages() -> dict[str, str]:
    """Returns the version of each installed package by name. Reads all their metadata: 0.1 s for 250 packages."""
    # The attributes `name` and `version` of a distribution would each parse its metadata again.
    found = [each.metadata for each in importlib.metadata.distributions()]
    return {each["Name"]: each["Version"] for each in sorted(found, key=lambda each: each["Name"].lower())}


def _earlier(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(read_regular(path, most_bytes=1 << 26, links=False))  # an attempt adds about 10 KB
        if not isinstance(entries, list):
            raise ValueError(f"it must be a list, not {type(entries).__name__}")
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: damaged ({error}); rename it and start again: the run resumes from its checkpoint, and the versions "
            "of the earlier attempts' code stay in the renamed file"
        ) from error
    return entries


def code_state(code: Path) -> tuple[str | None, bytes, list[str]]:
    """Returns, for the git clone that contains the folder `code`, the commit, the diff against this commit, and the
    untracked files. Returns (None, b"", []) without git, or for an installed package. In a snapshot (a copy of a clone for
    a Slurm job), returns the clone's values, which are stored in the snapshot."""
    if (code.parent / SNAPSHOT_JSON).is_file():
        state = json.loads((code.parent / SNAPSHOT_JSON).read_text())
        return state["commit"], (code.parent / SNAPSHOT_PATCH).read_bytes(), state["untracked"]
    if _git(code, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, b"", []
    commit = _git(code, "rev-parse", "HEAD")
    diff = _git(code, "diff", "HEAD", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "--", ":/")
    untracked = _git(code, "ls-files", "--others", "--exclude-standard", "--full-name", "--", ":/")
    listed = (untracked or b"").decode(errors="replace").splitlines()
    return commit.decode().strip() if commit else None, diff or b"", listed


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Returns the output of a git command; None if it fails. The command takes no lock and never prompts."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},  # never blocks the user's own git
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_SECONDS,  # limits the delay of the start by a slow file system
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
