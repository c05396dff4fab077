"""The Ray driver chooses nodes and starts actors. It waits for nodes, replaces nodes where actors fail, and asks the
autoscaler for nodes. Ray is a stand-in."""

import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from launchers.command import JobPlan, NodePlan, RankCommand
from launchers.rank_tracker import ShutdownTimeouts
from launchers.ray import gang as ray_gang
from launchers.ray.gang import Gang, LostError, gather_gang
from launchers.ray.nodes import RayNode
from launchers.ray.rank import WorkerInfo
from moe_dist.errors import ResourceError, StoppedError
from moe_dist.runtime.signals import StopSignals

TWO = JobPlan((NodePlan(0, (0,)), NodePlan(1, (1,))))
CPU = {"CPU": 1.0}


def node(name: str) -> RayNode:
    return RayNode(name, f"{name}.site", f"10.0.0.{name}", 1, {}, CPU, CPU)


@dataclass
class Cluster:
    """A cluster whose clock advances only when the driver sleeps.

    Attributes:
        nodes: Names of the live nodes.
        broken: Nodes where no actor starts.
        grows: Whether the autoscaler starts node 9 when nodes are requested.
        requests: Placement groups that are waiting for nodes.
        tried: The nodes of each attempt to start a gang.
    """

    nodes: list[str]
    broken: tuple[str, ...] = ()
    grows: bool = False
    now: float = 0.0
    requests: list[list[dict[str, float]]] = field(default_factory=list)
    requested: int = 0
    tried: list[list[str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def gather(self, job: JobPlan = TWO, **options: Any) -> list[str]:
        """Returns the nodes on which the actors of a job have started."""
        with StopSignals() as signals:
            settings: dict[str, Any] = {"wait_seconds": 5.0, **options}
            return gather_gang(job, CPU, [], "data", signals=signals, say=self.said.append, **settings).hosts  # pyright: ignore

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.requests and self.grows:
            self.nodes.append("9")
            self.grows = False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(["1", "2"])

    class Group:
        def __init__(self, sizes: list[dict[str, float]], strategy: str, bundle_label_selector: list[object]) -> None:
            assert (strategy, len(bundle_label_selector)) == ("STRICT_SPREAD", len(sizes))
            self.sizes = sizes
            cluster.requests.append(sizes)
            cluster.requested += 1

        def wait(self, seconds: float) -> bool:
            cluster.sleep(seconds)
            return len(cluster.nodes) >= len(self.sizes)

    class StandIn(Gang):
        def __init__(self, job: JobPlan, nodes: Sequence[RayNode], bundle: object) -> None:
            self.job, self._nodes = job, nodes

        def gather(self, paths: Sequence[str], data: str, signals: StopSignals) -> None:
            assert not cluster.requests, "a request holds the resources that the actors need"
            cluster.tried.append([each.node_id for each in self._nodes])
            cluster.now += 1.0
            faults = {each.node_id: f"rank ? on {each}: No module named 'x'" for each in self._nodes}
            if faults := {name: text for name, text in faults.items() if name in cluster.broken}:
                raise LostError("; ".join(faults.values()), faults)

        def close(self) -> None: ...

    monkeypatch.setattr(ray_gang, "placement_group", Group)
    monkeypatch.setattr(ray_gang, "remove_placement_group", lambda group: cluster.requests.remove(group.sizes))
    monkeypatch.setattr(ray_gang, "Gang", StandIn)
    monkeypatch.setattr(
        ray_gang, "live_nodes", lambda exclude: [node(name) for name in cluster.nodes if name not in exclude]
    )
    monkeypatch.setattr(ray_gang.time, "monotonic", lambda: cluster.now)
    monkeypatch.setattr(ray_gang.time, "sleep", cluster.sleep)
    return cluster


def test_a_node_where_no_actor_starts_is_named_with_the_cause_after_a_few_tries(cluster: Cluster) -> None:
    cluster.broken = ("2",)
    with pytest.raises(ResourceError) as raised:
        cluster.gather(wait_seconds=30.0)
    assert cluster.tried == [["1", "2"]] * 3
    assert "on 10.0.0.2 (no labels): No module named 'x' (tries: 3); repair this node" in raised.value.problems[0]
    assert 30.0 <= cluster.now < 35.0
    assert not cluster.requests


def test_another_node_replaces_one_where_no_actor_starts(cluster: Cluster) -> None:
    cluster.nodes, cluster.broken = ["1", "2", "3"], ("1",)
    assert cluster.gather() == ("2.site", "3.site")
    assert cluster.tried == [["1", "2"], ["2", "3"]]


def test_nodes_at_fault_are_used_last_and_excluded_ones_never(cluster: Cluster) -> None:
    cluster.nodes = ["1", "2", "3"]
    assert cluster.gather(avoid={"1"}) == ("2.site", "3.site")
    assert cluster.gather(avoid={"1", "2"}) == ("3.site", "1.site")
    with pytest.raises(ResourceError):
        cluster.gather(exclude=("2", "3"))


def test_an_autoscaler_is_asked_for_the_planned_nodes_and_the_request_is_withdrawn(cluster: Cluster) -> None:
    cluster.nodes, cluster.grows = ["1"], True
    assert cluster.gather() == ("1.site", "9.site")
    assert (cluster.requested, cluster.requests) == (1, [])

    cluster.nodes = []
    with pytest.raises(ResourceError):
        cluster.gather()
    assert (cluster.requested, cluster.requests) == (2, []), "withdrawn after an error, too"


def test_uneven_nodes_exceed_the_sites_limit_only_when_the_wait_is_over(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    four, two = (RayNode(name, name, name, 1, {}, {"CPU": cpus}, {"CPU": cpus}) for name, cpus in (("a", 4.0), ("b", 2.0)))
    monkeypatch.setattr(ray_gang, "live_nodes", lambda exclude: [two, four])
    job = JobPlan((NodePlan(0, (0, 1, 2)), NodePlan(1, (3, 4, 5))))
    assert cluster.gather(job) == ("a", "b")
    assert cluster.now >= 5.0


def test_actors_that_fail_or_do_not_answer_are_told_apart_by_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 answers, rank 2 does not, and ranks 1 and 3 die on a node that they share. A stop signal ends the wait."""

    class Actor:
        def __init__(self, rank: int) -> None:
            self.worker = SimpleNamespace(remote=lambda *_: rank)

    def get(rank: int) -> WorkerInfo:
        if rank in (1, 3):
            raise RayActorError("1", f"died\nModuleNotFoundError: No module named 'x{rank}'")
        return WorkerInfo(str(rank), "host", {}, ())

    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=Actor))
    monkeypatch.setattr(ray_gang, "placement_group", lambda *_, **__: SimpleNamespace(wait=lambda seconds: True))
    monkeypatch.setattr(ray_gang, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
    monkeypatch.setattr(ray_gang.ray, "remote", lambda **_: lambda cls: made)
    monkeypatch.setattr(ray_gang.ray, "wait", lambda answers, **_: ([each for each in answers if each != 2], [2]))
    monkeypatch.setattr(ray_gang.ray, "get", get)
    monkeypatch.setattr(ray_gang.time, "monotonic", itertools.count(0.0, 100.0).__next__)
    job = JobPlan((NodePlan(0, (0,)), NodePlan(1, (1, 3)), NodePlan(2, (2,))))
    with StopSignals() as signals, pytest.raises(LostError) as raised:
        ray_gang.Gang(job, [node("1"), node("2"), node("3")], CPU).gather([], "data", signals)
    assert raised.value.faults == {
        "2": "the actor of rank 1 did not start on 10.0.0.2 (no labels): ModuleNotFoundError: No module named 'x1'",
        "3": "the actor of rank 2 did not start on 10.0.0.3 (no labels): no answer in 300 s",
    }
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError):
            ray_gang.Gang(TWO, [node("1"), node("2")], CPU).gather([], "data", signals)


def test_a_rank_that_does_not_start_is_the_cause_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[signal.Signals] = []

    def actor(rank: int) -> SimpleNamespace:
        ends = SimpleNamespace(remote=lambda: f"end of {rank}")
        starts = SimpleNamespace(remote=lambda *_: f"start of {rank}")
        return SimpleNamespace(
            start=starts, wait=SimpleNamespace(options=lambda **_: ends), send=SimpleNamespace(remote=sent.append)
        )

    def get(call: str) -> tuple[int, str]:
        if call == "start of 1":
            raise RayActorError("1", "died\nRuntimeError: n2: /opt/python could not be started")
        return -signal.SIGTERM, "memory limit reached"

    def wait(calls: list[str], **_: object) -> tuple[list[str], list[str]]:
        return (calls, []) if sent or "start of 0" in calls else ([], calls)

    monkeypatch.setattr(ray_gang, "placement_group", lambda *_, **__: None)
    monkeypatch.setattr(ray_gang.ray, "wait", wait)
    monkeypatch.setattr(ray_gang.ray, "get", get)
    gang = Gang(TWO, [node("1"), node("2")], CPU)
    gang._actors = [actor(0), actor(1)]
    commands = [RankCommand(rank, rank, ("/opt/python",), {}) for rank in range(2)]
    with StopSignals() as signals:
        outcome = gang.run(commands, [Path("0"), Path("1")], signals, ShutdownTimeouts(stop=9.0, peers=0.0))
    assert sent == [signal.SIGTERM]
    assert (outcome.codes, outcome.cause(), outcome.hosts) == ((-15, -9), 1, ("10.0.0.1", "10.0.0.2"))
    assert outcome.words == {0: "memory limit reached"}
    why = "it did not start on 10.0.0.2 (no labels): RuntimeError: n2: /opt/python could not be started"
    assert outcome.lost == {1: why}
