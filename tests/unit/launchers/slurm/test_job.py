"""The srun step that one attempt of a Slurm job prepares, without Slurm."""

import sys
from pathlib import Path

import pytest

from launchers.slurm.job import visible_folders
from launchers.slurm.script import interpreter
from launchers.snapshot import CodeSnapshot
from moe_dist.config.cluster import Cluster
from tests.support.tiny import tiny_config


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
