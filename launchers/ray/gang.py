"""For each attempt, makes a placement group with a bundle and an actor per rank, starts the ranks and waits for them."""

import contextlib
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launchers.command import JobPlan, RankCommand
from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts
from launchers.ray.nodes import NODE_ID, Assignment, RayNode, assign
from launchers.ray.rank import RankActor, WorkerInfo
from moe_dist.errors import ConfigError, ResourceError, StoppedError
from moe_dist.runtime.signals import StopSignals

ANSWER_SECONDS = 300.0  # time limit for an actor's start and answer, which can take minutes with files on a slow disk
READY_SECONDS = 15.0  # timeout for a placement group on nodes that were just free
CONNECT_SECONDS = 2.0  # connection timeout to a node
LOOK_SECONDS = 2.0  # timeout for an actor to report whether its rank is suspended
TICK_SECONDS = 0.2
PATIENT_SECONDS = 5.0  # a shorter wait is not reported, because Ray may still be freeing resources of ended actors
HEAD = "node:__internal_head__"  # a resource that only the head node has
RETRY_SECONDS = 1.0
START_TRIES = 3  # a node is left out after this many failed starts of actors, or after one if the wait for nodes is over
WAIT = "wait"  # concurrency group of `RankActor.wait`, which blocks until the rank has ended
_CONNECTIONS = 32


