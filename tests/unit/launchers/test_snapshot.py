"""A job runs the code that its clone had when the job was submitted."""

import subprocess
from pathlib import Path

import pytest

from launchers.snapshot import read_sweep, take_snapshot
from moe_dist.config.cluster import Cluster
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from moe_dist.runtime.provenance import code_state
from tests.support.messages import refused
from tests.support.tiny import tiny_config


def git(clone: Path, *arguments: str) -> str:
    command = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A small clone with an uncommitted change, a new file, and files that are no code."""
    clone = tmp_path / "clone"
    for name in ("moe_dist/__init__.py", "launchers/x.py", "slurm/node_env.sh"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("old\n")
    (clone / ".gitignore").write_text("runs/\n")
    git(clone, "init", "-q")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "all")
    (clone / "launchers" / "x.py").write_text("new\n")
    (clone / "moe_dist" / "added.py").write_text("added\n")
    (clone / "core.dump").write_text("big\n")
    (clone / "runs").mkdir()
    (clone / "runs" / "y.py").write_text("no\n")
    return clone


def test_a_snapshot_keeps_code_with_changes_and_its_commit(clone: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", clone / "runs")
    snapshot = take_snapshot(tmp_path / "kept", config, Cluster(account="me"), clone=clone)
    (clone / "launchers" / "x.py").write_text("newer\n")
    assert (snapshot.code / "launchers" / "x.py").read_text() == "new\n"
    assert (snapshot.code / "moe_dist" / "added.py").read_text() == "added\n"
    assert not (snapshot.code / "runs").exists()
    assert not (snapshot.code / "core.dump").exists()
    assert load_config(snapshot.config_yaml) == config
    assert snapshot.cluster() == Cluster(account="me")
    commit, diff, untracked = code_state(snapshot.code / "moe_dist")
    assert commit == git(clone, "rev-parse", "HEAD")
    assert b"+new" in diff, "provenance of a run from a snapshot is that of the clone"
    assert "moe_dist/added.py" in untracked


def test_a_folder_without_git_is_kept_by_its_parts(clone: Path, tmp_path: Path) -> None:
    (clone / ".git").rename(tmp_path / "elsewhere")
    (clone / "moe_dist" / "__pycache__").mkdir()
    (clone / "moe_dist" / "__pycache__" / "x.pyc").write_text("")
    snapshot = take_snapshot(tmp_path / "kept", tiny_config(tmp_path, tmp_path), Cluster(), clone=clone)
    kept = {str(path.relative_to(snapshot.code)) for path in snapshot.code.rglob("*") if path.is_file()}
    assert {"moe_dist/added.py", "launchers/x.py", "slurm/node_env.sh"} <= kept
    assert not [name for name in kept if "pycache" in name or name == "core.dump"]
    assert code_state(snapshot.code / "moe_dist") == (None, b"", [])


def test_nothing_is_left_of_a_snapshot_that_fails(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("in the way")
    with refused(OSError):
        take_snapshot(tmp_path / "kept", tiny_config(tmp_path, tmp_path), Cluster(), clone=clone)
    assert not list(tmp_path.glob(".kept*"))


def test_a_sweep_has_a_line_of_overrides_a_task(clone: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# rates\noptimizer.lr=1e-3  # low\n\nrun.seed=1 data.weights='{a: 1, b: 2}'\n")
    tasks = read_sweep(sweep)
    assert tasks == [("optimizer.lr=1e-3",), ("run.seed=1", "data.weights={a: 1, b: 2}")]
    snapshot = take_snapshot(tmp_path / "kept", tiny_config(tmp_path, tmp_path), Cluster(), sweep=tasks, clone=clone)
    assert [snapshot.overrides_of(task) for task in (None, 1)] == [(), tasks[1]]
    with refused(ConfigError):
        snapshot.overrides_of(2)


@pytest.mark.parametrize(("text", "words"), [("# nothing\n", "has no task"), ("a='b\n", "No closing quotation")])
def test_a_sweep_that_cannot_be_read_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_sweep(tmp_path / "s.txt")
