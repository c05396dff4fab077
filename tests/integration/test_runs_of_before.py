"""Run folders and checkpoints written by commit e0d2e61 (tests/data/run_of_e0d2e61) load, and continue bit for bit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.config.load import load_config, load_stored_config, resolved_yaml
from moe_dist.errors import ConfigError
from moe_dist.inference.loaded_run import find_trained
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.train.start.resume import saved_config
from tests.support.cover import exhaustive, full
from tests.support.tiny import tiny_dataset
from tools import compare_runs, inspect_checkpoint, verify_checkpoint
from tools.compare_runs import first_difference

ROOT = Path(__file__).parents[2]
WRITTEN = ROOT / "tests/data/run_of_e0d2e61"
NAMES = ("top_k", "expert_choice")
STEPS = 7


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copies a run folder, and writes its data beside it."""
    tiny_dataset(tmp_path / "data")
    folder = tmp_path / "runs" / request.param
    shutil.copytree(WRITTEN / request.param, folder)
    (folder / "continued.jsonl").unlink()
    return folder


def places(run: Path) -> list[str]:
    return [f"data.path={run.parents[1] / 'data'}", f"run.root={run.parent}", f"train.steps={STEPS}"]


def rounding() -> float:
    """Returns the allowed difference: 0 with the torch, CPU kernels and CPU vendor that wrote the folders, otherwise
    1e-4. MKL chooses its kernels by vendor."""
    written = json.loads((WRITTEN / "written_with.json").read_text())
    vendor = re.search(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text())
    here = {
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor and vendor[1],
    }
    return 0.0 if here == written else 1e-4


def continued(written: Path) -> list[dict[str, Any]]:
    """Returns the records of the run that the earlier commit continued, with today's name of mixture of depths."""
    text = (written / "continued.jsonl").read_text().replace('"depths', '"mixture_of_depths')
    return [json.loads(line) for line in text.splitlines()]


def said(command: Any, *arguments: object) -> str:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("run", [full("top_k"), exhaustive("expert_choice")], indirect=True)
def test_it_goes_on_to_the_same_bits(run: Path) -> None:
    config = run.parents[1] / "today.yaml"
    config.write_text(resolved_yaml(load_stored_config(run / "config.yaml")))
    command = [sys.executable, "-m", "launchers.local", str(config), *places(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [*read_lines(WRITTEN / run.name / "metrics.jsonl"), *continued(WRITTEN / run.name)]
    found = list(read_lines(run / "metrics.jsonl"))
    assert [(line["step"], line["kind"]) for line in found] == [(line["step"], line["kind"]) for line in expected]
    difference, same = first_difference(expected, found, rtol=rounding())
    assert difference is None, difference
    assert same == len(expected)
    assert "6 lines, no difference" in said(compare_runs.main, run, WRITTEN / run.name, f"--rtol={rounding()}")


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_commands_read_it(run: Path) -> None:
    said(verify_checkpoint.main, run)
    assert "4 of them by the optimizer" in said(inspect_checkpoint.main, run)
    values = open_checkpoint(run / "checkpoints/step_4").state.values
    assert saved_config(values, run) == load_stored_config(run / "config.yaml")
    trained = find_trained(run, data=run.parents[1] / "data")
    model = trained.load(torch.device("cpu"))
    tokens = torch.arange(8)[None]
    logits, _ = model(tokens, tokens, torch.zeros_like(tokens), torch.zeros_like(tokens))
    assert logits.isfinite().all()


@pytest.mark.parametrize("run", NAMES, indirect=True)
def test_it_is_the_same_configuration_and_a_users_file_needs_the_new_names(run: Path) -> None:
    stored = run / "config.yaml"
    assert RunFolder(run).inspect(load_stored_config(stored)) is not Start.NEW
    with pytest.raises(ConfigError, match=r"unknown key|must be one of|belongs to"):
        load_config(stored)
