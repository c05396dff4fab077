"""Trains the default model on 4 ranks of a Ray cluster of 4 labelled nodes while workers and nodes are killed."""

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_dist.errors import ConfigError, ResourceError
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.clusters.conftest import HOSTED
from tests.support import ray_cluster
from tests.support.ray_cluster import INTERLEAVED, MODALITIES, Driver, RayCluster, overrides, steps
from tests.support.shape import drawn

STEPS = 12
SAVES = "checkpoint.every=3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster.environment() as folder:
        standing = RayCluster(folder)
        try:
            yield standing
        finally:
            standing.close()
            ray_cluster.end_all(folder)


def driver(
    cluster: RayCluster, root: Path, name: str, *more: str, steps: int = STEPS, module: str = "launchers.ray"
) -> Driver:
    mark = ("--", ray_cluster.MARK) if module != "launchers.ray" else ("--env", ray_cluster.MARK)
    arguments = overrides(root, name, steps, SAVES, INTERLEAVED, *more)
    return Driver(module, cluster.address, RunFolder(root / name), *arguments, *mark, log=root / f"{name}.out")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster, root: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Returns the step records of an undisturbed run, the observations during the run, and its driver's output."""
    job = driver(cluster, root, "undisturbed")
    job.wait_for_step(2)
    ranks = job.ranks()
    listens = [each.laddr.ip for each in psutil.Process(ranks[0]).net_connections("tcp") if each.status == "LISTEN"]
    seen: dict[str, Any] = {"slots": {rank: cluster.slot_of(pid) for rank, pid in ranks.items()}, "listens": listens}
    job.wait_until(lambda: "ray_moe_dist_loss" in scraped(cluster, seen["slots"][0]), "metrics reach Ray")
    assert job.wait() == 0, job.printed
    return steps(job.run), seen, job.printed


def scraped(cluster: RayCluster, slot: int) -> str:
    """Returns the text that Prometheus would read from a node."""
    return urllib.request.urlopen(f"http://{cluster.metrics_address(slot)}/metrics", timeout=10).read().decode()


def test_ranks_are_where_an_interleaved_plan_wants_them_whatever_order_the_nodes_have(
    undisturbed: tuple[list[dict[str, Any]], dict[str, Any], str],
) -> None:
    records, seen, printed = undisturbed
    assert [line["step"] for line in records] == list(range(1, STEPS + 1))
    slots = seen["slots"]
    assert sorted(slots.values()) == [0, 1, 2, 3]  # one rank per node
    assert [MODALITIES[slots[rank]] for rank in range(4)] == ["image", "text", "image", "text"]
    for rank, experts in enumerate(("image/0-3", "text/0-3", "image/4-7", "text/4-7")):
        assert re.search(rf"│ +{rank} │ {experts} ", printed)
    # Only the node of rank 0 listens at the port where the ranks meet.
    assert ray_cluster.address(slots[0]) in seen["listens"]


def test_an_open_ray_is_warned_of_and_the_verdict_ends_the_log(
    undisturbed: tuple[list[dict[str, Any]], dict[str, Any], str],
) -> None:
    printed = undisturbed[2]
    assert "WARNING: exposure: Ray accepts connections from other machines (GCS at" in printed
    assert printed.rstrip().endswith("moe_dist ends with verdict 0")


def test_a_killed_worker_and_a_lost_node_cost_steps_and_change_no_bit(
    cluster: RayCluster, root: Path, undisturbed: tuple[list[dict[str, Any]], dict[str, Any], str]
) -> None:
    job = driver(cluster, root, "disturbed", module="tests.support.ray_launch")
    job.wait_for_step(4)
    victim = job.ranks()[2]
    os.kill(ray_cluster.actor_of(victim), signal.SIGKILL)
    job.wait_until(lambda: len(job.run.read_status().attempts) == 2, "a second attempt")
    job.wait_for_step(8)
    first = set(ray_cluster.marked(job.mark))
    slot = cluster.slot_of(job.ranks()[1])
    cluster.kill(slot)
    job.wait_until(lambda: "restart 2 of 20" in job.printed, "a second restart")
    job.wait_until(lambda: not (first & set(ray_cluster.marked(job.mark))) - {job.process.pid}, "the old ranks are gone")
    cluster.replace(slot)
    assert job.wait() == 0, job.printed

    attempts = job.run.read_status().attempts
    assert [(each.verdict, each.restarts) for each in attempts] == [(1, 0), (1, 1), (0, 2)]
    assert attempts[0].rank == 2
    assert "its Ray worker died" in attempts[0].reason
    assert attempts[1].rank == 1
    assert f"lost with its node {ray_cluster.address(slot)}" in attempts[1].reason
    assert list(map(reproducible_part, steps(job.run))) == list(map(reproducible_part, undisturbed[0]))


