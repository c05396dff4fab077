"""Results of the checks of sinfo's and scontrol's output."""

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.doctor.slurm_checks import check_graces, check_slurm, gpus_of, read_offers
from launchers.slurm.nodes import SlurmError, ask
from moe_dist.config.cluster import Cluster
from moe_dist.runtime.node.check_result import CheckResult, Level
from tests.support.messages import refused

NODES = """\
n1|idle|vision|96|gpu:h100:8(S:0-1)|gpu*
n2|allocated|vision,nvme|96|gpu:h100:8(S:0-1)|gpu*
n3|drained|text|96|gpu:h100:8(S:0-1)|gpu*
n4|idle*|text|96|(null)|gpu*
n1|idle|vision|96|gpu:h100:8(S:0-1)|debug
"""
CONFIG = "PreemptType             = preempt/none\nKillWait                = 30 sec\nSLURM_VERSION           = 24.11.5\n"
PLAN = JobPlan((NodePlan(0, tuple(range(8)), "vision"), NodePlan(1, tuple(range(8, 16)), "vision")), gpus_per_node=8)


def slurm(nodes: str = NODES, config: str = CONFIG, limit: str = "gpu*|1-00:00:00\ndebug|30:00\n"):
    """Answers as Slurm's commands would."""

    def ask(*command: str) -> str:
        if command[0] == "scontrol":
            return config
        return nodes if "--Node" in command else limit

    return ask


def check(
    plan: JobPlan = PLAN, save_seconds: float | None = 20.0, cluster: Cluster | None = None, **words: str
) -> list[CheckResult]:
    return check_slurm(plan, cluster or Cluster(time="12:00:00"), save_seconds, ask=slurm(**words))


def test_a_good_cluster() -> None:
    assert [(found.check, found.level) for found in check()] == [
        (name, Level.OK) for name in ("scheduler", "nodes", "time limit", "stop grace")
    ]


def test_an_excluded_node_is_none_of_the_clusters() -> None:
    nodes = check(cluster=Cluster(time="12:00:00", exclude=("n2",)))[1]
    assert (nodes.check, nodes.level) == ("nodes", Level.ERROR)


def test_nodes_of_the_default_partition_and_what_they_have() -> None:
    offers = read_offers(None, slurm())
    assert [(each.name, each.up, each.amounts["GPU"]) for each in offers] == [
        ("n1", True, 8),
        ("n2", True, 8),
        ("n3", False, 8),
        ("n4", False, 0),
    ]
    assert offers[1].traits == {"vision", "nvme"}


def test_an_unreachable_slurm_gives_one_result() -> None:
    def broken(*command: str) -> str:
        raise SlurmError("sinfo: Unable to contact slurm controller")

    (found,) = check_slurm(PLAN, Cluster(), None, ask=broken)
    assert (found.check, found.verdict) == ("scheduler", 69)


def test_an_error_of_a_slurm_command_is_one_line() -> None:
    with refused(SlurmError):
        ask("bash", "-c", "printf 'error: one\\nfatal: two\\n' >&2; exit 1")


def test_a_time_that_the_partition_does_not_allow() -> None:
    problems = [found for found in check(cluster=Cluster(time="2-00:00:00")) if found.is_problem]
    assert [(found.check, found.verdict) for found in problems] == [("time limit", 78)]
    assert "time: 2-00:00:00, but the default partition allows 1-00:00:00" in problems[0].text


def test_preemption_that_kills_before_the_save_is_done() -> None:
    config = CONFIG.replace("preempt/none", "preempt/partition_prio")
    assert not [found for found in check(save_seconds=40.0) if found.is_problem], "nothing preempts"
    (found,) = [found for found in check(save_seconds=40.0, config=config) if found.is_problem]
    assert str(found).startswith("stop grace: 30 s on preemption (KillWait), but the last saves took up to 40.0 s")


def test_the_grace_needs_a_measured_save() -> None:
    assert check_graces({"x": 1.0}, None).level is Level.NOTE
    assert check_graces({"x": 1.0, "y": 60.0}, 0.5).level is Level.OK


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu:h100:8(S:0-1)", 8),
        ("nic:1,gpu:a100:4", 4),
        ("gpu:a100:4,gpu:v100:2", 6),
        ("mps:100", 0),
    ],
)
def test_gpus_in_a_list_of_resources(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus
