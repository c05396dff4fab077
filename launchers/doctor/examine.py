"""Runs all checks of a run in order: configuration, plan, scheduler, nodes, network. Yields each result as it is known."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from launchers.command import JobPlan, one_node, plan_job, relative_paths
from launchers.doctor.probe import RunOnNodes, measure_fabric, needs_of, probe_nodes
from launchers.doctor.slurm_checks import check_graces, check_slurm
from launchers.doctor.slurm_nodes import run_on_nodes, srun_command
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, MoeDistError, ResourceError
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.node.check_result import CheckResult, Level, error, note, ok
from moe_dist.runtime.node.checks import check_cores, check_folders, check_nodes
from moe_dist.runtime.node.facts import Questions, look, nearest
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS
from moe_dist.runtime.status import measured_save_seconds

# Checks the scheduler and its nodes. The argument is the seconds that a save of the run takes; None before the first save.
CheckScheduler = Callable[[float | None], list[CheckResult]]


def examine(
    config_path: Path,
    overrides: Sequence[str],
    *,
    on: str,
    cluster: str | None = None,
    probe: bool = False,
    fabric: bool = False,
    env: Mapping[str, str] = os.environ,
) -> Iterator[CheckResult]:
    """Yields the results of all checks.

    Args:
        on: 'local', 'slurm' or 'ray'.
        cluster: Name or path of the cluster file.
        probe: Whether to start a job of at most two minutes that checks each node.
        fabric: Whether to measure the network between every pair of nodes.
    """
    try:
        site_file = load_cluster(cluster, env)
        preflight = check_file(config_path, overrides)
        config = preflight.config
        yield ok("configuration", f"{config_path}: model, data, ranks and placement fit together")
        world_size = config.parallel.ep * config.parallel.edp
        plan = one_node(world_size) if on == "local" else plan_job(preflight, site_file)
        yield ok("plan", _plan_text(plan))
    except MoeDistError as failed:
        for problem in failed.problems:
            yield error("configuration", problem, "", kind=type(failed))
        return
    if on == "ray" and (problems := relative_paths(config)):
        for problem in problems:
            yield error("configuration", problem, "give absolute paths, or use --submit", kind=ConfigError)
        return
    needs, here = needs_of(config, plan), look(Questions(folder=config.run.root, data=config.data.path), env=env)
    save_seconds = measured_save_seconds(RunFolder.of(config).logs)
    if on == "local":
        yield from check_nodes([here], needs)
        yield check_cores([here], needs)
        yield check_graces({"until the launcher kills (--grace)": DEFAULT_GRACE_SECONDS}, save_seconds)
        if probe or fabric:
            yield note("probe", "this node was checked directly; --probe and --fabric need --on slurm or --on ray")
        return
    try:
        with _connected(on, config, plan, site_file, env) as (check_scheduler, run):
            scheduled = check_scheduler(save_seconds)
            yield from scheduled
            if any(result.level is Level.ERROR for result in scheduled):
                yield from check_folders([here], needs)
                if probe or fabric:
                    yield note("probe", "not started: its job would wait for nodes that the cluster lacks")
                return
            if probe:
                yield from probe_nodes(config, plan, run, here=here)
            else:
                yield from check_folders([here], needs)
                text = "not checked; --probe checks each node, as the job itself does when it starts"
                yield note("nodes of the job", text)
            if fabric:
                yield from measure_fabric(config, plan, run)
    except ResourceError as failed:
        yield error("scheduler", str(failed.problems[0]), "")


def _plan_text(plan: JobPlan) -> str:
    kinds = sorted({each for node in plan.nodes for each in [node.feature, *map("=".join, node.labels.items())] if each})
    gpus = f", {plan.gpus_per_node} GPUs each" if plan.gpus_per_node else ""
    wanted = f", with {', '.join(kinds)}" if kinds else ""
    return f"{plan.world_size} ranks on {len(plan.nodes)} node{'s' * (len(plan.nodes) > 1)}{gpus}{wanted}"


@contextmanager
def _connected(
    on: str, config: Config, plan: JobPlan, cluster: Cluster, env: Mapping[str, str]
) -> Iterator[tuple[CheckScheduler, RunOnNodes]]:
    """Connects to the scheduler. Yields a function that checks the scheduler, and a function that runs a module on the
    planned nodes. Raises ResourceError if there is no cluster."""
    if on == "slurm":
        visible = [str(nearest(Path(config.run.root))), str(Path(config.data.path).absolute())]

        def run(module: str, argument: str, tasks_per_node: int, minutes: int) -> Iterator[tuple[float, str]]:
            size = {"tasks_per_node": tasks_per_node, "minutes": minutes}
            return run_on_nodes(srun_command(plan, cluster, module, argument, visible=visible, **size), minutes=minutes)

        yield lambda save_seconds: check_slurm(plan, cluster, save_seconds), run
        return
    from launchers.doctor import ray_site
    from launchers.ray.driver import connected

    with connected(env) as parts:
        run_on_ray = partial(ray_site.run_on_nodes, plan, cluster)
        yield lambda save_seconds: ray_site.check_ray(plan, cluster, parts, save_seconds, env), run_on_ray
