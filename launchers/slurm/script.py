"""What Slurm is asked for, as text: the options of a job or of the parts of a heterogeneous one, the script, the step, and
the table from which each task learns its rank. Pure functions of the plan and the cluster file.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.command import JobPlan, NodePlan, RankCommand
from moe_dist.config.bundled import source_root
from moe_dist.config.cluster import ApptainerContainer, Cluster, PyxisContainer
from moe_dist.runtime.place import FEATURES

TRAIN_SBATCH = source_root() / "slurm" / "train.sbatch"
PROGRAM = "MOE_DIST_PROGRAM"  # what ranks run in place of the training
STOP_SIGNAL = "USR2"  # NCCL may take USR1
# A rank that has ended leaves its peers so long to say what they saw, in seconds; then srun ends them.
LINGER_SECONDS = 60
# Until a process has its handlers, signals wait: neither lost nor deadly (moe_dist/runtime/signals.py lets them in).
HOLD_SIGNALS = ("env", "--block-signal=TERM,USR2,INT")


@dataclass(frozen=True)
class ScriptPart:
    """Nodes of one kind: a job, or one part of a heterogeneous job.

    Attributes:
        nodes: Of the plan, in order.
    """

    nodes: tuple[NodePlan, ...]

    @property
    def feature(self) -> str | None:
        return self.nodes[0].feature

    @property
    def ranks_per_node(self) -> int:
        return len(self.nodes[0].ranks)


def parts(job: JobPlan) -> tuple[ScriptPart, ...]:
    """The nodes of a plan by kind: feature, number of ranks, whether they are a group's own. Rank 0 is in the first."""
    kinds: dict[tuple[str | None, int, bool], list[NodePlan]] = {}
    for node in job.nodes:
        kinds.setdefault((node.feature, len(node.ranks), node.own), []).append(node)
    return tuple(ScriptPart(tuple(nodes)) for nodes in kinds.values())


def part_options(part: ScriptPart, job: JobPlan, cluster: Cluster) -> list[str]:
    """Options of sbatch that say which nodes, without those of the site."""
    size = part.ranks_per_node
    # Without --ntasks the second part of a heterogeneous job starts a single task.
    options = [f"--nodes={len(part.nodes)}", f"--ntasks={len(part.nodes) * size}", f"--ntasks-per-node={size}"]
    if cluster.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if job.gpus_per_node:
        count = ":".join(filter(None, [cluster.gpus.type, str(job.gpus_per_node)]))
        options.append(f"--gres=gpu:{count}" if cluster.gpus.syntax == "gres" else f"--gpus-per-node={count}")
    if part.feature is not None:
        options.append(f"--constraint={part.feature}")
    if part.nodes[0].own or len(parts(job)) > 1:  # two parts must not meet on a node: its tasks would be counted twice
        options.append("--exclusive")
    return options


def site_options(cluster: Cluster) -> list[str]:
    """Options of sbatch that come from the site; every part of a heterogeneous job repeats them."""
    named = {"--account": cluster.account, "--partition": cluster.partition, "--qos": cluster.qos, "--time": cluster.time}
    options = [f"{option}={value}" for option, value in named.items() if value is not None]
    return [*options, f"--signal={STOP_SIGNAL}@{cluster.signal_seconds}", *cluster.options]


def sbatch_line(job: JobPlan, cluster: Cluster, arguments: Sequence[str]) -> str:
    """The command that asks for exactly the nodes of the plan.

    Args:
        arguments: Script, configuration and overrides.
    """
    asked = " : ".join(shlex.join([*part_options(part, job, cluster), *site_options(cluster)]) for part in parts(job))
    return f"sbatch {asked} {shlex.join(arguments)}"


def script(job: JobPlan, cluster: Cluster, *, name: str, output: str, exports: Mapping[str, str]) -> str:
    """A script for sbatch: what the plan needs, then what slurm/train.sbatch does.

    Args:
        name: Of the job.
        output: Path of its output, with Slurm's %j, %A, %a.
        exports: Variables of slurm/train.sbatch: MOE_DIST_SNAPSHOT, MOE_DIST_PYTHON, MOE_DIST_PROGRAM.
    """
    first = [f"--job-name={name}", "--requeue", "--open-mode=append", f"--output={output}"]
    heads = [[*part_options(part, job, cluster), *site_options(cluster)] for part in parts(job)]
    heads = [[*first, *heads[0]], *heads[1:]]
    headers = ["\n".join(f"#SBATCH {shlex.quote(option)}" for option in head) for head in heads]
    body = [line for line in TRAIN_SBATCH.read_text().splitlines() if not line.startswith(("#!", "#SBATCH"))]
    return "\n".join(["#!/bin/bash", "\n#SBATCH hetjob\n".join(headers), _export(exports), *body, ""])


