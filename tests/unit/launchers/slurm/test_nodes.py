"""Comparison of Slurm's allocation with the plan. Slurm's commands are stand-ins on the path."""

from pathlib import Path

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.slurm.nodes import Allocation, GivenPart, SlurmError, ask, differences, expand_counts, hosts_of
from tests.support.messages import refused

PLAN = JobPlan(
    (NodePlan(0, (0, 2), feature="text"), NodePlan(1, (1,), feature="vision"), NodePlan(2, (3, 4), feature="text"))
)
FEATURES = {"n1": "text", "n2": "text,big", "n7": "vision"}
RIGHT = Allocation((GivenPart(("n1", "n2"), (2, 2), 0), GivenPart(("n7",), (1,), -1)), FEATURES)


def test_counts_are_written_out() -> None:
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)
    assert expand_counts("4") == (4,)
    with refused(SlurmError):
        expand_counts("2y")


def test_nodes_of_the_plan_get_the_hosts_of_their_part_in_order() -> None:
    assert differences(PLAN, RIGHT) == []
    assert hosts_of(PLAN, RIGHT) == ("n1", "n7", "n2")


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


SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
  "show hostnames n7") echo n7 ;;
  *"show node n[1-2]") echo "NodeName=n1 Arch=x AvailableFeatures=text,spare ActiveFeatures=text Gres=(null)"
    echo "NodeName=n2 Arch=x AvailableFeatures=(null) ActiveFeatures=(null) Gres=(null)" ;;
  *"show node n7") echo "NodeName=n7 ActiveFeatures=vision,big " ;;
  *) echo "slurm_load: what is $*" >&2; exit 3 ;;
esac
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


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
