"""Prints the manifests of a run: python -m launchers.kubernetes CONFIG [key=value ...] [--kind job] | kubectl apply -f -"""

import os
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from launchers.command import JobPlan, paths_of, plan_job, relative_paths
from launchers.kubernetes.manifests import FILES, Manifest, Manifests, parts_of, uncovered
from launchers.launcher import ClusterName, ConfigPath, Examination, Launcher, Overrides
from moe_dist.config.bundled import find_config
from moe_dist.config.cluster import Cluster, cluster_file, load_cluster
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import layout_of_file
from moe_dist.runtime.command_line import print_done, reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult, error, note, ok

GUIDE = "docs/kubernetes.md"
EXAMPLE = "kubernetes: {image: registry.example.org/moe-dist:cuda, claims: {shared: /shared}}"  # part of a cluster file


class Kind(StrEnum):
    """The kind of Kubernetes object that runs the ranks."""

    RAYJOB = "rayjob"
    JOB = "job"


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes texts of several lines as blocks, and writes repeated values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def text_of(found: Sequence[Manifest]) -> str:
    """Returns the YAML text of the manifests, with one document for each manifest."""
    return yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=120)


def manifests(config_path: Path, overrides: Sequence[str], *, cluster: str | None, kind: Kind) -> list[Manifest]:
    """Plans a run and returns its Kubernetes objects. Needs neither data nor a cluster. Raises ConfigError if the
    configuration or the cluster file is invalid, or if the pods could not reach a folder of the run."""
    site, file = load_cluster(cluster, os.environ), cluster_file(cluster, os.environ)
    if file is None:
        raise ConfigError(f"--cluster is missing; give --cluster FILE, a YAML file with `{EXAMPLE}`", see=GUIDE)
    layout = layout_of_file(config_path, overrides)
    config, plan = layout.config, plan_job(layout, site)
    problems = problems_of(config, plan, site)
    if kind is Kind.RAYJOB and site.prelude:
        problems.append("prelude: KubeRay starts pods without a shell; put these lines into the image, or take --kind job")
    if problems:
        raise ConfigError(problems, see=GUIDE)
    files = {"config.yaml": find_config(config_path).read_text(), "cluster.yaml": file.read_text()}
    arguments = (f"{FILES}/config.yaml", *overrides, f"--cluster={FILES}/cluster.yaml")
    parts = parts_of(plan, ep=config.parallel.ep, domains=site.domain_nodes is not None)
    made = Manifests(config.run.name, plan, parts, site, files, arguments)
    print(plan.table(), file=sys.stderr)
    return made.jobs() if kind is Kind.JOB else made.ray_job()


def problems_of(config: Config, plan: JobPlan, site: Cluster) -> list[str]:
    """Returns the reasons why pods could not run the plan; empty if they can."""
    here, problems = site.kubernetes, relative_paths(config)
    if here.image is None:
        problems.append("kubernetes.image=null: must name a container image with moe_dist; set it in the cluster file")
    absolute = {key: path for key, path in paths_of(config).items() if path.startswith("/")}
    claims = ", ".join(here.claims.values()) or "none"
    problems += [
        f"{key}={path!r}: must lie in a folder that all pods mount; kubernetes.claims of the cluster file mounts {claims}"
        for key, path in uncovered(absolute, tuple(here.claims.values())).items()
    ]
    parts = parts_of(plan, ep=config.parallel.ep, domains=site.domain_nodes is not None)
    if here.domain_label is None and any(part.domain is not None for part in parts):
        problems.append(
            f"kubernetes.domain_label=null: domain_nodes={site.domain_nodes} asks for one interconnect domain for each EP "
            "group, and an EP group has several nodes; name the label that is equal on all nodes of a domain"
        )
    return problems


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: ClusterName = None,
    kind: Annotated[Kind, typer.Option(help="rayjob needs KubeRay; job is an indexed Job of Kubernetes.")] = Kind.RAYJOB,
) -> None:
    """Print the Kubernetes manifests of a run, for `kubectl apply -f -`."""
    with reports_errors():
        found = manifests(config, overrides or [], cluster=cluster, kind=kind)
        print_done(text_of(found).rstrip())


class KubernetesLauncher(Launcher):
    """The launcher for Kubernetes. It only prints the objects of a run."""

    main = staticmethod(main)

    def examine(self, asked: Examination) -> Iterator[CheckResult]:
        problems = problems_of(asked.config, asked.plan, asked.cluster)
        yield from (error("manifests", problem, f"see {GUIDE}", kind=ConfigError) for problem in problems)
        if not problems:
            yield ok("manifests", "the pods mount all folders of the run")
        yield note("nodes of the job", "not checked: only Kubernetes knows its nodes; each start checks them")


if __name__ == "__main__":
    run_command(main)
