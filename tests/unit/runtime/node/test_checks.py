"""Node checks give exactly one failed result for each problem. The result names the nodes."""

from dataclasses import replace
from typing import Any

import pytest

from moe_dist.runtime.node.check_result import CheckResult, Level
from moe_dist.runtime.node.checks import Needs, answered_at, check_cores, check_nodes
from moe_dist.runtime.node.facts import NO_LIMIT, NodeFacts

GIB = 1 << 30
GOOD = NodeFacts(
    node="",
    clock=1000.0,
    versions={"python": "3.11.7", "torch": "2.13.0", "moe_dist": "0.1.0", "nccl": "2.28.9"},
    apex="none",
    gpus=8,
    driver="590.1",
    shm_bytes=64 * GIB,
    open_files=65536,
    locked_memory=NO_LIMIT,
    infiniband=True,
    folder_problem="",
    free_bytes=900 * GIB,
    sees_token=True,
    sees_data=True,
)
NEEDS = Needs(
    world_size=24, ranks_per_node=8, gpus_per_node=8, num_nodes=3, folder_bytes=GIB, folder="/runs", data="/data/x"
)
HEARD = [1000.0] * 3


def examine(on_second: dict[str, Any], *, needs: Needs = NEEDS, heard: list[float] | None = HEARD) -> list[CheckResult]:
    """Examines three nodes. `on_second` changes facts of the second node."""
    nodes = [replace(GOOD, node=f"n{index}", **(on_second if index == 1 else {})) for index in range(3)]
    return check_nodes(nodes, needs, heard)


def test_three_good_nodes() -> None:
    found = examine({})
    assert [result.check for result in found] == [
        *("rendezvous host", "ports", "shared folder", "room", "data", "clocks", "versions", "apex", "GPUs", "/dev/shm"),
        "open files",
    ]
    assert {result.level for result in found} == {Level.OK}
    assert "python 3.11.7, torch 2.13.0, nccl 2.28.9, moe_dist 0.1.0 on all 3 nodes" in found[6].text


@pytest.mark.parametrize(
    ("different", "verdict", "line"),
    [
        ({"unresolved": {"n0": "Unknown"}}, 78, "rendezvous host: 'n0' does not resolve on n1: Unknown; enter it"),
        ({"unreachable": "timed out"}, 69, "ports: n1 cannot connect to a free port of rank 0's node: timed out; open"),
        (
            {"folder_problem": "/runs: Read-only"},
            78,
            "shared folder: run.root='/runs' cannot be written on n1: /runs: Read",
        ),
        ({"sees_token": False}, 78, "shared folder: run.root='/runs' is a different folder on n1"),
        ({"free_bytes": 1 << 20}, 0, "room: run.root='/runs' has 1 MiB free on n1, but the checkpoints need 1 GiB; free"),
        ({"sees_data": False}, 78, "data: data.path='/data/x' does not exist on n1; put"),
        ({"clock": 990.0}, 0, "clocks: n1: off by -10 s (n1); synchronise"),
        ({"versions": {**GOOD.versions, "torch": "2.11.0"}}, 69, "versions: torch 2.13.0 on n0 and n2, 2.11.0 on n1; use"),
        ({"versions": {**GOOD.versions, "nccl": None}}, 69, "versions: nccl 2.28.9 on n0 and n2, none on n1; use"),
        ({"apex": "other"}, 0, "apex: the package `apex` on n1 is not NVIDIA Apex but an unrelated package; pip"),
        ({"apex": "nvidia"}, 0, "apex: NVIDIA Apex is installed on n1, but not on n0 and n2; install"),
        ({"gpus": 6}, 69, "GPUs: n1 has 6 GPUs, but the plan puts 8 ranks there; request"),
        ({"gpus": None, "driver": "no NVML"}, 0, "GPUs: NVML does not answer on n1: no NVML; install"),
        ({"driver": "570.0"}, 0, "GPUs: drivers differ: 590.1 on n0 and n2, 570.0 on n1; install"),
        ({"shm_bytes": 64 << 20}, 0, "/dev/shm: 64 MiB on n1, but 8 ranks need 512 MiB; enlarge"),
        ({"open_files": 256}, 0, "open files: the limit is 256 on n1, but a rank of 24 may open 448; put ulimit -n 448"),
        (
            {"locked_memory": 8 << 20},
            0,
            "locked memory: the limit on n1 is 8 MiB; InfiniBand needs no limit; put ulimit -l",
        ),
    ],
)
def test_each_problem_gives_exactly_one_result(different: dict[str, Any], verdict: int, line: str) -> None:
    problems = [result for result in examine(different) if result.is_problem]
    assert len(problems) == 1
    assert str(problems[0]).startswith(line)
    assert problems[0].verdict == verdict
    assert problems[0].fix


@pytest.mark.parametrize(("clock", "off"), [(1005.0, 0.0), (1012.0, 2.0), (990.0, -10.0), (1000.0, 0.0)])
def test_a_late_answer_is_no_wrong_clock(clock: float, off: float) -> None:
    assert clock - answered_at(clock, asked=1000.0, seen=1010.0) == off


def test_an_unresolved_name_is_not_reported_as_a_closed_port_too() -> None:
    problems = [f for f in examine({"unresolved": {"n0": "Unknown"}, "unreachable": "refused"}) if f.is_problem]
    assert [result.check for result in problems] == ["rendezvous host"]


def test_requirements_of_gpus_are_not_checked_on_cpu() -> None:
    needs = replace(NEEDS, gpus_per_node=0, ranks_per_node=1)
    odd = {"gpus": None, "shm_bytes": 1 << 20, "locked_memory": 1 << 16}
    assert not [result for result in examine(odd, needs=needs) if result.is_problem]


def test_missing_torch_is_an_error() -> None:
    bare = replace(GOOD, node="n0", versions={**GOOD.versions, "torch": None})
    problems = [f for f in check_nodes([bare, replace(bare, node="n1")], NEEDS) if f.is_problem]
    assert [str(f).partition(";")[0] for f in problems] == ["versions: torch is not installed on all 2 nodes"]


def test_of_the_submitting_node_only_folders_are_checked() -> None:
    here = replace(GOOD, node="login", versions={}, gpus=None, apex="other", folder_problem="/runs: Permission denied")
    nodes = [replace(GOOD, node=f"n{index}") for index in range(2)]
    problems = [result for result in check_nodes(nodes, NEEDS, here=here) if result.is_problem]
    assert len(problems) == 1
    assert "cannot be written on login" in problems[0].text


@pytest.mark.parametrize(
    ("cores", "level", "text"),
    [
        (8, Level.OK, "cores: 8 or more for 8 ranks on all 2 nodes"),
        (6, Level.WARNING, "cores: n1 has 6 cores for 8 ranks, so ranks take turns and steps are slow; lower parallel.ep"),
        (None, Level.OK, "cores: 16 or more for 8 ranks on all 2 nodes"),
    ],
)
def test_more_ranks_than_cores_are_a_warning(cores: int | None, level: Level, text: str) -> None:
    result = check_cores([replace(GOOD, node="n0", cores=16), replace(GOOD, node="n1", cores=cores)], NEEDS)
    assert result.level is level
    assert str(result).startswith(text)
