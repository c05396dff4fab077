"""The srun command of a probe, and its errors."""

import os
import stat
from pathlib import Path

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.doctor.slurm_nodes import run_on_nodes, srun_command
from moe_dist.config.bundled import source_root
from moe_dist.config.cluster import ApptainerContainer, Cluster, GpuSection, NcclVariable
from moe_dist.errors import ResourceError
from tests.support.messages import refused

PLAN = JobPlan((NodePlan(0, (0, 2), "text"), NodePlan(1, (1, 3), "vision")), gpus_per_node=2)


def command(cluster: Cluster, *, tasks_per_node: int = 1) -> list[str]:
    return srun_command(PLAN, cluster, "a.module", '{"folder": "/my runs"}', tasks_per_node=tasks_per_node, minutes=2)


def test_each_kind_of_node_is_a_component_with_the_options_of_the_job() -> None:
    cluster = Cluster(partition="gpu", account="me", gpus=GpuSection(type="h100"), cpus_per_rank=6)
    first, second = " ".join(command(cluster)).split(" : ")
    for part, feature in ((first, "text"), (second, "vision")):
        for option in (
            "--nodes=1",
            "--ntasks=1",
            "--ntasks-per-node=1",
            "--gres=gpu:h100:2",
            "--cpus-per-task=12",
            "--time=2",
        ):
            assert f" {option} " in f" {part} ", option
        assert {f"--constraint={feature}", "--partition=gpu", "--account=me", "--exclusive"} <= set(part.split())
        assert "--signal" not in part


def test_a_task_runs_the_prelude_and_then_python_in_the_container() -> None:
    cluster = Cluster(
        prelude=("module load cuda/12.8",),
        interface="ib0",
        nccl={"NCCL_IB_HCA": NcclVariable(value="=mlx5_0, mlx5_1", reason="storage")},
        container=ApptainerContainer(image="/images/my torch.sif"),
        python="/opt/python",
    )
    script = command(cluster, tasks_per_node=2)[-1].splitlines()
    assert "export NCCL_IB_HCA='=mlx5_0, mlx5_1'" in script
    assert script.index("module load cuda/12.8") < script.index(
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
    )
    assert script[-1].startswith("exec apptainer exec --nv ")
    assert script[-1].endswith("""'/images/my torch.sif' /opt/python -m a.module '{"folder": "/my runs"}'""")


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_mounts_the_runs_folders_and_uses_its_own_python(kind: str) -> None:
    cluster = Cluster.model_validate({"container": {"kind": kind, "image": "/img/torch", "mounts": ("/more:/more:ro",)}})
    asked = srun_command(PLAN, cluster, "a.module", "x", tasks_per_node=1, minutes=2, visible=["/runs", "/data"])
    mounts = [f"{source_root()}:{source_root()}", "/runs:/runs", "/data:/data", "/more:/more:ro"]
    script = asked[-1].splitlines()
    assert script[0] == f"cd {source_root()} || exit 78", "the container may begin elsewhere"
    if kind == "pyxis":
        assert asked.count("--container-image=/img/torch") == 2, "for each kind of node"
        assert asked.count(f"--container-mounts={','.join(mounts)}") == 2
        assert script[-1] == "exec python3 -m a.module x"
    else:
        binds = " ".join(f"--bind={mount}" for mount in mounts)
        assert script[-1] == f"exec apptainer exec --nv {binds} --pwd={source_root()} /img/torch python3 -m a.module x"


def srun(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a script in place of srun."""
    path = folder / "srun"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_lines_come_with_their_time_of_arrival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun(tmp_path, "echo one; echo two", monkeypatch)
    heard = list(run_on_nodes(srun_command(PLAN, Cluster(), "m", "a", tasks_per_node=1, minutes=1), minutes=1))
    assert [line for _, line in heard] == ["one\n", "two\n"]
    assert heard[0][0] <= heard[1][0]


def test_a_refusal_contains_sruns_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun(tmp_path, "echo 'srun: error: Unable to allocate resources: Invalid account' >&2; exit 1", monkeypatch)
    with refused(ResourceError):
        list(run_on_nodes(srun_command(PLAN, Cluster(), "m", "a", tasks_per_node=1, minutes=1), minutes=1))


def test_a_job_that_does_not_end_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun(tmp_path, "trap 'echo gone > \"$0.gone\"; exit 143' TERM; sleep 60 >/dev/null 2>&1 & wait", monkeypatch)
    monkeypatch.setattr("launchers.doctor.slurm_nodes.START_SECONDS", 0.5)
    with refused(ResourceError):
        list(run_on_nodes(srun_command(PLAN, Cluster(), "m", "a", tasks_per_node=1, minutes=0), minutes=0))
    assert (tmp_path / "srun.gone").exists()
