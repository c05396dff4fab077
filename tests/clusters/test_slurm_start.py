"""Starts on a real Slurm: without a launcher of moe_dist, and with ranks that come far apart."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.runtime.run_folder import RunFolder
from tests.support.slurm import SlurmCluster
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.timeout(900)
LATE_SECONDS = 75  # longer than a file may need to be seen on another node


def tiny(data: Path, folder: Path, **changes: Any) -> tuple[Path, RunFolder]:
    config = tiny_config(data, folder / "runs", {"train.steps": 2, "parallel.timeout_seconds": 300.0, **changes})
    return write_config(config, folder / "tiny.yaml"), RunFolder.of(config)


def threads(run: RunFolder) -> str:
    (entry,) = json.loads((run.path / "provenance.json").read_text())
    return entry["threads"]


def test_plain_srun_starts_one_run_on_its_nodes(slurm: SlurmCluster, tiny_data: Path, tmp_path: Path) -> None:
    path, run = tiny(tiny_data, tmp_path)
    wrap = shlex.join(["srun", sys.executable, "-m", "moe_dist.train", str(path)])
    job = slurm.sbatch("--nodes=2", "--ntasks=2", f"--wrap={wrap}", output=tmp_path / "out.txt")
    assert job.end() == 0, job.said
    (attempt,) = run.read_status().attempts
    assert (attempt.attempt_id, attempt.verdict, attempt.last_step) == (f"srun-{job.number}.0-0", 0, 2)
    assert threads(run) == "1", "each node has given the job one core"


def test_a_rank_that_starts_late_is_waited_for_by_name(slurm: SlurmCluster, tiny_data: Path, tmp_path: Path) -> None:
    path, run = tiny(tiny_data, tmp_path)
    prelude = [f'[ "$RANK" != 0 ] || sleep {LATE_SECONDS}']
    site = tmp_path / "site.yaml"
    values = {"gpus": {"syntax": "none"}, "ranks_per_node": 1, "cpus_per_rank": 2, "time": "30", "prelude": prelude}
    site.write_text(yaml.safe_dump(values))
    job = slurm.launch(str(path), f"--cluster={site}")
    assert job.end() == 0, job.said
    assert "waiting for rank 0, whose address must come into" in run.log_of(1).read_text()
    assert threads(run) == "2", "the CPUs of a rank are its threads"
