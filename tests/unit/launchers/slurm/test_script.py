"""Tests the batch script's options and the rank table, as text and in bash."""

import os
import subprocess
from pathlib import Path

import pytest

from launchers.command import PUBLISHED_RENDEZVOUS, JobPlan, LaunchPlan, NodePlan
from launchers.slurm.script import (
    LINGER_SECONDS,
    TRAIN_SBATCH,
    part_options,
    parts,
    rank_table,
    sbatch_line,
    script,
    srun_command,
)
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ConfigError
from moe_dist.monitor.sinks import sink
from moe_dist.monitor.trace import writer
from tests.support.messages import refused
from tests.support.stand_ins import stand_in

ROOT = Path(__file__).parents[4]
ONE_KIND = JobPlan((NodePlan(0, (0, 1)), NodePlan(1, (2, 3))))
TWO_KINDS = JobPlan(
    (NodePlan(0, (0, 2), feature="text"), NodePlan(1, (1,), feature="vision"), NodePlan(2, (3, 4), feature="text")), 8
)


@pytest.mark.parametrize(
    ("gpus", "option"),
    [
        ({"syntax": "gres"}, "--gres=gpu:8"),
        ({"syntax": "gres", "type": "h100"}, "--gres=gpu:h100:8"),
        ({"syntax": "gpus-per-node", "type": "h100"}, "--gpus-per-node=h100:8"),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants_it(gpus: dict[str, str], option: str) -> None:
    cluster = Cluster.model_validate({"gpus": gpus, "cpus_per_rank": 12})
    assert part_options(parts(TWO_KINDS)[1], TWO_KINDS, cluster) == [
        "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=12", option, "--constraint=vision",
        "--exclusive",
    ]  # fmt: skip
    assert not [each for each in part_options(parts(ONE_KIND)[0], ONE_KIND, cluster) if "gpu" in each]


def test_the_script_contains_all_options_and_quotes_values() -> None:
    cluster = Cluster(account="proj", partition="gpu", qos="high", time="1-00:00:00", signal_seconds=90)
    exports = {"MOE_DIST_SNAPSHOT": "/runs/my run/$x", "MOE_DIST_PYTHON": "/venv/bin/python"}
    text = script(TWO_KINDS, cluster, name="mine", output="/runs/my run/%j.out", exports=exports)
    first, second = text.split("#SBATCH hetjob\n")
    for part in (first, second):
        for option in ("--account=proj", "--partition=gpu", "--qos=high", "--time=1-00:00:00", "--signal=USR2@90"):
            assert f"#SBATCH {option}\n" in part
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks=4\n" in first
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks=1\n" in second, "without --ntasks a second part starts one task"
    assert "#SBATCH '--output=/runs/my run/%j.out'\n" in first
    assert "#SBATCH --requeue\n#SBATCH --open-mode=append\n" in first
    shown = subprocess.run(
        [
            "bash",
            "-c",
            'eval "$1"; echo "$MOE_DIST_SNAPSHOT"',
            "-",
            next(x for x in second.splitlines() if x[:6] == "export"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == "/runs/my run/$x\n"
    assert "hold=(env --block-signal=TERM,USR2,INT)\n" in second


def test_the_script_outside_of_a_job_says_how_to_submit_it() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", TRAIN_SBATCH, "x.yaml"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "submit it: sbatch slurm/train.sbatch CONFIG" in done.stderr


@pytest.mark.parametrize(("answer", "code"), [("Restarts=0", "clone"), ("Restarts=1", "first"), ("", "first")])
def test_a_job_runs_the_code_of_its_first_attempt_only_if_it_was_requeued(tmp_path: Path, answer: str, code: str) -> None:
    """The environment may have another job's SLURM_RESTART_COUNT, and the clone may have the pointer that an earlier
    job with the same number has left. The script therefore asks slurmctld for the count, and trusts the variable only
    if slurmctld does not answer."""
    for name in ("clone", "first/code"):
        (tmp_path / name / "slurm").mkdir(parents=True)
        (tmp_path / name / "slurm" / "node_env.sh").touch()
    (tmp_path / "clone/.moe_dist").mkdir()
    pointer = tmp_path / "clone/.moe_dist/job_c1_7"
    pointer.write_text(str(tmp_path / "first"))
    record = f"JobId=7 ArrayJobId=6 JobName=x Requeue=1 {answer} BatchFlag=1"
    scontrol = f"echo JobId=6 Restarts=4; echo '{record}'" if answer else "echo Unable to contact slurm >&2; exit 1"
    stand_in(tmp_path, scontrol=scontrol)
    (tmp_path / "python").write_text("#!/bin/bash\npwd\n")  # prints the folder that the script has chosen
    (tmp_path / "python").chmod(0o755)
    own = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c1", "SLURM_RESTART_COUNT": "3"}
    own |= {"SLURM_SUBMIT_DIR": str(tmp_path / "clone")}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MOE_"))} | own
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MOE_DIST_PYTHON": str(tmp_path / "python")}
    done = subprocess.run(["bash", TRAIN_SBATCH, "x.yaml"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / {"clone": "clone", "first": "first/code"}[code]), done.stderr
    assert pointer.exists() == (code == "first")


def test_options_of_the_site_reach_srun_and_sbatch() -> None:
    site = Cluster(srun_options=("--mpi=none", "--cpu-bind=ldoms"), exclude=("n7", "n8"), spare_nodes=1)
    assert "#SBATCH --exclude=n7,n8\n" in script(ONE_KIND, site, name="x", output="/x", exports={})
    line = sbatch_line(ONE_KIND, site, ["x"])
    assert " --nodes=3 --ntasks=6 --ntasks-per-node=2 " in line, "one spare node"
    places = {"table": Path("/t.sh"), "node_env": Path("/node_env.sh"), "visible": []}
    step = srun_command(ONE_KIND, site, hosts=["n1", "n3"], **places)
    wanted = ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=n1,n3", "--mpi=none", "--cpu-bind=ldoms"]
    assert step[step.index("--nodes=2") :][: len(wanted)] == wanted
    assert not [each for each in srun_command(ONE_KIND, Cluster(), hosts=["n1", "n3"], **places) if "nodelist" in each]
    with refused(ConfigError, "spare_nodes=1"):
        sbatch_line(TWO_KINDS, site, ["x"])


def test_sinks_close_before_srun_kills_the_ranks_that_outlive_others() -> None:
    assert sink.CLOSE_SECONDS + writer.CLOSE_SECONDS <= LINGER_SECONDS


# --- the environment of a task, set up by a real bash


class Task:
    """Writes a rank table of two nodes, and runs slurm/node_env.sh as a task on one of them."""

    def __init__(self, folder: Path, **cluster: object) -> None:
        self.folder, self.site = folder, Cluster.model_validate(cluster)
        (folder / "log").mkdir()

    def run(self, host: str, local: int, show: str) -> subprocess.CompletedProcess[str]:
        plan = LaunchPlan(
            config=Path("c.yaml"),
            overrides=("run.name=it's",),
            job=JobPlan((NodePlan(0, (0, 2), feature="text"), NodePlan(1, (1,), feature="vision"))),
            rendezvous=PUBLISHED_RENDEZVOUS,
            attempt=1,
            attempt_id="job-1",
            python="bash",
            program=("-c", show),
            hosts=("n1", "n2"),
        )
        places = {"code": self.folder, "logs": self.folder / "log", "visible": ["/runs/x"]}
        text = rank_table(plan, self.site, features={"n1": "text,big", "n2": "vision"}, **places)
        (self.folder / "table.sh").write_text(text)
        env = {"PATH": os.environ["PATH"], "SLURMD_NODENAME": host, "SLURM_LOCALID": str(local)}
        command = ["bash", str(ROOT / "slurm" / "node_env.sh"), str(self.folder / "table.sh")]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def log(self, rank: int) -> str:
        return (self.folder / "log" / f"rank_{rank}.log").read_text()


def test_a_task_finds_its_rank_by_node_and_local_id(tmp_path: Path) -> None:
    task = Task(tmp_path, interface="ib0", nccl={"NCCL_IB_HCA": {"value": "=a b", "reason": "test"}})
    show = 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MOE_DIST_NODE_FEATURES $NCCL_SOCKET_IFNAME $NCCL_IB_HCA $1"; pwd'
    first = task.run("n1", 0, show)
    assert first.stdout == f"0/3 0 text,big ib0 =a b run.name=it's\n{tmp_path}\n", "rank 0 writes to the job's output"
    task.run("n1", 1, show)
    assert f"\n2/3 1 text,big ib0 =a b run.name=it's\n{tmp_path}\n" in task.log(2)
    task.run("n2", 0, show)
    assert task.log(1).startswith("--- attempt job-1, ")
    assert "\n1/3 0 vision ib0" in task.log(1)


@pytest.mark.parametrize(("host", "local"), [("n1", 2), ("n3", 0)])
def test_a_task_that_the_plan_does_not_know_ends_with_69(tmp_path: Path, host: str, local: int) -> None:
    done = Task(tmp_path).run(host, local, "echo never")
    assert (done.returncode, done.stdout) == (69, "")
    assert f"node_env.sh on {host}: the plan of this job has no task {local} on this node" in done.stderr


def test_the_prelude_runs_before_and_stops_at_a_line_that_fails(tmp_path: Path) -> None:
    good = Task(tmp_path, prelude=("export A=1", "B=$A$A; export B"))
    assert good.run("n1", 0, "echo $B").stdout == "11\n"
    (tmp_path / "bad").mkdir()
    bad = Task(tmp_path / "bad", prelude=("true", "module load what's-this", "echo later"))
    done = bad.run("n1", 0, "echo never")
    assert (done.returncode, done.stdout) == (78, "")
    assert "this line of the cluster file's prelude failed: module load what's-this;" in done.stderr
    assert "unexpected EOF" in bad.log(0), "what the shell said"
    assert "later" not in bad.log(0)


def test_a_node_that_does_not_see_the_run_folder_says_so(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "SLURMD_NODENAME": "n1"}
    command = ["bash", str(ROOT / "slurm" / "node_env.sh"), str(tmp_path / "none.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "none.sh is missing on this node: run.root must be a folder that all nodes share" in done.stderr


def test_apptainer_runs_the_command_with_the_folders_it_needs(tmp_path: Path) -> None:
    stand_in(tmp_path, apptainer='echo "$@"')
    container = {"kind": "apptainer", "image": "/img/x y.sif", "mounts": ("/data:/data:ro",)}
    task = Task(tmp_path, container=container, gpus={"syntax": "gres"}, prelude=(f"export PATH={tmp_path}:$PATH",))
    assert task.run("n1", 0, "exit").stdout == (
        f"exec --nv --bind=/runs/x:/runs/x --bind=/data:/data:ro --pwd={tmp_path} /img/x y.sif "
        "bash -c exit c.yaml run.name=it's\n"
    )
