"""Runs the commands of a documentation page as written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = {"moe-dist": f"{sys.executable} -m moe_dist", "python": sys.executable}


def guide_commands(page: str, heading: str) -> list[str]:
    """Returns the commands of the first console block below a heading, one string per command."""
    part = (ROOT / "docs" / page).read_text().partition(f"{heading}\n")[2].partition("```console\n")[2]
    lines = re.sub(r"\\\n\s*", "", part.partition("```")[0]).splitlines()
    assert lines, f"docs/{page} has no commands below {heading}"
    assert all(line.startswith("$ ") for line in lines), lines
    return [line.removeprefix("$ ") for line in lines]


def run_commands(commands: Sequence[str], folder: Path) -> None:
    """Runs commands in the folder with this Python. Fails with the output of the first command that fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands:
        line = re.sub("^(moe-dist|python) ", lambda found: f"{PROGRAMS[found[1]]} ", command)
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def text_losses(run: Path) -> list[float]:
    """Returns the training loss of text in each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["losses"]["text"] for record in records if "losses" in record]