class LostError(Exception):
    """An actor or a node was lost before the attempt began. `faults` maps Ray's id of a node to the reason why an actor
    did not start on the node."""

    def __init__(self, text: str, faults: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.faults = faults or {}


class Gang:
    """The actors of one attempt. Each attempt makes a new placement group, because after a node has died, Ray still reports
    the old group on that node as ready for many seconds."""

    def __init__(self, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> None:
        self.job, self._nodes = job, nodes
        self.workers: list[WorkerInfo] = []
        self._actors: list[Any] = []
        labels = [{**job.node_of(r).ray_labels, NODE_ID: self.node(r).node_id} for r in range(job.world_size)]
        self._group = placement_group([dict(bundle)] * job.world_size, bundle_label_selector=labels)
        self._bundle = bundle

    @property
    def hosts(self) -> tuple[str, ...]:
        """Returns the host names in the order of the plan."""
        return tuple(node.host for node in self._nodes)

    def gather(self, paths: Sequence[str], data: str, signals: StopSignals) -> None:
        """Starts the actors and waits until each one has answered.

        Raises:
            LostError: another job uses a node, or an actor did not start.
            ConfigError: the data, or one of the `paths`, do not exist on a node.
            StoppedError: a stop signal came before all actors had answered.
        """
        if not self._group.wait(READY_SECONDS):  # another job may have taken the chosen nodes
            raise LostError("another job has taken the chosen nodes")
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={WAIT: 1})(RankActor)  # pyright: ignore
        size = {"num_cpus": self._bundle["CPU"], "num_gpus": self._bundle.get("GPU", 0)}
        for rank in range(self.job.world_size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self._actors.append(actor.options(**size, max_concurrency=4, scheduling_strategy=place).remote(rank))
        faults: dict[str, str] = {}
        calls = [each.worker.remote(paths, data) for each in self._actors]
        for rank, (worker, error) in enumerate(_answers(calls, signals)):
            if error:
                _refuse_stop(signals)
                node = self.node(rank)
                faults.setdefault(node.node_id, f"the actor of rank {rank} did not start on {node}: {error}")
            else:
                self.workers.append(worker)
        if faults:
            raise LostError(next(iter(faults.values())), faults)
        for rank, worker in enumerate(self.workers):
            if worker.missing:
                raise ConfigError(
                    f"rank {rank} on {worker.host}: {', '.join(worker.missing)} does not exist there; run.root, data.path "
                    "and a configuration outside the job's working directory must be on a file system that all nodes share "
                    "(docs/ray.md)"
                )

    def run(
        self, commands: Sequence[RankCommand], logs: Sequence[Path], signals: StopSignals, timeouts: ShutdownTimeouts
    ) -> Outcome:
        """Starts the ranks. Blocks until each rank has ended, did not start, or is lost with its node or Ray worker.
        Returns the outcome."""
        tracker = RankTracker(len(self._actors), timeouts, say=lambda text: print(text, file=sys.stderr, flush=True))
        started = [
            actor.start.remote(command.argv, command.env, str(log), command.rank == 0)
            for actor, command, log in zip(self._actors, commands, logs, strict=True)
        ]
        for rank, (_, error) in enumerate(_answers(started, signals)):
            if error:  # the rank did not start; if a stop signal came, the signal counts as the cause
                lost = "" if signals.first else f"it did not start on {self.node(rank)}: {error}"
                tracker.end(rank, -(signals.first or signal.SIGKILL), time.monotonic(), frozen=tuple, lost=lost)
        running = {
            actor.wait.options(concurrency_group=WAIT).remote(): rank
            for rank, actor in enumerate(self._actors)
            if rank not in tracker.codes
        }
        while not tracker.over:
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=TICK_SECONDS)  # one call for all ranks
            for reference in ended:
                rank = running.pop(reference)
                code, words, lost = self._code(rank, reference)
                frozen = partial(self._frozen, running.values())
                tracker.end(rank, code, time.monotonic(), frozen=frozen, lost=lost, words=words)
            for number in tracker.signals_due(signals, time.monotonic()):
                if number == signal.SIGKILL:
                    self._end_the_rest(tracker, running)
                for rank in running.values():
                    self._actors[rank].send.remote(number)  # the call does not wait for the actor
        hosts = tuple(self.node(rank).address for rank in range(self.job.world_size))
        return replace(tracker.outcome(signals.first), hosts=hosts)

    def close(self) -> None:
        """Kills the actors, which also ends all ranks that still run."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)  # frees the bundles for the next attempt

    def node(self, rank: int) -> RayNode:
        return self._nodes[self.job.node_of(rank).index]

    def _code(self, rank: int, reference: Any) -> tuple[int, str, str]:
        """Returns (exit code, message about a memory limit, '') for an ended rank, and (code of SIGKILL, '', description)
        for a lost rank."""
        try:
            return *ray.get(reference), ""
        except RayError as error:
            node = self.node(rank)
            why = f"its Ray worker died on {node.address} ({last_line(error)})"
            return -signal.SIGKILL, "", why if takes_connections(node) else f"lost with its node {node.address}"

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
        """Kills the actors of all running ranks. A rank whose node does not answer counts as lost, and so as the rank at
        fault."""
        for rank in running.values():
            ray.kill(self._actors[rank])
            node = self.node(rank)
            lost = "" if takes_connections(node) else f"node {node.address} does not answer"
            tracker.end(rank, -signal.SIGKILL, time.monotonic(), frozen=tuple, lost=lost)
        running.clear()


def _answers(calls: Sequence[Any], signals: StopSignals) -> list[tuple[Any, str]]:
    """Returns (result, '') for each call of an actor's method; (None, error) if the call failed, or gave no result
    within ANSWER_SECONDS. A stop signal ends the wait for results."""
    deadline, waiting = time.monotonic() + ANSWER_SECONDS, list(calls)
    while waiting and signals.first is None and time.monotonic() < deadline:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=TICK_SECONDS)
    found: list[tuple[Any, str]] = []
    for call in calls:
        try:
            found.append((None, f"no answer in {ANSWER_SECONDS:g} s") if call in waiting else (ray.get(call), ""))
        except RayError as error:
            found.append((None, last_line(error)))
    return found


def _refuse_stop(signals: StopSignals) -> None:
    if signals.first is not None:
        raise StoppedError(f"{signals.first.name} came while the job waited for its nodes; start the run again")


def request_nodes(job: JobPlan, bundle: Mapping[str, float]) -> PlacementGroup:
    """Makes a placement group of the planned nodes. While the group is pending, an autoscaler starts the missing nodes.
    Ray removes the group when the driver ends. Ray's `request_resources` is not used, because such a request would outlast
    the driver and cannot ask for separate nodes."""
    sizes = [{name: len(node.ranks) * amount for name, amount in bundle.items()} for node in job.nodes]
    labels = [dict(node.ray_labels) for node in job.nodes]
    return placement_group(sizes, strategy="STRICT_SPREAD", bundle_label_selector=labels)


def gather_gang(
    job: JobPlan,
    bundle: Mapping[str, float],
    paths: Sequence[str],
    data: str,
    *,
    together: Sequence[tuple[int, ...]] = (),
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
    wait_seconds: float,
    signals: StopSignals,
    say: Callable[[str], None],
) -> Gang:
    """Chooses nodes and starts an actor for each rank. Repeats this until all actors have answered. While nodes are
    missing, requests the planned nodes from an autoscaler.

    Args:
        paths, data: Paths of new files and folders, and path of the data. All of them must exist on every node.
        together: Sets of planned nodes; the nodes of a set must share a fast-interconnect domain.
        exclude: Host names or addresses of nodes that must not be used.
        avoid: Ray's ids of nodes that are used only if the other nodes do not suffice.
        wait_seconds: Time limit of the wait for nodes that the cluster lacks. Before this limit, a node is left out only
            after START_TRIES failed starts of actors. The wait for nodes that other jobs use has no limit.
        say: Prints a message about waiting; no message is printed twice.

    Raises:
        ConfigError: a path does not exist on a node.
        ResourceError: the cluster lacks the nodes of the plan, or no actor starts on a node that the plan needs.
        StoppedError: a stop signal came during the wait.
    """
    began, printed = time.monotonic(), set[str]()
    faults: dict[str, list[str]] = {}  # Ray's id of a node -> a message for each failed start on this node

    def say_once(text: str) -> None:
        if text not in printed and time.monotonic() - began >= PATIENT_SECONDS:
            printed.add(text)
            say(text)

    request: PlacementGroup | None = None
    try:
        while True:
            _refuse_stop(signals)
            over = time.monotonic() - began >= wait_seconds
            live = live_nodes(exclude)
            tries = {node.node_id: len(faults.get(node.node_id, ())) for node in live}
            nodes = [node for node in live if tries[node.node_id] < (1 if over else START_TRIES)]
            nodes.sort(key=lambda node: (node.node_id in avoid, tries[node.node_id]))
            # During the wait for nodes, no node gets more ranks than the cluster file allows. After the wait for nodes,
            # more ranks on a node are better than an error.
            most = None if over else job.ranks_per_node
            assignment = assign(job, nodes, bundle, together, most=most)
            if assignment.problems and over:
                raise ResourceError([*_start_problems(faults), *assignment.problems], see="docs/ray.md")
            if request is not None and (assignment.nodes or request.wait(RETRY_SECONDS)):
                remove_placement_group(request)  # the actors need the resources of this group
                request = None
            elif not assignment.nodes:
                request = request or request_nodes(job, bundle)
            if not assignment.nodes:
                say_once(_waiting_text(assignment, wait_seconds))
            else:
                gang = Gang(assignment.job, assignment.nodes, bundle)
                try:
                    gang.gather(paths, data, signals)
                    return gang
                except LostError as error:
                    gang.close()
                    for node_id, text in error.faults.items():
                        faults.setdefault(node_id, []).append(text)
                    say_once(f"{error}; choosing nodes again")
                except BaseException:
                    gang.close()
                    raise
            time.sleep(RETRY_SECONDS)
    finally:
        if request is not None:
            remove_placement_group(request)


def _waiting_text(assignment: Assignment, wait_seconds: float) -> str:
    if assignment.problems:
        return f"waiting {wait_seconds:g} s for nodes: {assignment.problems[0]}"
    ranks = [str(rank) for node in assignment.waits_for for rank in node.ranks]
    return f"waiting for nodes that other jobs use, for the ranks {', '.join(ranks)}"


def _start_problems(faults: Mapping[str, Sequence[str]]) -> list[str]:
    fix = "repair this node, or name it under `exclude` in the cluster file"
    return [f"{texts[-1]} (tries: {len(texts)}); {fix}" for texts in faults.values()]


def live_nodes(exclude: Collection[str] = ()) -> list[RayNode]:
    """Returns the nodes that accept a connection now, except nodes whose host name or address is in `exclude`. The head
    node comes last. Tests the connections, because Ray itself notices a lost node late."""
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
        if node["Alive"] and not {node["NodeManagerHostname"], node["NodeManagerAddress"]} & {*exclude}
    ]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:  # connects in parallel, because each lost node costs the full timeout
        answers = list(pool.map(takes_connections, nodes))
    alive = [node for node, answer in zip(nodes, answers, strict=True) if answer]
    return sorted(alive, key=lambda node: (HEAD in node.total, node.address, node.node_id))


def last_line(error: RayError) -> str:
    """Returns the cause of an error of Ray: the last line that names an exception, else the last line. In the error's text,
    the remote traceback comes before the cause, and Ray may add sentences after the cause."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (named or lines or [type(error).__name__])[-1]


def takes_connections(node: RayNode) -> bool:
    """Returns whether the raylet of a node accepts a connection."""
    with contextlib.suppress(OSError):
        socket.create_connection((node.address, node.port), CONNECT_SECONDS).close()
        return True
    return False
