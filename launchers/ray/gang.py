"""The actors of one attempt: makes a placement group with one bundle and one actor per rank, and waits for the ranks."""

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launchers.command import JobPlan, RankCommand
from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts
from launchers.ray.nodes import NODE_ID, RayNode, assign
from launchers.ray.rank import RankActor, WorkerInfo
from moe_dist.errors import ConfigError, ResourceError, StoppedError
from moe_dist.runtime.signals import StopSignals

ANSWER_SECONDS = 60.0  # timeout for an actor to start and answer; a Ray worker starts in seconds
READY_SECONDS = 15.0  # timeout for a placement group on nodes that were just free
CONNECT_SECONDS = 2.0  # connection timeout to a node
LOOK_SECONDS = 2.0  # timeout for an actor to report whether its rank is suspended
TICK_SECONDS = 0.2
PATIENT_SECONDS = 5.0  # seconds before a wait is reported: Ray may still free earlier resources
HEAD = "node:__internal_head__"  # a resource that only the head node has
RETRY_SECONDS = 1.0
WAIT = "wait"  # concurrency group of `RankActor.wait`, which blocks until the rank has ended
_CONNECTIONS = 32


class LostError(Exception):
    """An actor or a node was lost before the attempt began."""


class Gang:
    """The actors of one attempt. Each attempt makes a new placement group, because for many seconds after a node has died
    Ray still reports a group on that node as ready.

    Args:
        nodes: The Ray node of each planned node.
        bundle: Resources of one rank.
    """

    def __init__(self, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> None:
        self._job, self._nodes = job, nodes
        self.workers: list[WorkerInfo] = []
        self._actors: list[Any] = []
        labels = [{**job.node_of(r).ray_labels, NODE_ID: self._node(r).node_id} for r in range(job.world_size)]
        self._group = placement_group([dict(bundle)] * job.world_size, bundle_label_selector=labels)
        self._bundle = bundle

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names in the order of the plan."""
        return tuple(node.host for node in self._nodes)

    def gather(self, paths: Sequence[str]) -> None:
        """Starts the actors and waits until each one has answered.

        Raises:
            LostError: another job uses a node, or a node is lost.
            ConfigError: one of the `paths` does not exist on a node.
        """
        if not self._group.wait(READY_SECONDS):  # another job may have taken the nodes since they were chosen
            raise LostError("another job has taken the chosen nodes")
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={WAIT: 1})(RankActor)  # pyright: ignore
        size = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0)}
        for rank in range(self._job.world_size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self._actors.append(actor.options(**size, max_concurrency=4, scheduling_strategy=place).remote(rank))
        try:
            self.workers = ray.get([each.worker.remote(paths) for each in self._actors], timeout=ANSWER_SECONDS)
        except (RayActorError, GetTimeoutError) as error:
            raise LostError(f"an actor did not start ({type(error).__name__})") from error
        for rank, worker in enumerate(self.workers):
            if worker.missing:
                raise ConfigError(
                    f"rank {rank} on {worker.host}: {', '.join(worker.missing)} does not exist there; run.root, data.path "
                    "and a configuration outside the job's working directory must be on a file system that all nodes share "
                    "(docs/ray.md)"
                )

    def start(self, commands: Sequence[RankCommand], logs: Sequence[Path]) -> None:
        """Starts the ranks. Raises LostError if an actor is lost."""
        started = [
            actor.start.remote(command.argv, command.env, str(log), command.rank == 0)
            for actor, command, log in zip(self._actors, commands, logs, strict=True)
        ]
        try:
            ray.get(started, timeout=ANSWER_SECONDS)
        except (RayError, GetTimeoutError) as error:
            first, _, _ = str(error).strip().partition("\n")  # further lines are Ray's traceback
            raise LostError(f"a rank could not be started: {first}") from error

    def supervise(self, signals: StopSignals, timeouts: ShutdownTimeouts) -> Outcome:
        """Blocks until all ranks have ended, or are lost with their node or Ray worker."""
        tracker = RankTracker(len(self._actors), timeouts, say=lambda text: print(text, file=sys.stderr, flush=True))
        running = {actor.wait.options(concurrency_group=WAIT).remote(): rank for rank, actor in enumerate(self._actors)}
        while not tracker.over:
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=TICK_SECONDS)  # one call for all ranks
            for reference in ended:
                rank = running.pop(reference)
                code, lost = self._code(rank, reference)
                tracker.end(rank, code, time.monotonic(), frozen=lambda: self._frozen(running.values()), lost=lost)
            for number in tracker.signals_due(signals, time.monotonic()):
                if number == signal.SIGKILL:
                    self._end_the_rest(tracker, running)
                for rank in running.values():
                    self._actors[rank].send.remote(number)  # does not wait for the actor
        return tracker.outcome(signals.first)

    def close(self) -> None:
        """Kills the actors, and with them all ranks that still run."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)  # frees the bundles for the next attempt

    def _node(self, rank: int) -> RayNode:
        return self._nodes[self._job.node_of(rank).index]

    def _code(self, rank: int, reference: Any) -> tuple[int, str]:
        """Returns (exit code of a rank, ''); if its Ray worker or node is lost, (code of SIGKILL, description)."""
        try:
            return ray.get(reference), ""
        except RayError:
            node = self._node(rank)
            worker_died = takes_connections(node)
            what = "its Ray worker died (killed, out of memory?) on" if worker_died else "it was lost with its node"
            return -signal.SIGKILL, f"{what} {node.address}"

    def _frozen(self, ranks: Collection[int]) -> tuple[int, ...]:
        calls = {self._actors[rank].frozen.remote(): rank for rank in ranks}
        if not calls:
            return ()
        answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=LOOK_SECONDS)
        frozen = []
        for reference in answered:
            with contextlib.suppress(RayError):
                if ray.get(reference):
                    frozen.append(calls[reference])
        return tuple(sorted(frozen))

    def _end_the_rest(self, tracker: RankTracker, running: dict[Any, int]) -> None:
        """Kills the actors of all running ranks. A rank whose node does not answer is lost, and so it is the cause."""
        for rank in running.values():
            ray.kill(self._actors[rank])
            node = self._node(rank)
            lost = "" if takes_connections(node) else f"its node {node.address} does not answer"
            tracker.end(rank, -signal.SIGKILL, time.monotonic(), frozen=tuple, lost=lost)
        running.clear()