@pytest.mark.exhaustive
def test_a_model_of_transformers_goes_on_after_a_rank_is_killed(cluster: RayCluster, root: Path) -> None:
    def start(name: str) -> Driver:
        arguments = ray_cluster.overrides(root, name, STEPS, SAVES, "--env", ray_cluster.MARK)
        run, log = RunFolder(root / name), root / f"{name}.out"
        return Driver("launchers.ray", cluster.address, run, *arguments, log=log, config=HOSTED)

    whole = start("hosted_undisturbed")
    assert whole.wait() == 0, whole.printed
    job = start("hosted")
    job.wait_for_step(4)
    os.kill(job.ranks()[2], signal.SIGKILL)
    assert job.wait() == 0, job.printed
    assert [each.verdict for each in job.run.read_status().attempts] == [1, 0]
    assert list(map(reproducible_part, steps(job.run))) == list(map(reproducible_part, steps(whole.run)))


def test_a_node_where_no_actor_starts_is_named_with_the_cause_and_not_tried_for_ever(
    cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "rich.py").write_text("raise ImportError('no rich on this node')\n")
    cluster.kill(3)
    cluster.replace(3, PYTHONPATH=str(tmp_path))
    try:
        job = driver(cluster, root, "broken", "--wait-for-nodes=60")
        assert job.wait() == ResourceError.exit_code
    finally:
        cluster.kill(3)
        cluster.replace(3)
    where = rf"{re.escape(ray_cluster.address(3))} \(modality=image,slot=3\)"
    named = rf"the actor of rank \d did not start on {where}: ImportError: no rich on this node"
    assert re.search(rf"{named} \(tries: [123]\); repair this node", job.printed), job.printed
    assert job.printed.count("choosing nodes again") <= 3
    assert len(job.printed.splitlines()) < 1000, "Ray itself prints the traceback of each actor in each try"


def test_nothing_outlives_a_killed_driver_and_its_command_goes_on_until_a_rank_fails(
    cluster: RayCluster, root: Path
) -> None:
    job = driver(cluster, root, "orphaned", module="tests.support.ray_launch")
    job.wait_for_step(4)
    assert len(ray_cluster.marked(job.mark)) > 4 * 2  # each rank has started a process in another session
    job.process.kill()
    job.process.wait()
    job.wait_until(lambda: not ray_cluster.marked(job.mark), "processes of the run are left", alive=False)

    again = driver(cluster, root, "orphaned", "--max-restarts=0", steps=1000)
    again.wait_for_step(8)
    os.kill(again.ranks()[3], signal.SIGSEGV)
    assert again.wait() == 1, again.printed
    assert "rank 3 failed first (killed by SIGSEGV)" in again.printed  # blames rank 3, not the ranks that failed later
    last = again.run.read_status().attempts[-1]
    assert (last.verdict, last.rank) == (1, 3)
    assert [line["step"] for line in steps(again.run)] == list(range(1, steps(again.run)[-1]["step"] + 1))


# One rank runs on one of the two text nodes. The other rank runs on one of the two image nodes.
TWO_RANKS = (
    "parallel.ep=2",
    "placement.groups={text: {ranks: [0], node: {labels: {modality: text}}}, "
    "image: {ranks: [1], node: {labels: {modality: image}}}}",
)


