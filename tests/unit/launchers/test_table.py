"""The commands offer the launchers of this project and of installed packages."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launchers.table import LAUNCHERS, launcher_table, load_launcher
from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import command_app
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[3]
RECIPE = (ROOT / "CONTRIBUTING.md").read_text().partition("### A launcher")[2]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of installed packages with the launcher of CONTRIBUTING.md, and with a launcher whose module is missing."""
    site, info = tmp_path / "site", tmp_path / "site" / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (program,) = re.findall(r"```python\n# launchers/plain\.py, new\n(.*?)```", RECIPE, re.DOTALL)
    (site / "outside_plain.py").write_text(program)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    points = "plain = outside_plain:PlainLauncher\nbroken = outside_gone:Launcher\nlocal = outside_plain:PlainLauncher\n"
    (info / "entry_points.txt").write_text(f"[moe_dist.launchers]\n{points}")
    return site


def test_every_launcher_has_a_command_and_is_examined() -> None:
    for name in LAUNCHERS:
        launcher: Any = load_launcher(name)
        assert callable(launcher.main)
        assert callable(launcher.examine)
    with refused(ConfigError, "'slrum'", *LAUNCHERS, golden=False):
        load_launcher("slrum")


@pytest.mark.parametrize("name", ["local", "slurm", "ray"])
def test_a_finished_run_shows_its_summary_and_needs_no_cluster(
    name: str, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_data, tmp_path / "runs")
    folder = RunFolder.of(config)
    lease = folder.open(config, RankEnv(0, 2, 0, 2, "published", 0, "only"))
    assert folder.write_status(verdict=0, reason="done", last_step=config.train.steps, attempt_id="only")
    lease.release()
    folder.write_summary("all is well\n")
    monkeypatch.setenv("PATH", "")
    shown = CliRunner().invoke(command_app(load_launcher(name).main), [str(write_config(config, tmp_path / "x.yaml"))])
    assert (shown.exit_code, "all is well" in shown.output) == (0, True), shown.output
    assert [each.attempt_id for each in folder.read_status().attempts] == ["only"]


def test_an_installed_package_adds_a_launcher_without_an_import(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))
    assert launcher_table()["plain"] == ("outside_plain:PlainLauncher", "Run by outside.")
    assert launcher_table()["local"] == LAUNCHERS["local"], "no package replaces a launcher of the project"
    assert "outside_plain" not in sys.modules
    with refused(ConfigError, "'broken'", "outside_gone", golden=False):
        load_launcher("broken")


@pytest.mark.slow
def test_all_commands_know_an_installed_launcher(package: Path, tmp_path: Path, tiny_data: Path) -> None:
    config = write_config(tiny_config(tiny_data, tmp_path / "runs"), tmp_path / "x.yaml")
    path = os.pathsep.join([str(ROOT), str(package)])

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        command = [sys.executable, "-m", "moe_dist", *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert re.search(r"plain +Run by outside\.", call("launch", "--help").stdout)
    assert "moe-dist launch plain" in call("explain", "launch.plain").stdout
    doctor = call("doctor", str(config), "--on=plain")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "nodes of the job: not checked" in doctor.stdout
    wrong = call("launch", "plain", str(config), "train.steps=0")
    assert wrong.returncode == ConfigError.exit_code, wrong.stderr