def gather_gang(
    job: JobPlan,
    bundle: Mapping[str, float],
    paths: Sequence[str],
    *,
    together: Sequence[tuple[int, ...]] = (),
    wait_seconds: float,
    signals: StopSignals,
    say: Callable[[str], None],
) -> Gang:
    """Chooses nodes and starts an actor for each rank; repeats this until all actors have answered.

    Args:
        paths: Files and folders that must exist on every node.
        together: Groups of planned nodes that must share a fast-interconnect domain.
        wait_seconds: Time limit for nodes that the cluster lacks. There is no limit for nodes that other jobs use.
        say: Prints a message about waiting; no message is printed twice.

    Raises:
        ConfigError: a path does not exist on a node.
        ResourceError: the cluster lacks the nodes of the plan.
        StoppedError: a stop signal came during the wait.
    """
    began, printed = time.monotonic(), set[str]()

    def say_once(text: str) -> None:
        if text not in printed and time.monotonic() - began >= PATIENT_SECONDS:
            printed.add(text)
            say(text)

    while True:
        if signals.first is not None:
            raise StoppedError(f"{signals.first.name} came while the job waited for its nodes; start the run again")
        assignment = assign(job, live_nodes(), bundle, together)
        if assignment.problems:
            if time.monotonic() - began >= wait_seconds:
                raise ResourceError(assignment.problems, see="docs/ray.md")
            say_once(f"waiting {wait_seconds:g} s for nodes: {assignment.problems[0]}")
        elif assignment.waits_for:
            ranks = [str(rank) for node in assignment.waits_for for rank in node.ranks]
            say_once(f"waiting for nodes that other jobs use, for the ranks {', '.join(ranks)}")
        else:
            gang = Gang(job, assignment.nodes, bundle)
            try:
                gang.gather(paths)
                return gang
            except LostError as error:
                gang.close()
                say_once(f"{error}; choosing nodes again")
            except BaseException:
                gang.close()
                raise
        time.sleep(RETRY_SECONDS)


def live_nodes() -> list[RayNode]:
    """The Ray nodes that accept a connection now; the head node is last. Ray itself notices a lost node late."""
    free = ray._private.state.available_resources_per_node()  # pyright: ignore  # Ray has no public function for this
    nodes = [
        RayNode(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            labels=node["Labels"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:  # in parallel: each lost node costs the full timeout
        answers = list(pool.map(takes_connections, nodes))
    alive = [node for node, answer in zip(nodes, answers, strict=True) if answer]
    return sorted(alive, key=lambda node: (HEAD in node.total, node.address, node.node_id))


def takes_connections(node: RayNode) -> bool:
    """True if the raylet of a node accepts a connection."""
    with contextlib.suppress(OSError):
        socket.create_connection((node.address, node.port), CONNECT_SECONDS).close()
        return True
    return False
