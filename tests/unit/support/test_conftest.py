"""A skipped test that could have run is a failure under CI=true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONE_TEST = "import pytest\n{mark}\ndef test_it(): pass\n"


@pytest.mark.parametrize(
    ("source", "ci", "code"),
    [
        (ONE_TEST.format(mark="@pytest.mark.skip(reason='x')"), "true", 1),
        (ONE_TEST.format(mark="pytest.importorskip('a_package_that_is_not_there')"), "true", 2),
        (ONE_TEST.format(mark="@pytest.mark.needs_hardware\n@pytest.mark.skip(reason='x')"), "true", 0),
        (ONE_TEST.format(mark="@pytest.mark.skip(reason='x')"), "", 0),
    ],
    ids=["test", "module", "hardware", "no CI"],
)
def test_skips_under_ci(tmp_path: Path, source: str, ci: str, code: int) -> None:
    (tmp_path / "test_skips.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", str(tmp_path), str(tmp_path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env={**os.environ, "CI": ci}, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
