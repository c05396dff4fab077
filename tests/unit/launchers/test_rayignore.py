"""Ray's own code reads .rayignore and .gitignore, and shows which files of this clone Ray would copy."""

import subprocess
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

ROOT = Path(__file__).parents[3]


def is_left_out(path: str) -> bool:
    return any(excludes(ROOT / path) for excludes in get_excludes_from_ignore_files(ROOT, include_gitignore=True))


@pytest.mark.parametrize(
    "path", [".git", ".venv", ".cache", "data", "runs", "runs/default/metrics.jsonl", ".cache/data/x.bin"]
)
def test_data_runs_environments_and_history_are_not_shipped(path: str) -> None:
    assert is_left_out(path)


def test_all_code_and_configuration_is_shipped() -> None:
    listed = ["git", "ls-files", "launchers", "moe_dist", "configs", "slurm", "tools", "tests"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "moe_dist/data/loader.py" in tracked  # code in a folder called data is shipped
    assert [path for path in tracked if is_left_out(path)] == []
