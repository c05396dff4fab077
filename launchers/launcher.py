"""The base class of launchers. `launchers/table.py` lists all launchers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from launchers.command import JobPlan, plan_job
from moe_dist.config.cluster import Cluster
from moe_dist.config.schema import Config
from moe_dist.plan.memory import folder_bytes
from moe_dist.plan.preflight import PlannedLayout
from moe_dist.runtime.node.check_result import CheckResult, note
from moe_dist.runtime.node.checks import Needs, check_folders
from moe_dist.runtime.node.facts import NodeFacts

ConfigPath = Annotated[Path, typer.Argument(help="Configuration of the run, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200; later ones win.")]
ClusterName = Annotated[
    str | None, typer.Option(help="Cluster file, or its name in configs/clusters; default $MOE_DIST_CLUSTER.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Rename an old run of this name first.")]


@dataclass(frozen=True)
class Examination:
    """A run and the machine or cluster on which `moe-dist doctor` checks it. `save_seconds` is the measured time of a save;
    None before the first save."""

    config: Config
    plan: JobPlan
    cluster: Cluster
    env: Mapping[str, str]
    here: NodeFacts
    save_seconds: float | None = None
    probe: bool = False
    fabric: bool = False

    @property
    def needs(self) -> Needs:
        """The run's requirements on its nodes."""
        return Needs(
            world_size=self.plan.world_size,
            ranks_per_node=self.plan.ranks_per_node,
            gpus_per_node=self.plan.gpus_per_node,
            num_nodes=len(self.plan.nodes),
            folder_bytes=folder_bytes(self.config),
            folder=self.config.run.root,
            data=self.config.data.path,
        )


class Launcher:
    """One way to start the ranks of a run. A subclass needs `main`; the methods have defaults. Its `main` starts a run, and
    has the arguments and options of `moe-dist launch NAME` as parameters."""

    main: ClassVar[Callable[..., None]]

    def plan(self, layout: PlannedLayout, cluster: Cluster) -> JobPlan:
        """Returns the nodes of a run, and the ranks on each node. Raises the errors of `plan_job`."""
        return plan_job(layout, cluster)

    def examine(self, asked: Examination) -> Iterator[CheckResult]:
        """Yields the results of the doctor's checks of machine and cluster. Raises ResourceError if there is no cluster."""
        yield from check_folders([asked.here], asked.needs)
        yield note("nodes of the job", "not checked: this launcher brings no checks")
