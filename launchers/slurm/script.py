"""Renders sbatch options, the batch script, the srun command and the rank table. The functions are pure."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.command import JobPlan, LaunchPlan, NodePlan, rank_commands
from moe_dist.config.bundled import source_root
from moe_dist.config.cluster import ApptainerContainer, Cluster, PyxisContainer
from moe_dist.errors import ConfigError
from moe_dist.runtime.place import FEATURES

TRAIN_SBATCH = source_root() / "slurm" / "train.sbatch"
PROGRAM = "MOE_DIST_PROGRAM"  # variable with arguments of the ranks' interpreter, in place of the training's
STOP_SIGNAL = "USR2"  # not USR1, which NCCL may use
LINGER_SECONDS = 60  # from the first rank's end until srun kills the other ranks; until then these ranks log errors
# Blocked signals stay pending until the process has its handlers (moe_dist/runtime/signals.py unblocks them).
HOLD_SIGNALS = ("env", "--block-signal=TERM,USR2,INT")


@dataclass(frozen=True)
class ScriptPart:
    """Planned nodes of one kind, in order. They form a whole job, or one component of a heterogeneous job."""

    nodes: tuple[NodePlan, ...]

    @property
    def feature(self) -> str | None:
        return self.nodes[0].feature

    @property
    def ranks_per_node(self) -> int:
        return len(self.nodes[0].ranks)


def parts(job: JobPlan) -> tuple[ScriptPart, ...]:
    """Groups a plan's nodes by feature, number of ranks, and exclusive use. Rank 0 is in the first part."""
    kinds: dict[tuple[str | None, int, bool], list[NodePlan]] = {}
    for node in job.nodes:
        kinds.setdefault((node.feature, len(node.ranks), node.own), []).append(node)
    return tuple(ScriptPart(tuple(nodes)) for nodes in kinds.values())  # dicts keep insertion order: rank 0's part is first


def part_options(part: ScriptPart, job: JobPlan, cluster: Cluster) -> list[str]:
    """Returns sbatch's options for the nodes of one part, without the options of `site_options`. Raises ConfigError for
    spare nodes in a heterogeneous job."""
    if cluster.spare_nodes and len(parts(job)) > 1:
        raise ConfigError(
            f"spare_nodes={cluster.spare_nodes}: must be 0, because the groups of this run need several kinds of nodes "
            "(placement.groups.<group>.node); set it to 0 in the cluster file"
        )
    size, count = part.ranks_per_node, len(part.nodes) + cluster.spare_nodes
    # Without --ntasks, Slurm starts only one task in the second component of a heterogeneous job.
    options = [f"--nodes={count}", f"--ntasks={count * size}", f"--ntasks-per-node={size}"]
    if cluster.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if job.gpus_per_node:
        count = ":".join(filter(None, [cluster.gpus.type, str(job.gpus_per_node)]))
        options.append(f"--gres=gpu:{count}" if cluster.gpus.syntax == "gres" else f"--gpus-per-node={count}")
    if part.feature is not None:
        options.append(f"--constraint={part.feature}")
    if part.nodes[0].own or len(parts(job)) > 1:  # SLURM_LOCALID would count from 0 in each of two components on a node
        options.append("--exclusive")
    return options


def site_options(cluster: Cluster) -> list[str]:
    """Returns the options of sbatch from the cluster file; every component of a heterogeneous job repeats these options."""
    named = {"--account": cluster.account, "--partition": cluster.partition, "--qos": cluster.qos, "--time": cluster.time}
    named["--exclude"] = ",".join(cluster.exclude) or None
    options = [f"{option}={value}" for option, value in named.items() if value is not None]
    return [*options, f"--signal={STOP_SIGNAL}@{cluster.signal_seconds}", *cluster.options]


def sbatch_line(job: JobPlan, cluster: Cluster, arguments: Sequence[str]) -> str:
    """Returns the sbatch command that requests the nodes of the plan; `arguments` are the script and its options."""
    options = " : ".join(shlex.join([*part_options(part, job, cluster), *site_options(cluster)]) for part in parts(job))
    return f"sbatch {options} {shlex.join(arguments)}"


def script(job: JobPlan, cluster: Cluster, *, name: str, output: str, exports: Mapping[str, str]) -> str:
    """Returns a batch script: the plan's #SBATCH options, then the commands of slurm/train.sbatch.

    Args:
        output: Path of the job's output, with Slurm's placeholders %j, %A and %a.
        exports: Variables for slurm/train.sbatch: MOE_DIST_SNAPSHOT, MOE_DIST_PYTHON, MOE_DIST_PROGRAM.
    """
    first = [f"--job-name={name}", "--requeue", "--open-mode=append", f"--output={output}"]
    heads = [[*part_options(part, job, cluster), *site_options(cluster)] for part in parts(job)]
    heads = [[*first, *heads[0]], *heads[1:]]  # the first component gets the options of the whole job
    headers = ["\n".join(f"#SBATCH {shlex.quote(option)}" for option in head) for head in heads]
    body = [line for line in TRAIN_SBATCH.read_text().splitlines() if not line.startswith(("#!", "#SBATCH"))]
    return "\n".join(["#!/bin/bash", "\n#SBATCH hetjob\n".join(headers), _export(exports), *body, ""])


