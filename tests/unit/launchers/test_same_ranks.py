"""The same plan gives the same ranks on the same kinds of nodes, whichever launcher starts them.

Launchers derive the environment of a rank in different ways: Slurm from the components of a job and a rank table, Ray from
a choice among its nodes, Kubernetes from the pods of worker groups or of indexed Jobs.
"""

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from launchers.command import rank_commands
from launchers.kubernetes import pod
from launchers.kubernetes.__main__ import Kind, manifests
from launchers.kubernetes.manifests import FILES
from launchers.rank_tracker import Outcome
from launchers.ray.job import check_job
from launchers.ray.nodes import RayNode, assign, bundle_of_rank
from launchers.slurm.__main__ import prepare
from launchers.slurm.job import rank_step
from launchers.slurm.nodes import Allocation, GivenPart, differences, hosts_of
from launchers.slurm.step import SlurmJob
from launchers.snapshot import CodeSnapshot
from moe_dist.config.bundled import find_config
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.load import load_config
from moe_dist.plan.preflight import layout_of_file
from moe_dist.runtime.command_line import command_app
from moe_dist.runtime.place import RunPlace
from tests.support.cover import full_unless

DEFAULT = "adamoe_moma_tiny_cpu"
CPUS = 3  # CPUs of each rank
POOL = {"pool": "training"}  # label of all Kubernetes nodes


