"""Runs single attempts of a Slurm job with stand-ins for srun and scontrol."""

import json
import os
import sys
from pathlib import Path

import pytest
import typer

from launchers.command import JobPlan, NodePlan, one_node
from launchers.slurm.job import _read_clone, main, rank_step, run_attempt, visible_folders
from launchers.slurm.nodes import ranks_by_task
from launchers.slurm.script import interpreter
from launchers.slurm.step import SlurmJob
from launchers.snapshot import CodeSnapshot
from moe_dist.config.cluster import Cluster
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.cover import full
from tests.support.stand_ins import stand_in
from tests.support.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[4]


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
    """The user sets the CPUs with `sbatch --cpus-per-task=3 slurm/train.sbatch ...`. srun does not inherit them, so the job
    passes them on."""
    config = tiny_config(tiny_data, tmp_path / "runs")
    path, job = write_config(config, tmp_path / "tiny.yaml"), SlurmJob("7", 0, None, tmp_path)
    assert _read_clone(job, [str(path)], {})[0].cpus_per_rank is None
    cluster, config = _read_clone(job, [str(path)], {"SLURM_CPUS_PER_TASK": "3"})
    snapshot = CodeSnapshot(tmp_path)
    _, table, command = rank_step(job, snapshot, config, cluster, one_node(2), ("n1",))
    assert "--cpus-per-task=3" in command
    assert "OMP_NUM_THREADS=3" in table


