"""Checks the nodes at the start of every run, before the process group exists. Takes seconds; imports no torch.

    <run folder>/.nodes_<attempt>/<rank>.json     facts of each node, written by its first rank

A rank that finds an error on its own node exits. Rank 0 also compares the nodes: if one node had a different torch version,
NCCL's initialisation would otherwise hang, or results would be wrong.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moe_dist.config.schema import Config
from moe_dist.plan.memory import folder_bytes
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.node.check_result import CheckResult, Level, raise_errors
from moe_dist.runtime.node.checks import Needs, answered_at, check_nodes
from moe_dist.runtime.node.facts import NodeFacts, Questions, look
from moe_dist.runtime.place import RunPlace

logger = logging.getLogger(__name__)

WAIT_SECONDS = 20.0  # how long rank 0 waits for the facts of nodes whose ranks have already met rank 0
POLL_SECONDS = 0.1


def check_at_start(
    config: Config,
    env: RankEnv,
    run_folder: Path,
    *,
    variables: Mapping[str, str] = os.environ,
    wait_seconds: float = WAIT_SECONDS,
) -> list[CheckResult]:
    """Checks the nodes of a job. Rank 0 checks all nodes, and the first rank of each other node checks its own node. These
    ranks return the results; all remaining ranks return an empty list. Every rank must call this function, after rank 0 has
    opened the run folder. Only rank 0 logs warnings. Raises ConfigError or ResourceError if a checked node does not meet
    the run's requirements. Rank 0 waits `wait_seconds` for the facts of the other nodes; it ignores later facts."""
    if env.local_rank > 0:
        return []
    began, needs = time.time(), _needs(config, env, variables)
    hosts = (host,) if (host := variables.get("MASTER_ADDR")) else ()
    facts = look(Questions(folder=config.run.root, data=config.data.path, hosts=hosts), env=variables)
    folder = run_folder / f".nodes_{env.attempt_id}"
    if env.rank > 0:
        folder.mkdir(exist_ok=True)
        content = {"local_world_size": env.local_world_size, "facts": asdict(facts)}
        write_atomically(folder / f"{env.rank}.json", json.dumps(content))
        results = check_nodes([facts], needs)
        raise_errors(results)
        return results
    others = _gather(folder, env, wait_seconds) if env.local_world_size < env.world_size else {}
    nodes, heard = [facts], [facts.clock]
    for _, (seen, other) in sorted(others.items()):
        nodes.append(other)
        heard.append(answered_at(other.clock, asked=began, seen=seen))
    results = check_nodes(nodes, needs, heard)
    raise_errors(results)
    warnings = [result for result in results if result.level is Level.WARNING]
    for result in warnings:
        logger.warning("%s", result)
    logger.info("%d nodes checked in %.1f s, %d warnings", len(nodes), time.time() - began, len(warnings))
    return results


def _needs(config: Config, env: RankEnv, variables: Mapping[str, str]) -> Needs:
    place = RunPlace.from_environment(variables)
    return Needs(
        world_size=env.world_size,
        ranks_per_node=env.local_world_size,
        gpus_per_node=env.local_world_size if place is not None and place.gpu is not None else 0,
        num_nodes=1 if env.local_world_size == env.world_size else 2,
        folder_bytes=folder_bytes(config),
        folder=config.run.root,
        data=config.data.path,
    )


def _gather(folder: Path, env: RankEnv, wait_seconds: float) -> dict[int, tuple[float, NodeFacts]]:
    """Waits until facts have arrived from nodes that together have all ranks, but at most `wait_seconds`. Maps the first
    rank of each node to (time of arrival by this host's clock, facts)."""
    deadline, found, ranks = time.monotonic() + wait_seconds, {}, env.local_world_size
    while ranks < env.world_size and time.monotonic() < deadline:
        for path in folder.glob("*.json") if folder.is_dir() else ():
            if int(path.stem) not in found:  # each file is read once
                content = json.loads(path.read_text())
                found[int(path.stem)] = (time.time(), NodeFacts(**content["facts"]))
                ranks += content["local_world_size"]
        time.sleep(POLL_SECONDS)  # the files arrive in a folder of the shared file system, so this loop polls
    if ranks < env.world_size:
        logger.warning(
            "the nodes of %d ranks have not reported their facts within %g s, so they were not compared with the others",
            env.world_size - ranks,
            wait_seconds,
        )
    shutil.rmtree(folder, ignore_errors=True)  # no other rank reads the folder
    return found
