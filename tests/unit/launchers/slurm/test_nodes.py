"""A job compares Slurm's allocation with its plan. Slurm's commands are stand-ins on PATH."""

from pathlib import Path

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.slurm.nodes import (
    Allocation,
    GivenPart,
    SlurmError,
    ask,
    differences,
    hosts_of,
    inside_job,
    leave_out,
    outside_jobs,
)
from tests.support.messages import refused
from tests.support.stand_ins import stand_in

PLAN = JobPlan(
    (NodePlan(0, (0, 2), feature="text"), NodePlan(1, (1,), feature="vision"), NodePlan(2, (3, 4), feature="text"))
)
FEATURES = {"n1": "text", "n2": "text,big", "n7": "vision"}
RIGHT = Allocation((GivenPart(("n1", "n2"), (2, 2), 0), GivenPart(("n7",), (1,), -1)), FEATURES)


def test_an_answer_comes_although_slurm_sends_stop_signals_to_the_whole_job() -> None:
    assert ask("sh", "-c", "kill -TERM $$; kill -USR2 $$; echo here") == "here\n"


def test_nodes_of_the_plan_get_the_hosts_of_their_part_in_order() -> None:
    assert differences(PLAN, RIGHT) == []
    assert hosts_of(PLAN, RIGHT) == ("n1", "n7", "n2")


def test_a_spare_node_replaces_one_that_was_at_fault() -> None:
    plan = JobPlan((NodePlan(0, (0,)), NodePlan(1, (1,))))
    given = Allocation((GivenPart(("n1", "n2", "n3"), (1, 1, 1), 0),), {})
    assert differences(plan, given) == ["the plan needs 2 nodes, the job has 3 nodes"]
    assert differences(plan, given, spare=1) == []
    assert hosts_of(plan, given) == ("n1", "n2")
    assert hosts_of(plan, given, faulty=["n1"]) == ("n2", "n3")
    assert hosts_of(plan, given, faulty=["n1", "n2"]) == ("n3", "n1"), "too few spares: the fault may have been elsewhere"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((GivenPart(("n1",), (5,), 0),), "the plan needs 2 kinds of nodes, the job has 1 component"),
        ((GivenPart(("n1",), (2,), 0), RIGHT.parts[1]), "part 0: the plan needs 2 nodes, the job has 1 node"),
        (
            (GivenPart(("n1", "n2"), (3, 1), 0), RIGHT.parts[1]),
            "part 0: the plan needs 2 tasks per node, the job has 1 and 3",
        ),
        (
            (RIGHT.parts[0], GivenPart(("n1",), (1,), 0)),
            "part 1: the plan needs nodes with the feature 'vision', missing on n1",
        ),
    ],
)
def test_differences_are_described(parts: tuple[GivenPart, ...], words: str) -> None:
    assert differences(PLAN, Allocation(parts, FEATURES)) == [words]


def test_missing_gpus_are_reported() -> None:
    plan = JobPlan((NodePlan(0, (0, 1)),), gpus_per_node=8)
    assert differences(plan, Allocation((GivenPart(("n1",), (2,), 4),), {})) == [
        "the plan needs 8 GPUs per node, the job has 4"
    ]
    assert differences(plan, Allocation((GivenPart(("n1",), (2,), 8),), {})) == []


SCONTROL = """case "$*" in
  "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
  "show hostnames n7") echo n7 ;;
  *"show node n[1-2]") echo "NodeName=n1 Arch=x AvailableFeatures=text,spare ActiveFeatures=text Gres=(null)"
    echo "NodeName=n2 Arch=x AvailableFeatures=(null) ActiveFeatures=(null) Gres=(null)" ;;
  *"show node n7") echo "NodeName=n7 ActiveFeatures=vision,big " ;;
  *) echo "slurm_load: what is $*" >&2; exit 3 ;;
esac"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, scontrol=SCONTROL)


@pytest.mark.usefixtures("scontrol")
def test_an_allocation_is_read_from_the_environment_and_slurm() -> None:
    plain = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_ON_NODE": "8"}
    assert Allocation.read(plain) == Allocation((GivenPart(("n1", "n2"), (2, 2), 8),), {"n1": "text", "n2": ""})
    parts = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-2]",
        "SLURM_TASKS_PER_NODE_HET_GROUP_0": "1(x2)",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "n7",
        "SLURM_TASKS_PER_NODE_HET_GROUP_1": "4",
    }
    both = Allocation.read(parts)
    assert [part.hosts for part in both.parts] == [("n1", "n2"), ("n7",)]
    assert [part.tasks for part in both.parts] == [(1, 1), (4,)]
    assert both.features["n7"] == "vision,big"


@pytest.mark.usefixtures("scontrol")
def test_a_failed_or_missing_command_is_reported() -> None:
    with refused(SlurmError):
        ask("scontrol", "ping")
    with refused(SlurmError):
        ask("snone", "x")


# --- variables of an outer job, and nodes at fault

_OPTIONS = "ACCOUNT CONSTRAINT CPU_BIND EXCLUSIVE GPUS_PER_NODE GRES MEM_PER_CPU MPI_TYPE PARTITION TIMELIMIT WCKEY"

# Variables that an outer job has left. It is a heterogeneous array task that was requeued twice. Some of its variables
# are options that srun reads.
OUTER = {
    **{"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "5", "SLURM_HET_SIZE": "2", "SLURM_RESTART_COUNT": "2"},
    **dict.fromkeys(map("SLURM_{}".format, _OPTIONS.split()), "outer"),
    **{"SLURM_MEM_PER_CPU_HET_GROUP_0": "9", "SLURM_STEP_ID": "0", "SRUN_CPUS_PER_TASK": "9", "SRUN_CONTAINER": "/x"},
    "SLURM_CPUS_PER_TASK": "9",
}
PLAIN = "JobId=7 JobName=it Restarts=0 JobState={state} ExcNodeList={excluded} "


class Controller:
    """Stand-ins for scontrol, which shows one job, and sbatch, which knows whether the nodes suffice."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.shows(PLAIN.format(state="COMPLETING", excluded="(null)"))
        stand_in(folder, monkeypatch, scontrol='if [ "$1" = update ]; then echo "$*" >>asked; else cat job; fi')
        self.suffices()

    def shows(self, text: str) -> None:
        (self.folder / "job").write_text(text)

    def suffices(self, *, nodes: bool = True) -> None:
        refusal = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
        stand_in(self.folder, sbatch='echo "$*" >>asked' if nodes else refusal)

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    return Controller(tmp_path, monkeypatch)


