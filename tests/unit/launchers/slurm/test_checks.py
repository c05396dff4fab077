"""Tests the checks of a Slurm cluster that read the output of sinfo and scontrol, and the srun command that probes its
nodes."""

import time
from pathlib import Path

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.slurm import checks
from launchers.slurm.checks import check_slurm, gpus_of, read_offers, run_srun, srun_command
from launchers.slurm.nodes import SlurmError
from moe_dist.config.bundled import source_root
from moe_dist.config.cluster import Cluster, GpuSection
from moe_dist.errors import ResourceError
from moe_dist.runtime.node.check_result import CheckResult, Level
from tests.support.messages import refused
from tests.support.stand_ins import stand_in

NODES = """\
n1|idle|vision|96|gpu:h100:8(S:0-1)|gpu*
n2|allocated|vision,nvme|96|gpu:h100:8(S:0-1)|gpu*
n3|drained|text|96|gpu:h100:8(S:0-1)|gpu*
n4|idle*|text|96|(null)|gpu*
n1|idle|vision|96|gpu:h100:8(S:0-1)|debug
"""
CONFIG = "PreemptType             = preempt/none\nKillWait                = 30 sec\nSLURM_VERSION           = 24.11.5\n"
LIMITS = "gpu*|1-00:00:00\ndebug|30:00\n"
PLAN = JobPlan((NodePlan(0, tuple(range(8)), "vision"), NodePlan(1, tuple(range(8, 16)), "vision")), gpus_per_node=8)


def check(*, save_seconds: float = 20.0, config: str = CONFIG, **cluster: object) -> list[CheckResult]:
    def ask(*command: str) -> str:
        return config if command[0] == "scontrol" else NODES if "--Node" in command else LIMITS

    return check_slurm(PLAN, Cluster.model_validate({"time": "12:00:00", **cluster}), save_seconds, ask=ask)


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({}, []),
        ({"exclude": ("n2",)}, [("nodes", 69)]),
        ({"time": "2-00:00:00"}, [("time limit", 78)]),
        ({"save_seconds": 40.0}, []),  # preemption is off
        (
            {"save_seconds": 40.0, "config": CONFIG.replace("preempt/none", "preempt/partition_prio")},
            [("stop grace", 0)],  # Slurm kills the ranks after KillWait, before the save ends
        ),
    ],
)
def test_each_problem_of_a_cluster_is_found(options: dict[str, object], problems: list[tuple[str, int]]) -> None:
    found = check(**options)  # pyright: ignore
    assert [each.check for each in found] == ["scheduler", "nodes", "time limit", "stop grace"]
    assert [(each.check, each.verdict) for each in found if each.is_problem] == problems
    assert {each.level for each in found if not each.is_problem} == {Level.OK}


def test_nodes_of_the_default_partition_and_what_they_have() -> None:
    offers = read_offers(None, lambda *command: NODES)
    assert [(each.name, each.down, each.amounts["GPU"]) for each in offers] == [
        ("n1", "", 8),
        ("n2", "", 8),
        ("n3", "drained", 8),
        ("n4", "idle*", 0),
    ]
    assert offers[1].traits == {"vision", "nvme"}


def test_an_unreachable_slurm_gives_one_result() -> None:
    def broken(*command: str) -> str:
        raise SlurmError("sinfo: Unable to contact slurm controller")

    (found,) = check_slurm(PLAN, Cluster(), None, ask=broken)
    assert (found.check, found.verdict) == ("scheduler", 69)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0), ("gpu:2", 2), ("gpu:h100:8(S:0-1)", 8), ("nic:1,gpu:a100:4", 4), ("gpu:a100:4,gpu:v100:2", 6),
        ("mps:100", 0),
    ],
)  # fmt: skip
def test_gpus_in_a_list_of_resources(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus


# --- the srun command of a probe

TWO_KINDS = JobPlan((NodePlan(0, (0, 2), "text"), NodePlan(1, (1, 3), "vision")), gpus_per_node=2)


def command(cluster: Cluster, *, tasks_per_node: int = 1, visible: tuple[str, ...] = ()) -> list[str]:
    size = {"tasks_per_node": tasks_per_node, "minutes": 2}
    return srun_command(TWO_KINDS, cluster, "a.module", '{"folder": "/my runs"}', visible=visible, **size)


def test_each_kind_of_node_is_a_component_with_the_options_of_the_job() -> None:
    cluster = Cluster(partition="gpu", account="me", gpus=GpuSection(type="h100"), cpus_per_rank=6)
    first, second = " ".join(command(cluster)).split(" : ")
    common = "--nodes=1 --ntasks=1 --ntasks-per-node=1 --gres=gpu:h100:2 --cpus-per-task=12 --time=2 --partition=gpu"
    for part, feature in ((first, "text"), (second, "vision")):
        assert {*common.split(), "--account=me", "--exclusive", f"--constraint={feature}"} <= set(part.split())
        assert "--signal" not in part


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_mounts_the_runs_folders_and_uses_its_own_python(kind: str) -> None:
    cluster = Cluster.model_validate({"container": {"kind": kind, "image": "/img/torch", "mounts": ("/more:/more:ro",)}})
    asked = command(cluster, visible=("/runs", "/data"))
    mounts = [f"{source_root()}:{source_root()}", "/runs:/runs", "/data:/data", "/more:/more:ro"]
    first, *_, last = asked[-1].splitlines()
    assert first == f"cd {source_root()} || exit 78", "the container may begin elsewhere"
    python = """python3 -m a.module '{"folder": "/my runs"}'"""
    if kind == "pyxis":
        assert asked.count("--container-image=/img/torch") == 2, "for each kind of node"
        assert asked.count(f"--container-mounts={','.join(mounts)}") == 2
        assert last == f"exec {python}"
    else:
        binds = " ".join(f"--bind={mount}" for mount in mounts)
        assert last == f"exec apptainer exec --nv {binds} --pwd={source_root()} /img/torch {python}"


@pytest.mark.parametrize(
    ("srun", "lines"),
    [
        ("echo one; echo two", ["one\n", "two\n"]),
        ("echo 'srun: error: Unable to allocate resources: Invalid account' >&2; exit 1", None),  # refused
        ("trap 'echo >ended; exit 143' TERM; sleep 60 >/dev/null 2>&1 & wait", None),  # like a job that waits in the queue
    ],
    ids=["lines", "refused", "never ends"],
)
def test_lines_come_with_their_time_and_a_job_that_fails_or_never_ends_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, srun: str, lines: list[str] | None
) -> None:
    stand_in(tmp_path, srun=srun)
    monkeypatch.setattr(checks, "START_SECONDS", 0.5 if "TERM" in srun else 60.0)
    before = time.time()
    if lines is None:
        with refused(ResourceError):
            list(run_srun([str(tmp_path / "srun")], minutes=0))
        assert (tmp_path / "ended").exists() == ("TERM" in srun)
    else:
        heard = list(run_srun([str(tmp_path / "srun")], minutes=0))
        assert [line for _, line in heard] == lines
        assert before <= heard[0][0] <= heard[1][0] <= time.time()
