"""Copies a job's code, configuration and cluster file at its submission. Every attempt of the job runs this copy, so that
later changes of the clone do not affect a waiting job.

    <folder>/code/          tracked files with their uncommitted changes, and untracked source files
    <folder>/config.yaml    resolved, with absolute paths
    <folder>/cluster.yaml, sweep.txt, train.sbatch
"""

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.bundled import source_root
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.load import resolved_yaml
from moe_dist.config.schema import Config
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import ConfigError
from moe_dist.runtime.provenance import SNAPSHOT_JSON, SNAPSHOT_PATCH, code_state

_PARTS = ("moe_dist", "launchers", "slurm", "tools", "configs")  # folders to copy if git is missing
_NEW_CODE = (".py", ".sh", ".sbatch", ".yaml")  # suffixes of untracked files that are copied


@dataclass(frozen=True)
class CodeSnapshot:
    """The snapshot of one job, in a folder that all nodes share."""

    folder: Path

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def config_yaml(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def script(self) -> Path:
        """The batch script; `sbatch` with this file submits the same job again."""
        return self.folder / "train.sbatch"

    def cluster(self) -> Cluster:
        return load_cluster(str(self.folder / "cluster.yaml"), {})

    def overrides_of(self, task: int | None) -> tuple[str, ...]:
        """Returns the overrides of one array task, whose run folder is `<root>/<name>/<task>`; empty for None (no array).
        Raises ConfigError if the sweep has no such task."""
        if task is None:
            return ()
        sweep = read_sweep(self.folder / "sweep.txt")
        if not 0 <= task < len(sweep):
            raise ConfigError(f"array task {task}: the sweep file has the tasks 0 to {len(sweep) - 1}")
        return sweep[task]


def take_snapshot(
    folder: Path, config: Config, cluster: Cluster, *, sweep: Sequence[Sequence[str]] = (), clone: Path | None = None
) -> CodeSnapshot:
    """Writes a snapshot atomically; copies a few MB from `clone`, by default from `code_folder`. Raises OSError if the disk
    is full or the folder is not writable."""
    clone = clone or code_folder()
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        for name in _code_files(clone):
            target = new / "code" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(clone / name, target, follow_symlinks=False)  # keeps modes, so that scripts stay executable
        commit, diff, untracked = code_state(clone / "moe_dist")
        (new / "code" / SNAPSHOT_JSON).write_text(json.dumps({"commit": commit, "untracked": untracked}))
        (new / "code" / SNAPSHOT_PATCH).write_bytes(diff)
        (new / "config.yaml").write_text(resolved_yaml(config))
        (new / "cluster.yaml").write_text(dump_yaml(cluster.model_dump(mode="json")))
        (new / "sweep.txt").write_text("".join(f"{shlex.join(overrides)}\n" for overrides in sweep))
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return CodeSnapshot(folder)


def code_folder() -> Path:
    """Returns the folder with the code of this installation, in the layout of a clone: the clone itself or, if moe_dist is
    an installed package, a copy in ./.moe_dist. Slurm jobs run a snapshot of this folder, Ray copies it to the nodes, and
    the doctor's Slurm tasks run in it."""
    root = source_root()
    if (root / "moe_dist").is_dir():
        return root
    # RECORD lists the hash of every installed file, so that each installation gets its own folder.
    record = importlib.metadata.distribution("moe_dist").read_text("RECORD") or ""
    folder = Path.cwd() / ".moe_dist" / f"code-{hashlib.sha256(record.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        shutil.copytree(root, new, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(root.parent, new / "moe_dist", ignore=shutil.ignore_patterns("__pycache__", root.name))
        with contextlib.suppress(OSError):  # raised if another command made the folder first
            new.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
    return folder


def read_sweep(path: Path) -> list[tuple[str, ...]]:
    """Reads the overrides of each array task: one line per task, with shell quoting; `#` begins a comment. Raises
    ConfigError if the file cannot be read, has an unclosed quote, or has no task."""
    try:
        lines = [shlex.split(line, comments=True) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"sweep file {path}: {error}; write one line of key=value for each task") from error
    if not (tasks := [tuple(line) for line in lines if line]):
        raise ConfigError(f"sweep file {path}: has no task; write one line of key=value for each task")
    return tasks


def _code_files(clone: Path) -> list[str]:
    """Returns the paths of the files to copy, relative to the clone."""

    def listed(*options: str) -> list[str] | None:
        command = ["git", "-C", str(clone), "ls-files", "-z", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else None

    if (clone / ".git").exists() and (tracked := listed("--cached")) is not None:
        untracked = [name for name in listed("--others", "--exclude-standard") or [] if name.endswith(_NEW_CODE)]
        return [name for name in (*tracked, *untracked) if (clone / name).is_file()]
    found = [path for part in _PARTS for path in (clone / part).rglob("*") if path.is_file()]
    return [str(path.relative_to(clone)) for path in found if "__pycache__" not in path.parts]
