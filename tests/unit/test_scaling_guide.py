"""Every dry run in docs/scaling.md and docs/launching.md runs as written. Those of docs/launching.md need no data."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import launchers.slurm.__main__
import moe_dist.train.__main__
from tests.support.invoked import invoke

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()


def dry_runs(page: str) -> list[str]:
    return [line.removeprefix("$ python -m ") for line in page.splitlines() if re.match(r"\$ python .*--dry-run", line)]


MODULES = {"moe_dist.train": moe_dist.train.__main__.main, "launchers.slurm": launchers.slurm.__main__.main}


@pytest.mark.parametrize("command", dry_runs(GUIDE))
def test_a_dry_run_of_the_guide(command: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module, *words = shlex.split(command)
    published = "mixtral" in command  # the published run's data are not available
    at = words.index("--dry-run")
    data = [] if published else [f"data.path={tiny_data}", "data.weights={}"]
    result = invoke(MODULES[module], *words[:at], *data, *words[at:], code=0)
    overrides = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    ranks = int(overrides.get("parallel.ep", 1)) * int(overrides.get("parallel.edp", 1))
    if module == "launchers.slurm":
        assert f"#SBATCH --ntasks={ranks}\n" in result.output
    elif "small" in command:
        assert f": {ranks} ranks (ep" in result.output


@pytest.mark.parametrize("command", dry_runs((ROOT / "docs/launching.md").read_text()))
def test_a_dry_run_of_launching_needs_no_data(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    module, *words = shlex.split(command)
    invoke(MODULES[module], *words, code=0)
