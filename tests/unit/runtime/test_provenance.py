"""Tests the code version that a run records in a clone, in a changed clone, and outside a clone."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from moe_dist.runtime.provenance import code_state, record_provenance


def git(folder: Path, *arguments: str) -> str:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *arguments]
    return subprocess.run(
        command, env={**os.environ, **identity}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Returns a clone with a package `code` and a commit."""
    clone = tmp_path / "clone"
    (clone / "code").mkdir(parents=True)
    (clone / "code" / "__init__.py").write_text("a = 1\n")
    (clone / "top.py").write_text("b = 1\n")
    git(clone, "init", "-q")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "x")
    return clone


def test_a_clean_clone_is_its_commit(clone: Path) -> None:
    assert code_state(clone / "code") == (git(clone, "rev-parse", "HEAD"), b"", [])


def test_changes_anywhere_in_the_clone_are_in_the_diff_and_new_files_are_named(clone: Path) -> None:
    (clone / "top.py").write_text("b = 2\n")
    (clone / "new.py").write_text("c = 3\n")
    commit, diff, untracked = code_state(clone / "code")
    assert commit == git(clone, "rev-parse", "HEAD")
    assert untracked == ["new.py"]
    git(clone, "checkout", "-q", "--", "top.py")
    subprocess.run(["git", "-C", str(clone), "apply"], input=diff, check=True)
    assert (clone / "top.py").read_text() == "b = 2\n"


def test_an_installed_package_has_no_commit_even_inside_somebody_elses_clone(clone: Path) -> None:
    installed = clone / "venv" / "code"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert code_state(installed) == (None, b"", [])


def test_each_attempt_adds_an_entry_and_equal_diffs_are_kept_once(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_dist.runtime.provenance.PACKAGE", clone / "code")
    folder = tmp_path / "run"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    folder.mkdir()
    record_provenance(folder, "clean")
    (clone / "top.py").write_text("b = 2\n")
    record_provenance(folder, "dirty")
    record_provenance(folder, "dirty again")
    entries = json.loads((folder / "provenance.json").read_text())
    assert [entry["attempt_id"] for entry in entries] == ["clean", "dirty", "dirty again"]
    assert {entry["threads"] for entry in entries} == {"3"}
    assert entries[0]["diff"] is None
    assert entries[1]["diff"] == entries[2]["diff"]
    assert [path.name for path in folder.glob("*.patch")] == [entries[1]["diff"]]
    assert b"+b = 2" in (folder / entries[1]["diff"]).read_bytes()
