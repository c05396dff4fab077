"""docs/scaling.md: every dry run on the page runs as written, with the tiny data in place of the default job's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()
STAGES = ("4 ranks on a CPU", "1 GPU", "8 GPUs, one node", "64 GPUs, 8 nodes")
COMMANDS = [
    line.removeprefix("$ python ") for line in GUIDE.splitlines() if line.startswith("$ python") and "--dry-run" in line
]


def test_each_stage_has_a_dry_run_and_says_what_to_check_and_what_goes_wrong() -> None:
    for stage in STAGES:
        (text,) = re.findall(rf"^## {stage}\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL)
        for part in ("| key | value | why |", "--dry-run", "**Check**", "**Goes wrong:**"):
            assert part in text, f"{stage}: {part}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_of_the_guide(command: str, tiny_data: Path) -> None:
    words = shlex.split(command)
    mixtral = any("mixtral" in word for word in words)
    data = [] if mixtral else [f"data.path={tiny_data}", "data.weights={}"]
    at = words.index("--dry-run")
    done = subprocess.run(
        [sys.executable, *words[:at], *data, *words[at:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    overrides = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    ranks = int(overrides.get("parallel.ep", 1)) * int(overrides.get("parallel.edp", 1))
    if "launchers.slurm" in words:
        assert f"#SBATCH --ntasks={ranks}\n" in done.stdout
    elif not mixtral and "tiny_cpu" not in command:
        assert f": {ranks} ranks (ep" in done.stdout


def test_every_configuration_that_is_named_is_there() -> None:
    for name in set(re.findall(r"configs/[\w/]+\.yaml", GUIDE)):
        assert (ROOT / name).is_file(), name
