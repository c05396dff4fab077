"""The srun step that one attempt of a Slurm job prepares, without Slurm."""

import sys
from pathlib import Path

import pytest

from launchers.command import TRAIN, one_node
from launchers.slurm.job import _read_clone, _step, visible_folders
from launchers.slurm.nodes import Allocation, GivenPart
from launchers.slurm.script import interpreter
from launchers.slurm.step import SlurmJob
from launchers.snapshot import CodeSnapshot
from moe_dist.config.cluster import Cluster
from tests.support.tiny import tiny_config, write_config


def test_a_container_sees_run_snapshot_data_and_the_weights_to_begin_with(tmp_path: Path) -> None:
    weights, snapshot = tmp_path / "weights", CodeSnapshot(tmp_path / "runs" / "tiny" / "slurm" / "x")
    config = tiny_config(tmp_path / "data", tmp_path / "runs", {"run.init_from": str(weights)})
    seen = [str(tmp_path / "runs" / "tiny"), str(snapshot.folder), str(tmp_path / "data")]
    assert visible_folders(config, snapshot) == seen, "a folder that is gone cannot be mounted"
    weights.mkdir()
    assert visible_folders(config, snapshot) == [*seen, str(weights)]


@pytest.mark.parametrize("kind", ["none", "pyxis", "apptainer"])
def test_a_container_has_a_python_of_its_own(kind: str) -> None:
    container = {"kind": kind} if kind == "none" else {"kind": kind, "image": "x"}
    brought = interpreter(Cluster.model_validate({"container": container}))
    assert brought == (sys.executable if kind == "none" else "python3")
    assert interpreter(Cluster.model_validate({"container": container, "python": "/opt/python"})) == "/opt/python"


def test_the_cpus_of_a_rank_reach_srun_and_its_threads(tmp_path: Path, tiny_data: Path) -> None:
    """From the cluster file, or from `sbatch --cpus-per-task=3 slurm/train.sbatch ...`, which srun does not inherit."""
    config = tiny_config(tiny_data, tmp_path / "runs")
    path, job = write_config(config, tmp_path / "tiny.yaml"), SlurmJob("7", 0, None, tmp_path)
    assert _read_clone(job, [str(path)], {})[0].cpus_per_rank is None
    cluster, config = _read_clone(job, [str(path)], {"SLURM_CPUS_PER_TASK": "3"})
    snapshot = CodeSnapshot(tmp_path)
    command = _step(
        job,
        snapshot,
        config,
        cluster,
        plan=one_node(2),
        allocation=Allocation((GivenPart(("n1",), (2,), 0),), {"n1": ""}),
        program=TRAIN,
    )
    assert "--cpus-per-task=3" in command
    assert "OMP_NUM_THREADS=3" in (tmp_path / "job_7_0.sh").read_text()