def test_a_job_believes_slurmctld_and_no_variable_of_an_outer_job(controller: Controller) -> None:
    own = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_END_TIME": "9"}
    own |= {"HOME": "/home/me", "SLURM_CONF": "/etc/slurm.conf", "SLURMD_NODENAME": "n1", "SLURM_SUBMIT_DIR": "/clone"}
    assert inside_job({**OUTER, **own}) == {**own, "SLURM_RESTART_COUNT": "0"}
    assert inside_job({"HOME": "/home/me"}) == {"HOME": "/home/me"}


@pytest.mark.parametrize(
    ("record", "cpus"),
    [
        ("NumTasks=4 CPUs/Task=3 ReqB:S:C:T=0:0:*:*", "3"),
        ("NumTasks=4 CPUs/Task=12 ReqB:S:C:T=0:0:*:*", "12"),
        ("NumTasks=4 CPUs/Task=3 TresPerTask=cpu=3", "3"),
        ("NumTasks=4 CPUs/Task=1 TresPerTask=cpu:1", "1"),
        ("NumTasks=4 CPUs/Task=1 TresPerTask=gres/gpu:2,cpu=1", "1"),
        ("NumTasks=4 CPUs/Task=1 TresPerTask=gres/gpu:2", None),
        ("NumTasks=4 CPUs/Task=1 ReqB:S:C:T=0:0:*:*", None),
    ],
)
def test_the_cpus_of_a_task_are_those_that_slurmctld_knows(controller: Controller, record: str, cpus: str | None) -> None:
    controller.shows(f"JobId=7 Restarts=0 {record} \n")
    assert inside_job({**OUTER, "SLURM_JOB_ID": "7"}).get("SLURM_CPUS_PER_TASK") == cpus


def test_a_job_keeps_its_own_task_restarts_and_components(controller: Controller) -> None:
    controller.shows(
        "JobId=6 ArrayJobId=6 ArrayTaskId=1-2 Restarts=0\nJobId=7 ArrayJobId=6 ArrayTaskId=0 Restarts=3 JobName=x\n"
    )
    found = inside_job({"SLURM_JOB_ID": "7", **OUTER})
    assert (found["SLURM_ARRAY_TASK_ID"], found["SLURM_RESTART_COUNT"]) == ("0", "3")
    assert found["SLURM_ARRAY_JOB_ID"] == "6"
    controller.shows("JobId=7 HetJobId=7 HetJobOffset=0 Restarts=1\nJobId=8 HetJobId=7 HetJobOffset=1 Restarts=1\n")
    parts = {f"SLURM_{name}_HET_GROUP_1": "4" for name in ("JOB_NODELIST", "TASKS_PER_NODE", "NTASKS", "NNODES")}
    found = inside_job({"SLURM_JOB_ID": "7", **OUTER, **parts})
    assert (found["SLURM_HET_SIZE"], found["SLURM_RESTART_COUNT"]) == ("2", "1")
    assert parts.items() <= found.items()
    assert not {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"} & found.keys()


def test_a_submission_leaves_the_variables_of_its_own_job_behind() -> None:
    kept = {"HOME": "/home/me", "SLURM_CONF": "/etc/slurm/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    assert outside_jobs({**kept, **OUTER, "SLURM_JOB_ID": "2", "SLURMD_NODENAME": "n1"}) == kept
    chosen = {**kept, "SLURM_MPI_TYPE": "pmix"}
    assert outside_jobs(chosen) == chosen, "outside of a job they are the user's"


def test_a_requeued_job_leaves_out_the_node_at_fault_if_the_others_suffice(controller: Controller) -> None:
    script = Path("/runs/it/train.sbatch")
    controller.shows(PLAIN.format(state="COMPLETING", excluded="n9"))
    assert leave_out("7", ["n2", "n2"], script) == "nodes at fault: n2; the next attempt leaves them out"
    assert controller.asked == [f"--test-only --exclude=n9,n2 {script}", "update JobId=7 ExcNodeList=n9,n2"]

    controller.suffices(nodes=False)
    assert leave_out("7", ["n2"], script).startswith("nodes at fault: n2; the next attempt may use them again: sbatch")
    controller.shows(PLAIN.format(state="RUNNING", excluded="(null)"))
    assert leave_out("7", ["n2"], script) == "nodes at fault: n2", "the job ends"
    assert len(controller.asked) == 2