class Node:
    """A node in a job of two ranks, with stand-ins for Slurm's commands."""

    def __init__(self, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.config = folder, tiny_config(data, folder / "runs")
        self.run = RunFolder.of(self.config)
        self.yaml = write_config(self.config, folder / "x.yaml")
        (folder / "site.yaml").write_text("gpus: {syntax: none}\nranks_per_node: 2\nmax_restarts: 5\n")
        answers = {
            # Like Slurm's requeue, this requeue sends SIGTERM to the job.
            "requeue*": 'echo "$*" >>asked; kill -TERM $PPID; sleep 0.2; echo PENDING >state',
            "update*": 'echo "$*" >>asked',
            "*hostnames*": "cat hosts",
            "*node*": 'echo "NodeName=n1 State=$(cat node_state) ActiveFeatures="',
            "*": "echo JobState=$(cat state) Restarts=0 PreemptTime=None",
        }
        cases = " ".join(f"{asked}) {answer} ;;" for asked, answer in answers.items())
        # This sbatch always succeeds, like `sbatch --test-only` if the nodes suffice.
        stand_in(folder, monkeypatch, scontrol=f'case "$*" in {cases} esac', sbatch='echo "$*" >>asked')
        self.hosts = ["n1"]
        (folder / "node_state").write_text("DOWN+NOT_RESPONDING")
        monkeypatch.chdir(ROOT)  # the job starts in the clone

    def attempt(self, srun: str, *, restarts: int = 0, **variables: str) -> int:
        stand_in(self.folder, srun=f'echo "$*" >>sruns; {srun}')
        (self.folder / "hosts").write_text("\n".join(self.hosts))
        (self.folder / "state").write_text("RUNNING")
        env = {"PATH": os.environ["PATH"], "MOE_DIST_CLUSTER": str(self.folder / "site.yaml")}
        env |= {
            "SLURM_JOB_NODELIST": "n[]",
            "SLURM_TASKS_PER_NODE": ",".join([str(2 if len(self.hosts) == 1 else 1)] * len(self.hosts)),
        }
        if snapshots := list(self.run.path.glob("slurm/job_12_*")):
            env["MOE_DIST_SNAPSHOT"] = str(snapshots[0])
        return run_attempt(SlurmJob("12", restarts, None, self.folder), [str(self.yaml)], {**env, **variables})

    @property
    def asked(self) -> list[str]:
        asked = self.folder / "asked"
        return asked.read_text().splitlines() if asked.exists() else []

    @property
    def requeues(self) -> int:
        return self.asked.count("requeue 12")

    def save(self, step: int) -> None:
        self.run.open(self.config, RankEnv(0, 2, 0, 1, "published", 0, "earlier")).release()
        (self.run.checkpoints / "latest").write_text(f"step_{step}")


@pytest.fixture
def node(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, tiny_data, monkeypatch)


def test_the_next_attempt_of_a_job_leaves_out_the_nodes_at_fault(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """The job asks Slurm to exclude each node at fault. If Slurm allocates such a node again, a spare node replaces it."""
    node.hosts = ["n1", "n2", "n3", "n4"]
    (node.folder / "site.yaml").write_text("gpus: {syntax: none}\nranks_per_node: 1\nspare_nodes: 2\n")
    for restarts, lost in enumerate(["n1: task 0: Killed", "Node failure on n3"]):
        node.save(restarts)
        saves = f"echo step_{restarts + 1} >{node.run.checkpoints}/latest"
        assert node.attempt(f"{saves}; echo 'srun: error: {lost}' >&2; exit 137", restarts=restarts) == 1
    assert node.attempt("exit 0", restarts=2) == 0
    ((snapshot,),) = [list(node.run.path.glob("slurm/job_12_*"))]
    assert node.asked == [
        *("requeue 12", f"--test-only --exclude=n1 {snapshot}/train.sbatch", "update JobId=12 ExcNodeList=n1"),
        *("requeue 12", f"--test-only --exclude=n1,n3 {snapshot}/train.sbatch", "update JobId=12 ExcNodeList=n1,n3"),
    ]
    used = [
        word for line in (node.folder / "sruns").read_text().splitlines() for word in line.split() if "--nodelist" in word
    ]
    assert used == ["--nodelist=n1,n2", "--nodelist=n2,n3", "--nodelist=n2,n4"]
    assert "nodes at fault: n1, n3; the next attempt leaves them out" in capsys.readouterr().err


def test_srun_gets_no_option_of_an_outer_job(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_SUBMIT_DIR": f"{node.folder}",
    }
    outer = {"SLURM_CPUS_PER_TASK": "7", "SLURM_HINT": "nomultithread", "SLURM_MEM_BIND": "local", "SRUN_CONTAINER": "/x"}
    for name, value in {**own, **outer, "MOE_DIST_CLUSTER": f"{node.folder / 'site.yaml'}"}.items():
        monkeypatch.setenv(name, value)
    (node.folder / "hosts").write_text("n1")
    (node.folder / "state").write_text("RUNNING")
    stand_in(node.folder, srun='env >srun_env; echo "$*" >sruns')
    with pytest.raises(typer.Exit) as ended:
        main(str(node.yaml))
    assert ended.value.exit_code == 0
    given = dict(line.split("=", 1) for line in (node.folder / "srun_env").read_text().splitlines() if "=" in line)
    assert own.items() <= given.items()
    assert not outer.keys() & given.keys()
    assert "--cpus-per-task" not in (node.folder / "sruns").read_text()


@pytest.mark.parametrize(
    ("line", "verdict", "requeued"),
    [
        ("task 1: Killed", 1, True),  # a rank's death
        full("task 0: Exited with exit code 1", 1, True),  # a lost GPU, a timeout after a suspend, a late start
        ("task 1: Exited with exit code 75", 75, True),
        ("task 1: Exited with exit code 78", 78, False),
        full("task 1: Exited with exit code 69", 69, False),
        full("task 1: Exited with exit code 65", 65, False),
        full("task 1: Exited with exit code 70", 70, False),
    ],
)
def test_slurm_requeues_what_the_other_launchers_restart(node: Node, line: str, verdict: int, requeued: bool) -> None:
    assert node.attempt(f"echo 'srun: error: n1: {line}' >&2; exit {verdict}") == verdict
    assert node.requeues == requeued


@pytest.mark.slow
def test_a_job_that_saves_nothing_after_a_fault_is_requeued_once(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    fails = "echo 'srun: error: n1: task 1: Killed' >&2; exit 137"
    assert [node.attempt(fails, restarts=restarts) for restarts in range(2)] == [1, 1]
    assert node.requeues == 1
    assert "not requeued: 2 failed attempts in a row committed no checkpoint after step 0" in capsys.readouterr().err


def test_preemptions_and_time_limits_before_the_first_checkpoint_never_end_a_job(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job goes on also if Slurm kills the batch script before the ranks have saved, and if a stopped attempt saves."""
    limit = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "1300"}
    kills = "kill -TERM $PPID; sleep 1; exit 137"  # the parent of srun is the batch script
    for restarts, srun in enumerate(["exit 75", "exit 75", kills, f"echo step_1 >{node.run.checkpoints}/latest; exit 75"]):
        if restarts == 3:
            node.save(0)
        assert node.attempt(srun, restarts=restarts, **limit) == 75
    assert node.requeues == 4
    (attempts,) = node.run.path.glob("slurm/job_12_*/job_12.json")
    assert [each[3] for each in json.loads(attempts.read_text())] == [False, False, True, False]
    attempts.write_text("[[75, 0, 0, false], [75, 0, 0, true], [null, 0, 0, true]]")  # killed while it was stopping
    assert node.attempt("exit 0", restarts=4) == 0
    said = capsys.readouterr().err
    assert said.count("WARNING: the time limit of 300 s leaves an attempt 0 s until its stop signal") == 4


def test_the_count_goes_on_after_slurm_itself_requeued_the_job(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """A node failure has also killed the batch script, so the next attempt finds an attempt without a verdict."""
    assert node.attempt("exit 75") == 75
    (attempts,) = node.run.path.glob("slurm/job_12_*/job_12.json")
    assert json.loads(attempts.read_text()) == [[75, 0, 0, False]]
    attempts.write_text("[[75, 0, 3], [null, 3, 3]]")
    attempts.with_name("job_12_1_ranks.json").write_text('{"n1": [0, 1]}')
    lost = "slurm--12-1"
    node.run.open(node.config, RankEnv(0, 2, 0, 1, "published", 1, lost)).release()
    node.save(3)
    assert node.attempt("exit 0", restarts=2) == 0
    assert [each[:3] for each in json.loads(attempts.read_text())] == [[75, 0, 3], [1, 3, 3], [0, 3, 3]]
    record = node.run.read_status().of(lost)
    assert record.reason == "ranks 0-1: Node failure on n1"
    assert json.loads(attempts.with_name("job_12_2_ranks.json").read_text()) == {"n1": [0, 1]}
    attempts.write_text("[[75, 0, 3], [1, 3, 3], [null, 3, 3]]")
    assert node.attempt("exit 0", restarts=3) == 1
    assert "job 12 is not continued: 2 failed attempts in a row" in capsys.readouterr().err


def test_tasks_are_counted_node_by_node_in_each_component() -> None:
    nodes = (NodePlan(0, (0, 2), "text"), NodePlan(1, (1, 3), "image"), NodePlan(2, (4, 5), "text"))
    plan = JobPlan(nodes, 0)
    assert ranks_by_task(plan, ["a", "b", "c"], ["a", "c", "b"]) == {
        "a": {0: 0, 1: 2},
        "b": {0: 1, 1: 3},
        "c": {2: 4, 3: 5},
    }
    # "c" was at fault, so the plan uses it last. Tasks are still numbered in Slurm's order.
    assert ranks_by_task(plan, ["d", "b", "c"], ["c", "d", "b"]) == {
        "c": {0: 4, 1: 5},
        "d": {2: 0, 3: 2},
        "b": {0: 1, 1: 3},
    }
