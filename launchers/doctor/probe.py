"""Checks the planned nodes with a short job, and measures the network between them. Does not import torch."""

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from launchers.command import JobPlan
from launchers.doctor import fabric
from launchers.launcher import Examination
from moe_dist.config.schema import Config
from moe_dist.errors import MoeDistError
from moe_dist.runtime.node.check_result import CheckResult, Level, error, note
from moe_dist.runtime.node.checks import answered_at, check_cores, check_folders, check_nodes
from moe_dist.runtime.node.facts import NodeFacts, Questions, from_line, nearest

PROBE_MINUTES, FABRIC_MINUTES = 2, 10
# Takes (module, argument, tasks per node, minutes). Yields (Unix time of arrival, line) for each line that `python -m
# MODULE ARGUMENT` prints on the planned nodes.
RunOnNodes = Callable[[str, str, int, int], Iterator[tuple[float, str]]]


def examine_cluster(asked: Examination, scheduled: list[CheckResult], run: RunOnNodes) -> Iterator[CheckResult]:
    """Yields the results of a scheduler's checks, then of the requested checks of the nodes and of the network."""
    yield from scheduled
    fits = not any(result.level is Level.ERROR for result in scheduled)
    if asked.probe and fits:
        yield from probe_nodes(asked, run)
    else:
        yield from check_folders([asked.here], asked.needs)
        if fits:
            yield note("nodes of the job", "not checked; --probe checks each node, as the job itself does when it starts")
        elif asked.probe or asked.fabric:
            yield note("probe", "not started: its job would wait for nodes that the cluster lacks")
    if asked.fabric and fits:
        yield from measure_fabric(asked.config, asked.plan, run)


def probe_nodes(asked: Examination, run: RunOnNodes) -> list[CheckResult]:
    """Runs one task on each node for at most two minutes, and checks the facts that each task prints. Also checks the
    folders of this node."""
    config, plan, needs = asked.config, asked.plan, asked.needs
    heard: dict[str, tuple[float, NodeFacts]] = {}
    began = time.time()
    with _token_folder(config) as (token_file, meeting):
        questions = Questions(
            folder=config.run.root,
            data=config.data.path,
            token_file=token_file,
            meeting=str(meeting) if meeting is not None else None,
            num_nodes=len(plan.nodes),
        )
        try:
            for seen, line in run("launchers.doctor.on_node", json.dumps(asdict(questions)), 1, PROBE_MINUTES):
                if (facts := from_line(line)) is not None:
                    heard[facts.node] = (answered_at(facts.clock, asked=began, seen=seen), facts)
        except MoeDistError as failed:
            if not heard:
                return [error("probe", str(failed), "start one task per node by hand and read its error")]
    found = []
    if len(heard) < len(plan.nodes):
        text = f"{len(heard)} of {len(plan.nodes)} nodes answered within {PROBE_MINUTES} minutes"
        fix = "check that the others see this clone and its environment (cluster file: prelude, python, container)"
        found.append(error("probe", text, fix))
    answers = [heard[node] for node in sorted(heard, key=lambda name: (len(name), name))]  # node2 before node10
    nodes, when = [facts for _, facts in answers], [when for when, _ in answers]
    return [*found, *check_nodes(nodes, needs, when, here=asked.here), check_cores(nodes, needs)]


def measure_fabric(config: Config, plan: JobPlan, run: RunOnNodes) -> list[CheckResult]:
    """Measures all-reduce and all-to-all between every pair of nodes. Runs one task per GPU; without GPUs, one per node."""
    if len(plan.nodes) < 2:
        return fabric.judge({}, [], ["here"], payload_bytes=0)
    tasks = plan.gpus_per_node or 1
    with _token_folder(config) as (_, meeting):
        if meeting is None:
            return [error("fabric", "needs a folder that all nodes share", "repair the shared folder first")]
        options = {"folder": str(meeting.parent), "device": "cuda" if plan.gpus_per_node else "cpu"}
        why, found = "the job ended without a result", None
        try:
            for _, line in run("launchers.doctor.fabric", json.dumps(options), tasks, FABRIC_MINUTES):
                found = fabric.read_report(line) or found
        except MoeDistError as failed:
            why = str(failed)
    return found or [error("fabric", f"not measured: {why}", "--probe checks each node by itself")]


@contextmanager
def _token_folder(config: Config) -> Iterator[tuple[tuple[str, str] | None, Path | None]]:
    """Makes a temporary folder in run.root. Yields (path, content) of a file that every node should see, and the path at
    which rank 0's node writes its address for the connection test. Yields (None, None) if this node cannot create
    the folder; another check reports this."""
    token = secrets.token_hex(16)
    folder = nearest(Path(config.run.root)) / f".doctor-{token[:8]}"
    try:
        folder.mkdir(mode=0o700)  # so that no other user can write a false address into the folder
        (folder / "token").write_text(token)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        yield None, None
        return
    try:
        yield (str(folder / "token"), token), folder / "meeting"
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # deletes the folder even if the job failed
