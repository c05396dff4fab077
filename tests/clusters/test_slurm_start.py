"""Runs start on a real Slurm by plain `srun`. They also start if one rank begins long after the other ranks."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.runtime.run_folder import RunFolder
from tests.support.notebooks import TUTORIALS, run_tutorial
from tests.support.shape import drawn
from tests.support.slurm import ROOT, SlurmCluster
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.timeout(900)


def tiny(data: Path, folder: Path, **changes: Any) -> tuple[Path, RunFolder]:
    config = tiny_config(data, folder / "runs", {"train.steps": 2, "parallel.timeout_seconds": 300.0, **changes})
    return write_config(config, folder / "tiny.yaml"), RunFolder.of(config)


def threads(run: RunFolder) -> str:
    (entry,) = json.loads((run.path / "provenance.json").read_text())
    return entry["threads"]


def test_plain_srun_starts_one_run_on_its_nodes(slurm: SlurmCluster, tiny_data: Path, tmp_path: Path) -> None:
    path, run = tiny(tiny_data, tmp_path)
    late = "\n".join([*drawn().late, f"exec {shlex.join([sys.executable, '-m', 'moe_dist.train', str(path)])}"])
    wrap = shlex.join(["srun", "bash", "-c", late])
    job = slurm.sbatch("--nodes=2", "--ntasks=2", f"--wrap={wrap}", output=tmp_path / "out.txt")
    assert job.end() == 0, job.said
    (attempt,) = run.read_status().attempts
    assert (attempt.attempt_id, attempt.verdict, attempt.last_step) == (f"srun-{job.number}.0-0", 0, 2)
    assert threads(run) == "1", "each node has given the job one core"


@pytest.mark.exhaustive
def test_a_rank_that_starts_late_is_waited_for_by_name(slurm: SlurmCluster, tiny_data: Path, tmp_path: Path) -> None:
    path, run = tiny(tiny_data, tmp_path)
    late, cpus = drawn().late_rank, drawn().late_cpus
    site = tmp_path / "site.yaml"
    prelude = [f'[ "$RANK" != {late} ] || sleep {drawn().late_seconds}']
    site.write_text(drawn().site(cpus_per_rank=cpus, prelude=json.dumps(prelude)))
    job = slurm.launch(str(path), f"--cluster={site}")
    assert job.end() == 0, job.said
    missing = "rank 1 since" if late else "rank 0, whose address must come into"
    assert f"waiting for {missing}" in run.log_of(1 - late).read_text()
    assert threads(run) == str(cpus), "the CPUs of a rank are its threads"


@pytest.mark.exhaustive
def test_the_tutorial_runs(slurm: SlurmCluster, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(site.read_text())
    (tmp_path / "data").symlink_to(ROOT / ".cache" / "data" / "openmoji")
    for name, value in slurm.variables.items():
        monkeypatch.setenv(name, value)
    run_tutorial(TUTORIALS / "slurm.ipynb", tmp_path, monkeypatch)
    assert RunFolder(tmp_path / "runs" / "tutorial").read_status().attempts[-1].last_step == 40
