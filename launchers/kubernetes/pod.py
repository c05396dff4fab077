"""Starts the ranks of one pod of an indexed Job: python -m launchers.kubernetes.pod --nodes 0,1 CONFIG [key=value ...]

The pod's index in its Job chooses one of the planned nodes. The ranks meet at MASTER_ADDR, as with torchrun. All ranks
write to the pod's log, and into their own logs in the run folder.
"""

import os
from typing import Annotated

import typer

from launchers.command import JobPlan, LaunchPlan, plan_job, rank_commands
from launchers.launcher import ClusterName, ConfigPath, Overrides
from launchers.rank_tracker import ShutdownTimeouts
from launchers.supervise import Ranks
from moe_dist.config.cluster import load_cluster
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import layout_of_file
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.signals import StopSignals

INDEX = "JOB_COMPLETION_INDEX"  # variable that Kubernetes sets in the pods of an indexed Job
PEER_SECONDS = 60.0  # seconds from a rank's failure until the pod's other ranks get SIGTERM; until then they log errors
END_SECONDS = 5.0  # last seconds of the grace period, in which this process ends after its ranks


def node_of_pod(plan: JobPlan, nodes: str, index: str | None) -> int:
    """Returns the planned node of this pod. Raises ConfigError if the index or the list of nodes is invalid."""
    listed = nodes.split(",")
    planned = {str(node.index) for node in plan.nodes}
    if not listed or not planned.issuperset(listed):
        raise ConfigError(
            f"--nodes {nodes}: must list numbers of planned nodes, which are 0 to {len(planned) - 1}; print the manifests "
            "again by `moe-dist launch kubernetes`"
        )
    if index is None or not index.isdecimal() or int(index) >= len(listed):
        raise ConfigError(
            f"{INDEX}={index!r}: must be a number below {len(listed)}; only the pods of an indexed Job have it, so apply "
            "the manifests of `moe-dist launch kubernetes`"
        )
    return int(listed[int(index)])


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Planned nodes of the pods of this Job, by their index: 0,1.")] = "",
    cluster: ClusterName = None,
) -> None:
    """Start the ranks of one pod; the manifests of `moe-dist launch kubernetes` call this."""
    with reports_errors(), StopSignals() as signals:
        site = load_cluster(cluster, os.environ)
        plan = plan_job(layout_of_file(config, overrides or []), site)
        node = node_of_pod(plan, nodes, os.environ.get(INDEX))
        grace = max(1.0, site.signal_seconds - END_SECONDS)
        meeting = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        launch = LaunchPlan(
            config=config,
            overrides=tuple(overrides or ()),
            job=plan,
            rendezvous=meeting,
            attempt=0,
            attempt_id="",  # the ranks take the attempt id that rank 0 chooses
            grace_seconds=grace,
            threads=site.cpus_per_rank,
        )
        commands = [command for command in rank_commands(launch) if command.node == node]
        outcome = Ranks(commands, None, timeouts=ShutdownTimeouts(stop=grace, peers=PEER_SECONDS)).supervise(signals)
        raise typer.Exit(outcome.exit_code(outcome.cause()))


if __name__ == "__main__":
    run_command(main)
