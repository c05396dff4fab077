"""The actors of one attempt: a fresh placement group with a bundle for each rank, one actor in each, and how they end.

A placement group is never used again. For many seconds after a node has died Ray still calls a group on it ready; so an
attempt counts only once every actor has answered, and nodes are asked themselves whether they are there.
"""

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
from launchers.ending import Outcome, RankTracker, ShutdownTimeouts
from launchers.ray.nodes import NODE_ID, RayNode, assign
from launchers.ray.rank import RankActor, WorkerInfo
from launchers.supervise import StopSignals
from moe_dist.errors import ConfigError, PlacementError, StoppedError

ANSWER_SECONDS = 60.0  # for an actor to start and answer: a worker of Ray starts in seconds
READY_SECONDS = 15.0  # for a placement group whose nodes were free a moment ago
CONNECT_SECONDS = 2.0  # for a node to take a connection
LOOK_SECONDS = 2.0  # for an actor to say whether its rank stands still
TICK_SECONDS = 0.2
PATIENT_SECONDS = 5.0  # of waiting without a word: what an earlier attempt had is given back in that time
HEAD = "node:__internal_head__"  # a resource of the head alone
RETRY_SECONDS = 1.0
WAIT = "wait"  # the concurrency group of the call that lasts as long as the rank
_CONNECTIONS = 32


class LostError(Exception):
    """An actor or a node was gone before the attempt began."""


