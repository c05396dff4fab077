"""With CI=true, a skipped test that could have run fails."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport

SKIPPED = "@pytest.mark.skip(reason='x')"
MODULE = "pytest.importorskip('a_package_that_is_not_there')"


def outcome_of(hook: Generator[None, Any, Any]) -> str:
    """Returns the outcome that a hook gives to the report of a skipped test or module."""
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(SimpleNamespace(skipped=True, outcome="skipped", longrepr="x"))
    return ended.value.value.outcome


@pytest.mark.parametrize(("ci", "mark", "outcome"), [
    ("true", None, "failed"),
    ("true", "needs_hardware", "skipped"),
    ("", None, "skipped"),
])  # fmt: skip
def test_a_skip_is_a_failure_under_ci(monkeypatch: pytest.MonkeyPatch, ci: str, mark: str | None, outcome: str) -> None:
    monkeypatch.setenv("CI", ci)
    item: Any = SimpleNamespace(get_closest_marker=lambda name: name == mark or None)
    assert outcome_of(pytest_runtest_makereport(item, None)) == outcome  # pyright: ignore[reportArgumentType]
    if mark is None:
        assert outcome_of(pytest_make_collect_report(None)) == outcome  # pyright: ignore[reportArgumentType]


@pytest.mark.full
@pytest.mark.parametrize(
    ("mark", "ci", "workers", "code"),
    [
        (SKIPPED, "true", 0, 1),
        (MODULE, "true", 0, 2),
        ("@pytest.mark.needs_hardware\n" + SKIPPED, "true", 0, 0),
        (SKIPPED, "", 0, 0),
        (SKIPPED, "true", 1, 1),
        (MODULE, "true", 1, 1),
    ],
    ids=["test", "module", "hardware", "no CI", "test on a worker", "module on a worker"],
)
def test_the_exit_code_of_pytest(tmp_path: Path, mark: str, ci: str, workers: int, code: int) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs_hardware\n")
    (tmp_path / "test_skips.py").write_text(f"import pytest\n{mark}\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", str(tmp_path), str(tmp_path)]
    root = Path(__file__).parents[3]
    # Removes pytest-xdist's variables, because this test may itself run on a worker.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["-n", str(workers)]
    done = subprocess.run(command, env={**inherited, "CI": ci}, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