def pinned(text: Sequence[int], image: Sequence[int], /, **nodes: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {"text": {"ranks": [*text]}, "image": {"ranks": [*image]}}
    for name, node in nodes.items():
        groups[name]["node"] = node
    return {"policy": "pinned", "groups": groups}


def labelled(name: str, **more: Any) -> dict[str, Any]:
    return {"feature": name, "labels": {"modality": name}, **more}


PLACEMENTS = {
    "the default job": pinned([0, 1], [2, 3]),
    "one group on labelled nodes": pinned([0, 1], [2, 3], image=labelled("big")),
    "each group on its nodes": pinned([0, 3], [1, 2], text=labelled("small"), image=labelled("big")),
    "nodes named by the feature alone": pinned([1, 2], [0, 3], text={"feature": "small"}, image={"feature": "big"}),
    "a group with nodes of its own": pinned([2, 3], [0, 1], text=labelled("small", own=True)),
    "uneven groups": pinned([0, 2, 3], [1], text=labelled("small"), image=labelled("big")),
    "uneven groups, one of them anywhere": pinned([3], [0, 1, 2], text=labelled("small")),
    "groups on all ranks": {"policy": "interleaved"},
}


class Started(NamedTuple):
    """One rank as a launcher starts it."""

    groups: tuple[str, ...]
    kind: str | None  # label or feature of the rank's node, or None
    beside: tuple[int, ...]  # all ranks of the node, in the order of their local ranks
    local_rank: int
    local_world_size: int
    world_size: int
    threads: int


Ranks = dict[int, Started]


def ranks_of(found: Iterable[tuple[str, str | None, Mapping[str, str]]]) -> Ranks:
    """Returns the ranks. `found` has the name of the node, its kind, and the environment of each rank."""
    each = {int(env["RANK"]): (name, kind, env) for name, kind, env in found}
    on_node: dict[str, dict[int, int]] = {}
    for rank, (name, _, env) in each.items():
        on_node.setdefault(name, {})[int(env["LOCAL_RANK"])] = rank
    started = {}
    for rank, (name, kind, env) in sorted(each.items()):
        place = RunPlace.from_environment(env)
        assert (place.rank, place.local_rank) == (rank, int(env["LOCAL_RANK"]))
        beside = tuple(on_node[name][local] for local in sorted(on_node[name]))
        numbers = [int(env[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS")]
        started[rank] = Started(place.groups, kind, beside, *numbers)
    return started


class Job:
    """The configuration of a run and the cluster file, which all launchers get."""

    def __init__(self, folder: Path, placement: Mapping[str, Any], *, ranks_per_node: int, edp: int) -> None:
        self.folder, self.site_file, self.run = folder, folder / "site.yaml", folder / "run.yaml"
        kubernetes = {"image": "registry/moe-dist:0.1", "claims": {"shared": str(folder)}, "node_labels": POOL}
        site = {"gpus": {"syntax": "none"}, "ranks_per_node": ranks_per_node, "cpus_per_rank": CPUS}
        self.site_file.write_text(yaml.safe_dump({**site, "kubernetes": kubernetes}))
        values = yaml.safe_load(find_config(DEFAULT).read_text())
        values["run"]["root"], values["data"]["path"] = str(folder / "runs"), str(folder / "data")
        values["parallel"]["edp"], values["placement"] = edp, dict(placement)
        values["train"]["global_batch"] = 8 * edp
        self.run.write_text(yaml.safe_dump(values))

    @property
    def site(self) -> Cluster:
        return load_cluster(str(self.site_file), {})

    def objects(self, kind: Kind) -> list[dict[str, Any]]:
        return manifests(self.run, [], cluster=str(self.site_file), kind=kind)


def by_slurm(job: Job) -> Ranks:
    """Gives each component of the batch script the nodes that its options request. bash reads the rank table on each
    node."""
    made = prepare(job.run, [], job.site, read=layout_of_file)
    given, features = [], {}
    for number, head in enumerate(made.text.split("#SBATCH hetjob\n")):
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", head, re.MULTILINE))
        hosts = tuple(f"host{number}x{index}" for index in range(int(options["nodes"])))
        tasks = int(options["ntasks-per-node"])
        assert int(options["ntasks"]) == len(hosts) * tasks
        assert int(options["cpus-per-task"]) == CPUS
        given.append(GivenPart(hosts, (tasks,) * len(hosts), 0))
        features |= dict.fromkeys(hosts, options.get("constraint", ""))
    allocation = Allocation(tuple(given), features)
    assert differences(made.plan, allocation) == []
    snapshot = CodeSnapshot(made.snapshot)
    snapshot.code.mkdir(parents=True, exist_ok=True)
    job_7, hosts = SlurmJob("7", 0, None, job.folder), hosts_of(made.plan, allocation)
    table, text, _ = rank_step(job_7, snapshot, made.config, made.cluster, made.plan, hosts, features=features)
    table.write_text(text)
    tasks_of = {host: part.tasks[0] for part in given for host in part.hosts}
    tasks = [(host, local) for host, count in tasks_of.items() for local in range(count)]
    return ranks_of((host, features[host] or None, environment(table, host, local)) for host, local in tasks)


def environment(table: Path, host: str, local: int) -> dict[str, str]:
    """Returns the variables that a task of srun gets from the rank table, which is read as in slurm/node_env.sh."""
    command = ["bash", "-c", 'misplaced() { exit 69; }; . "$1" && env -0', "bash", str(table)]
    variables = {"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": host, "SLURM_LOCALID": str(local)}
    shown = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in shown.split("\0") if line)


def ray_node(name: str, labels: Mapping[str, str], cpus: int) -> RayNode:
    resources = {"CPU": float(cpus)}
    return RayNode(name, f"host-{name}", "10.0.0.1", 1, labels, resources, resources)


def on_ray(job: Job, nodes: Sequence[RayNode]) -> Ranks:
    checked = check_job(job.run, [], cluster=str(job.site_file), read=layout_of_file)
    plan = checked.launch.job
    chosen = assign(plan, nodes, bundle_of_rank(plan, CPUS), checked.together)
    assert (chosen.problems, chosen.waits_for) == ((), ())
    hosts = tuple(node.host for node in chosen.nodes)
    commands = rank_commands(replace(checked.launch, job=chosen.job, hosts=hosts))
    real = [chosen.nodes[command.node] for command in commands]
    return ranks_of((node.node_id, kind_of(node.labels), command.env) for node, command in zip(real, commands, strict=True))


def by_ray(job: Job) -> Ranks:
    """Starts the job on a Ray cluster that has enough nodes of each kind. Their order differs from the plan's."""
    site = job.site
    kinds: list[dict[str, str]] = [{}, {"modality": "small"}, {"feature": "big"}, {"modality": "big"}, {"feature": "small"}]
    found = [
        ray_node(f"{name}-{index}", labels, CPUS * site.ranks_per_node)
        for name, labels in zip("vwxyz", kinds, strict=True)
        for index in reversed(range(8))
    ]
    return on_ray(job, found)


def by_ray_job(job: Job) -> Ranks:
    """Starts the job on Ray as KubeRay sets it up: the only nodes are the pods of the worker groups."""
    (ray,) = [each for each in job.objects(Kind.RAYJOB) if each["kind"] == "RayJob"]
    nodes = []
    for group in ray["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        assert spec["nodeSelector"] == {**POOL, **group["labels"]}
        cpus = int(spec["containers"][0]["resources"]["requests"]["cpu"])
        nodes += [ray_node(f"{group['groupName']}-{pod}", group["labels"], cpus) for pod in range(group["replicas"])]
    return on_ray(job, nodes[::-1])


def by_indexed_job(job: Job) -> Ranks:
    """Runs the command of each pod up to the start of its ranks."""
    found = job.objects(Kind.JOB)
    (files,) = [each["data"] for each in found if each["kind"] == "ConfigMap"]
    for name, text in files.items():
        (job.folder / name).write_text(text)
    started = []
    for number, each in enumerate(each for each in found if each["kind"] == "Job"):
        spec = each["spec"]["template"]["spec"]
        words = [word.replace(FILES, str(job.folder)) for word in spec["containers"][0]["command"]]
        kind = kind_of({name: value for name, value in spec["nodeSelector"].items() if name not in POOL})
        for index in range(each["spec"]["completions"]):
            commands = pod_commands(words[words.index("launchers.kubernetes.pod") + 1 :], index)
            assert spec["containers"][0]["resources"]["requests"]["cpu"] == str(CPUS * len(commands))
            started += [(f"{number}-{index}", kind, env) for env in commands]
    return ranks_of(started)


def pod_commands(words: Sequence[str], index: int) -> list[Mapping[str, str]]:
    """Returns the environments of the ranks that a pod starts."""
    found: list[Mapping[str, str]] = []

    def ranks(commands: Sequence[Any], *_: Any, **__: Any) -> SimpleNamespace:
        found.extend(command.env for command in commands)
        return SimpleNamespace(supervise=lambda signals: Outcome((0,) * len(commands)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pod, "Ranks", ranks)
        done = CliRunner().invoke(command_app(pod.main), [*words], env={pod.INDEX: str(index)})
    assert done.exit_code == 0, done.output
    return found


def kind_of(labels: Mapping[str, str]) -> str | None:
    (kind,) = {*labels.values()} or {None}
    return kind


LAUNCHERS = (by_slurm, by_ray, by_ray_job, by_indexed_job)


def check_against_configuration(job: Job, found: Ranks) -> None:
    """Asserts that each rank has the groups that the configuration pins to its position, and a node that these groups
    require."""
    config = load_config(job.run)
    ep = config.parallel.ep
    asked = getattr(config.placement, "groups", None)
    assert sorted(found) == list(range(ep * config.parallel.edp))
    for rank, each in found.items():
        assert each.world_size == len(found)
        assert each.local_world_size == len(each.beside)
        assert each.beside[each.local_rank] == rank
        assert each.threads == CPUS
        groups = asked if asked is not None else {"text": None, "image": None}
        here = [name for name, group in groups.items() if group is None or rank % ep in group.ranks]
        assert sorted(each.groups) == sorted(here)
        wishes = [asked[name].node.feature for name in here] if asked is not None else []
        assert [wish for wish in wishes if wish is not None] in ([], [each.kind])


@pytest.mark.parametrize(
    ("name", "ranks_per_node", "edp"),
    full_unless(
        lambda name, *size: size == (2, 3) or name == "uneven groups",
        [(name, *size) for name in PLACEMENTS for size in ((1, 1), (2, 1), (2, 3), (3, 2), (4, 2))],
    ),
)
def test_all_launchers_start_the_same_ranks(tmp_path: Path, name: str, ranks_per_node: int, edp: int) -> None:
    job = Job(tmp_path, PLACEMENTS[name], ranks_per_node=ranks_per_node, edp=edp)
    first, *others = [launcher(job) for launcher in LAUNCHERS]
    check_against_configuration(job, first)
    assert max(len(each.beside) for each in first.values()) <= ranks_per_node
    for launcher, found in zip(LAUNCHERS[1:], others, strict=True):
        assert found == first, launcher.__name__