def pretended(cluster: RayCluster, root: Path, name: str, ends: str, *, max_restarts: int = 20) -> Driver:
    """Starts a run of two ranks that end as `ends` says and do not import torch."""
    site = root / f"{name}.yaml"
    site.write_text(f"{Path(os.environ['MOE_DIST_CLUSTER']).read_text()}max_restarts: {max_restarts}\n")
    arguments = [*overrides(root, name, 100, *TWO_RANKS), "--", ray_cluster.MARK, "PRETEND"]
    variables = {"PRETEND": ends, "MOE_DIST_CLUSTER": str(site)}
    run, log = RunFolder(root / name), root / f"{name}.out"
    return Driver("tests.support.ray_launch", cluster.address, run, *arguments, log=log, **variables)


def ends(job: Driver) -> list[tuple[int | None, int]]:
    return [(each.verdict, each.restarts) for each in job.run.read_status().attempts]


def test_each_fault_of_a_rank_is_followed_by_an_attempt_on_another_node(cluster: RayCluster, root: Path) -> None:
    victims = [rank % 2 for rank in drawn().victims]
    faults = "kill:{}+1 freeze:{}+1 exit:{}+1 gpu+1 close".format(*victims)
    job = pretended(cluster, root, "faults", faults, max_restarts=4)
    assert job.wait() == 0, job.printed
    assert ends(job) == [(1, 0), (1, 1), (1, 2), (1, 3), (0, 4)]
    killed, frozen, left, gpu, _ = job.run.read_status().attempts
    assert re.match(rf"rank {victims[0]} on \S+: killed by SIGKILL", killed.reason)
    assert re.match(rf"rank {victims[1]} on \S+: frozen by SIGSTOP", frozen.reason)
    assert re.match(rf"rank {victims[2]} on \S+: exit code 3", left.reason)
    assert [each.rank for each in (killed, frozen, left)] == victims
    assert not list(Path(os.environ["TMPDIR"]).glob("moe_dist_*")), "scratch folders of rank 0 are deleted"
    assert (gpu.rank, gpu.reason) == (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered")
    first, second, *_ = re.findall(rf"^(\d+\.\S+) +{victims[0]} ", job.printed, re.MULTILINE)
    assert second != first, "the node at fault is used last"
    assert "closed" in job.run.log_of(0).read_text(), "rank 1 had ended long before"


def test_a_wrong_configuration_ends_a_run_at_once(cluster: RayCluster, root: Path) -> None:
    job = pretended(cluster, root, "wrong", "config")
    assert job.wait() == ConfigError.exit_code, job.printed
    assert ends(job) == [(ConfigError.exit_code, 0)]


def test_the_run_goes_on_elsewhere_when_the_node_of_rank_0_is_lost_as_often_as_max_restarts_allows(
    cluster: RayCluster, root: Path
) -> None:
    job = pretended(cluster, root, "first_node", "wait fail+1", max_restarts=1)
    logs = [job.run.log_of(rank) for rank in range(2)]
    job.wait_until(lambda: all(log.exists() and "is here" in log.read_text() for log in logs), "both ranks are up")
    slot = cluster.slot_of(job.ranks()[0])
    cluster.kill(slot)
    try:
        assert job.wait() == 1, job.printed
    finally:
        cluster.replace(slot)
    assert ends(job) == [(1, 0), (1, 1)]
    lost = job.run.read_status().attempts[0]
    assert (lost.rank, lost.reason) == (0, f"rank 0: lost with its node {ray_cluster.address(slot)}")
    assert "restart 1 of 1, from the beginning: rank 0: lost with its node" in job.printed
    assert "not restarted: it was restarted 1 times already" in job.printed


def test_a_plan_that_nobody_can_satisfy_names_rank_and_label(cluster: RayCluster, root: Path) -> None:
    wish = "placement.groups.image.node.labels={modality: video}"
    job = driver(cluster, root, "nowhere", wish)
    assert job.wait() == ResourceError.exit_code, job.printed
    assert "rank 0 (experts of image): the cluster has no node with the label modality=video; " in job.printed
    assert not job.run.status_json.exists()
