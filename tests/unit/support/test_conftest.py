"""A skipped test that could have run is a failure under CI=true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = "@pytest.mark.skip(reason='x')"
MODULE = "pytest.importorskip('a_package_that_is_not_there')"


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
def test_skips_under_ci(tmp_path: Path, mark: str, ci: str, workers: int, code: int) -> None:
    (tmp_path / "test_skips.py").write_text(f"import pytest\n{mark}\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", str(tmp_path), str(tmp_path)]
    root = Path(__file__).parents[3]
    # Without the variables by which a worker knows what it is: the pytest started here may run on one itself.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["-n", str(workers)]
    done = subprocess.run(command, env={**inherited, "CI": ci}, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