def output_pattern(folder: Path, *, array: bool = False) -> str:
    """Path of a job's output, with what Slurm replaces in it; a % of the folder's own stays one."""
    return f"{folder}".replace("%", "%%") + ("/slurm-%A_%a.out" if array else "/slurm-%j.out")


def srun_command(
    job: JobPlan,
    cluster: Cluster,
    *,
    table: Path,
    node_env: Path,
    visible: Sequence[str],
    hold: Sequence[str] = HOLD_SIGNALS,
) -> list[str]:
    """The step that starts one task for each rank.

    Args:
        hold: Words before a command that begin it with its stop signals blocked.
        table: As `rank_table` wrote it.
        node_env: slurm/node_env.sh of the snapshot.
        visible: Folders that a container must see under their own names.
    """
    (first, *others) = parts(job)
    command = ["srun", "--kill-on-bad-exit=0", f"--wait={LINGER_SECONDS}", "--input=none", "--export=ALL"]
    if others:
        command.append(f"--het-group={','.join(str(index) for index in range(1 + len(others)))}")
        # Since 22.05 srun does not take it from the job.
        command += [] if cluster.cpus_per_rank is None else [f"--cpus-per-task={cluster.cpus_per_rank}"]
    else:
        command += [option for option in part_options(first, job, cluster) if option.startswith(("--n", "--cpus"))]
    return [*command, *pyxis_options(cluster, visible), *hold, "bash", str(node_env), str(table)]


def rank_table(
    commands: Sequence[RankCommand],
    cluster: Cluster,
    *,
    hosts: Sequence[str],
    features: Mapping[str, str],
    code: Path,
    logs: Path,
    visible: Sequence[str],
) -> str:
    """Shell text that slurm/node_env.sh reads in every task: by node and number on the node, who it is.

    Ranks are found by place, not by SLURM_PROCID: those of a group need not be neighbours, and Slurm counts the parts of
    a heterogeneous job one after the other.

    Args:
        hosts: Names of the nodes in the order of the plan.
        features: Of each host, comma-separated, as Slurm says now.
        code: Folder of the code that runs.
        logs: Folder of the ranks' logs.
        visible: Folders that a container must see under their own names.
    """
    common = {
        name: value for name, value in commands[0].env.items() if all(command.env[name] == value for command in commands)
    }
    site = {name: variable.value for name, variable in cluster.nccl.items()}
    if cluster.interface is not None:
        site |= {"GLOO_SOCKET_IFNAME": cluster.interface, "NCCL_SOCKET_IFNAME": cluster.interface}
    lines = ["# Who each task is; read by slurm/node_env.sh.", f"cd {shlex.quote(str(code))} || exit 78"]
    lines += [_export({**site, **common}), 'case "$SLURMD_NODENAME" in']
    lines += [f"{host}) {_export({FEATURES: features.get(host, '')})} ;;" for host in dict.fromkeys(hosts)]
    lines += ["esac", 'case "$SLURMD_NODENAME/$SLURM_LOCALID" in']
    for command in commands:
        own = {name: value for name, value in command.env.items() if name not in common}
        local = command.env["LOCAL_RANK"]
        log = shlex.quote(str(logs / f"rank_{command.rank}.log"))
        lines.append(f"{hosts[command.node]}/{local}) {_export(own)}; log={log} ;;")
    lines += ["*) misplaced ;;", "esac", "prelude() {", ":"]
    for line in cluster.prelude:
        # By eval: a line that is no whole shell command fails by itself.
        lines.append(f"eval {shlex.quote(line)} || {{ failed={shlex.quote(line)}; return 1; }}")
    lines += ["}", f"container=({shlex.join(container_prefix(cluster, visible, code))})"]
    return "\n".join([*lines, f"command=({shlex.join(commands[0].argv)})", ""])


def interpreter(cluster: Cluster) -> str:
    """Python on the nodes: the cluster file's, else the one that runs this; a container has its own."""
    return cluster.python or (sys.executable if cluster.container.kind == "none" else "python3")


def pyxis_options(cluster: Cluster, visible: Sequence[str]) -> list[str]:
    """Options of srun for pyxis; none for other containers.

    Args:
        visible: Folders that the container must see under their own names.
    """
    container = cluster.container
    if not isinstance(container, PyxisContainer):
        return []
    mounts = [*(f"{folder}:{folder}" for folder in visible), *container.mounts]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]


def container_prefix(cluster: Cluster, visible: Sequence[str], code: Path) -> list[str]:
    """What goes before the command of a rank: apptainer's own command; pyxis and no container need nothing."""
    container = cluster.container
    if not isinstance(container, ApptainerContainer):
        return []
    binds = [f"--bind={mount}" for mount in (*(f"{folder}:{folder}" for folder in visible), *container.mounts)]
    gpus = ["--nv"] if cluster.gpus.syntax != "none" else []
    return ["apptainer", "exec", *gpus, *binds, f"--pwd={code}", container.image]


def _export(variables: Mapping[str, str]) -> str:
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