class Gang:
    """The actors of one attempt, from a fresh placement group to `close`.

    Args:
        nodes: For each node of the plan the node of Ray.
        bundle: Resources of a rank.
    """

    def __init__(self, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> None:
        self._job, self._nodes = job, nodes
        self.seats: list[WorkerInfo] = []
        self._actors: list[Any] = []
        labels = [{**job.node_of(r).ray_labels, NODE_ID: self._node(r).node_id} for r in range(job.world_size)]
        self._group = placement_group([dict(bundle)] * job.world_size, bundle_label_selector=labels)
        self._bundle = bundle

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the nodes, in the order of the plan."""
        return tuple(node.host for node in self._nodes)

    def gather(self, paths: Sequence[str]) -> None:
        """Starts the actors and waits until each has answered.

        Args:
            paths: What every rank must see.

        Raises:
            LostError: a node was taken or is gone.
            ConfigError: a path is not there.
        """
        if not self._group.wait(READY_SECONDS):
            raise LostError("the nodes that were free a moment ago are taken")
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={WAIT: 1})(RankActor)  # pyright: ignore
        size = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0)}
        for rank in range(self._job.world_size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self._actors.append(actor.options(**size, max_concurrency=4, scheduling_strategy=place).remote(rank))
        try:
            self.seats = ray.get([each.worker.remote(paths) for each in self._actors], timeout=ANSWER_SECONDS)
        except (RayActorError, GetTimeoutError) as error:
            raise LostError(f"an actor did not come up ({type(error).__name__})") from error
        for rank, worker in enumerate(self.seats):
            if worker.missing:
                raise ConfigError(
                    f"rank {rank} on {worker.host} does not see {', '.join(worker.missing)}; run.root, data.path and a "
                    "configuration outside the job's working directory must be folders that all nodes share (docs/ray.md)"
                )

    def start(self, commands: Sequence[RankCommand], logs: Sequence[Path]) -> None:
        """Starts the ranks.

        Raises:
            LostError: an actor is gone.
        """
        started = [
            actor.start.remote(command.argv, command.env, str(log), command.rank == 0)
            for actor, command, log in zip(self._actors, commands, logs, strict=True)
        ]
        try:
            ray.get(started, timeout=ANSWER_SECONDS)
        except (RayError, GetTimeoutError) as error:
            raise LostError(f"a rank could not be started: {_first_line(error)}") from error

    def see_through(self, signals: StopSignals, timeouts: ShutdownTimeouts) -> Outcome:
        """Returns when all ranks have ended, or what held them is gone."""
        course, told = RankTracker(len(self._actors), timeouts), False
        running = {actor.wait.options(concurrency_group=WAIT).remote(): rank for rank, actor in enumerate(self._actors)}
        while not course.over:
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=TICK_SECONDS)
            for reference in ended:
                rank = running.pop(reference)
                code, lost = self._code(rank, reference)
                course.end(rank, code, time.monotonic(), frozen=lambda: self._frozen(running.values()), lost=lost)
            if signals.first is not None and not told:
                told = True
                print(f"{signals.first.name}: saving, then stopping", file=sys.stderr, flush=True)
                self._send(signals.first, running.values())
                course.stop(time.monotonic())
            if signals.interrupts > 1:
                course.abort(time.monotonic())
            if course.must_terminate(time.monotonic()):
                self._send(signal.SIGTERM, running.values())
            if course.must_kill(time.monotonic()):
                self._end_the_rest(course, running)
        return course.outcome(signals.first)

    def close(self) -> None:
        """Ends the actors, and with them what is left of the ranks."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _node(self, rank: int) -> RayNode:
        return self._nodes[self._job.node_of(rank).index]

    def _code(self, rank: int, reference: Any) -> tuple[int, str]:
        """How a rank ended, and where what held it is gone, that in words."""
        try:
            return ray.get(reference), ""
        except RayError:
            node = self._node(rank)
            what = (
                "its Ray worker died (killed, out of memory?) on"
                if takes_connections(node)
                else "it was lost with its node"
            )
            return -signal.SIGKILL, f"{what} {node.address}"

    def _frozen(self, ranks: Collection[int]) -> tuple[int, ...]:
        asked = {self._actors[rank].frozen.remote(): rank for rank in ranks}
        if not asked:
            return ()
        told, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
        frozen = []
        for reference in told:
            with contextlib.suppress(RayError):
                if ray.get(reference):
                    frozen.append(asked[reference])
        return tuple(sorted(frozen))

    def _send(self, number: signal.Signals, ranks: Collection[int]) -> None:
        for rank in ranks:
            self._actors[rank].send.remote(number)

    def _end_the_rest(self, course: RankTracker, running: dict[Any, int]) -> None:
        """Ranks that are late are killed with their actors; one whose node does not answer was lost, and is the cause."""
        for rank in running.values():
            ray.kill(self._actors[rank])
            node = self._node(rank)
            lost = "" if takes_connections(node) else f"its node {node.address} does not answer"
            course.end(rank, -signal.SIGKILL, time.monotonic(), frozen=tuple, lost=lost)
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
    """Chooses nodes and brings up an actor for each rank, anew until all have answered.

    Args:
        paths: What every rank must see.
        together: Nodes of the plan that must share a domain.
        wait_seconds: How long nodes are waited for that the cluster does not have; those that others use are waited for
            without end.
        say: Told for what it waits, once.

    Raises:
        ConfigError: a path is not there.
        PlacementError: the cluster does not have the nodes.
        StoppedError: asked to stop while waiting.
    """
    began, told = time.monotonic(), set[str]()

    def say_once(text: str) -> None:
        if text not in told and time.monotonic() - began >= PATIENT_SECONDS:
            told.add(text)
            say(text)

    while True:
        if signals.first is not None:
            raise StoppedError(f"{signals.first.name} came while the job waited for its nodes; start me again")
        assignment = assign(job, live_nodes(), bundle, together)
        if assignment.problems:
            if time.monotonic() - began >= wait_seconds:
                raise PlacementError(assignment.problems, see="docs/ray.md")
            say_once(f"waiting {wait_seconds:g} s for nodes: {assignment.problems[0]}")
        elif assignment.waits_for:
            ranks = [str(rank) for node in assignment.waits_for for rank in node.ranks]
            say_once(f"waiting for nodes that others use, for the ranks {', '.join(ranks)}")
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
    """The nodes that take a connection at this moment, the head last: Ray learns late that a node is gone."""
    free = ray._private.state.available_resources_per_node()  # pyright: ignore  # there is no public way to ask
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
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        answers = list(pool.map(takes_connections, nodes))
    alive = [node for node, answer in zip(nodes, answers, strict=True) if answer]
    return sorted(alive, key=lambda node: (HEAD in node.total, node.address, node.node_id))


def takes_connections(node: RayNode) -> bool:
    """Whether the raylet of a node is there."""
    with contextlib.suppress(OSError):
        socket.create_connection((node.address, node.port), CONNECT_SECONDS).close()
        return True
    return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