def output_pattern(folder: Path, *, array: bool = False) -> str:
    """Returns the path of a job's output with Slurm's placeholders: %j is the job, %A the array, %a its task."""
    return f"{folder}".replace("%", "%%") + ("/slurm-%A_%a.out" if array else "/slurm-%j.out")  # in a pattern %% means %


def srun_command(
    job: JobPlan,
    cluster: Cluster,
    *,
    table: Path,
    node_env: Path,
    visible: Sequence[str],
    hosts: Sequence[str] = (),
    hold: Sequence[str] = HOLD_SIGNALS,
) -> list[str]:
    """Returns the srun command that starts one task per rank.

    Args:
        hosts: Host names of the planned nodes; passed to srun if the job has spare nodes.
        hold: Command prefix that blocks the stop signals; empty for no prefix.
        visible: Folders to mount in a container under the same path.
    """
    (first, *others) = parts(job)
    # With --kill-on-bad-exit=0, the other ranks can log their own errors before srun kills them.
    command = ["srun", "--kill-on-bad-exit=0", f"--wait={LINGER_SECONDS}", "--input=none", "--export=ALL"]
    if others:
        command.append(f"--het-group={','.join(str(index) for index in range(1 + len(others)))}")
        # Since Slurm 22.05 srun does not inherit --cpus-per-task from the job.
        command += [] if cluster.cpus_per_rank is None else [f"--cpus-per-task={cluster.cpus_per_rank}"]
    else:
        planned = cluster.model_copy(update={"spare_nodes": 0})
        command += [option for option in part_options(first, job, planned) if option.startswith(("--n", "--cpus"))]
        command += [f"--nodelist={','.join(hosts)}"] if cluster.spare_nodes else []
    return [*command, *cluster.srun_options, *pyxis_options(cluster, visible), *hold, "bash", str(node_env), str(table)]


def rank_table(
    launch: LaunchPlan, cluster: Cluster, *, features: Mapping[str, str], code: Path, logs: Path, visible: Sequence[str]
) -> str:
    """Returns shell text that slurm/node_env.sh sources in every task. The text maps host and SLURM_LOCALID to the
    variables of a rank. SLURM_PROCID may differ from the rank, because ranks on a node need not be consecutive, and Slurm
    numbers the components of a heterogeneous job one after the other. A container mounts the folders `visible` under the
    same path."""
    commands, hosts = rank_commands(launch), launch.hosts
    first = commands[0]
    common = {name: value for name, value in first.env.items() if all(each.env[name] == value for each in commands)}
    lines = ["# The rank of each task; sourced by slurm/node_env.sh.", f"cd {shlex.quote(str(code))} || exit 78"]
    lines += [_export({**cluster.network_variables, **common}), 'case "$SLURMD_NODENAME" in']
    lines += [f"{host}) {_export({FEATURES: features.get(host, '')})} ;;" for host in dict.fromkeys(hosts)]
    lines += ["esac", 'case "$SLURMD_NODENAME/$SLURM_LOCALID" in']
    for command in commands:
        own = {name: value for name, value in command.env.items() if name not in common}
        local = command.env["LOCAL_RANK"]
        log = shlex.quote(str(logs / f"rank_{command.rank}.log"))
        lines.append(f"{hosts[command.node]}/{local}) {_export(own)}; log={log} ;;")
    lines += ["*) misplaced ;;", "esac", "prelude() {", ":"]
    for line in cluster.prelude:
        # With eval, an incomplete shell command in the prelude fails alone and does not break the whole text.
        lines.append(f"eval {shlex.quote(line)} || {{ failed={shlex.quote(line)}; return 1; }}")
    lines += ["}", f"container=({shlex.join(container_prefix(cluster, visible, code))})"]
    return "\n".join([*lines, f"command=({shlex.join(first.argv)})", ""])


def interpreter(cluster: Cluster) -> str:
    """Returns the Python interpreter of the ranks: the cluster file's, else this process's (`python3` in a container)."""
    return cluster.python or (sys.executable if cluster.container.kind == "none" else "python3")


def pyxis_options(cluster: Cluster, visible: Sequence[str]) -> list[str]:
    """Returns srun's options for a pyxis container that mounts `visible` folders at the same path; none without pyxis."""
    container = cluster.container
    if not isinstance(container, PyxisContainer):
        return []
    mounts = [*(f"{folder}:{folder}" for folder in visible), *container.mounts]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]


def container_prefix(cluster: Cluster, visible: Sequence[str], code: Path) -> list[str]:
    """Returns the command prefix that starts a rank in an apptainer container; empty without apptainer."""
    container = cluster.container
    if not isinstance(container, ApptainerContainer):
        return []
    binds = [f"--bind={mount}" for mount in (*(f"{folder}:{folder}" for folder in visible), *container.mounts)]
    gpus = ["--nv"] if cluster.gpus.syntax != "none" else []
    return ["apptainer", "exec", *gpus, *binds, f"--pwd={code}", container.image]


def _export(variables: Mapping[str, str]) -> str:
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
