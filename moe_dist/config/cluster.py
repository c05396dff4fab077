"""Reads cluster files. A cluster file has the settings of one site (a cluster and its scheduler). A run's configuration has
no such settings, so a run may be continued at another site.

    `--cluster` or $MOE_DIST_CLUSTER chooses the file configs/clusters/<name>.yaml. Without both, the defaults below apply.

Values of the cluster file become part of shell commands. Names must not contain special characters of the shell; other
values are quoted. The key `prelude` is arbitrary shell code, so read a cluster file before you use it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Count, Name, PathText, PositiveInt, Section, Violation
from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.partial import draft
from moe_dist.config.yaml_text import read_mapping
from moe_dist.errors import ConfigError

FOLDER = source_root() / "configs" / "clusters"
VARIABLE = "MOE_DIST_CLUSTER"
GUIDE = "docs/scaling.md"

SITE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.,@:=+-]{0,127}$"  # allows no special character of the shell
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
MAX_RESTARTS = 20  # default number of automatic restarts of one job, under every launcher
TRAIN_SECONDS = 300.0  # `limit_warning` warns if an attempt has less time than this before its stop signal
TIME_PATTERN = r"^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$"
OPTION_PATTERN = r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f-\x9f]+)?$"
LINE_PATTERN = r"^[^\x00-\x08\x0a-\x1f\x7f-\x9f]+$"
SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
VariableName = Annotated[str, Field(pattern=VARIABLE_PATTERN)]
Option = Annotated[str, Field(pattern=OPTION_PATTERN)]
# The Slurm launcher itself sets these options of sbatch and srun, from the run's configuration and from other keys of the
# cluster file. The keys `options` and `srun_options` must therefore not contain them.
LAUNCHERS_OPTIONS = frozenset(
    (
        *("account", "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "export", "gpus"),
        *("gpus-per-node", "gres", "hetjob", "input", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node"),
        *("open-mode", "output", "parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "wait", "wrap"),
    )
)
SRUN_OPTIONS = frozenset(
    (
        *("container-image", "container-mounts", "cpus-per-task", "error", "exclude", "export", "het-group", "input"),
        *("kill-on-bad-exit", "nodelist", "nodes", "ntasks", "ntasks-per-node", "output", "wait"),
    )
)
Line = Annotated[str, Field(pattern=LINE_PATTERN)]
# Kubernetes requires that object names are DNS labels. The keys of labels may have a DNS prefix.
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[
    str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]


class KubernetesSection(Section):
    """The container image, volumes and node labels of a site that runs Kubernetes."""

    image: PathText | None = Field(default=None, description="Container image with moe_dist, as registry/moe-dist:0.1.")
    namespace: ObjectName | None = Field(default=None, description="Namespace. null: that of the caller of kubectl.")
    claims: dict[ObjectName, PathText] = Field(default_factory=dict)
    """Maps names of PersistentVolumeClaims to the folders at which all pods mount them. All nodes must be able to write to
    the claim that contains the run folders (access mode ReadWriteMany)."""
    secrets: tuple[ObjectName, ...] = ()
    """Names of Secrets. Each key of a Secret becomes an environment variable of the ranks."""
    node_labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that every node of a run must have, in addition to the labels in `placement.groups.<group>.node`."""
    gpu_resource: LabelKey = Field(default="nvidia.com/gpu", description="Name of the GPU resource of a node.")
    domain_label: LabelKey | None = None
    """Key of a label, such as nvidia.com/gpu.clique, whose value is equal on all nodes of an interconnect domain. Needed if
    an EP group has several nodes and `domain_nodes` is set."""
    service_account: ObjectName | None = Field(default=None, description="Service account of the pods.")
    shared_memory_gib: PositiveInt = Field(default=32, description="GiB of /dev/shm, through which NCCL exchanges data.")
    port: Annotated[int, Field(ge=1024, le=65535)] = Field(default=29500, description="Port at which rank 0 listens.")


class GpuSection(Section):
    """The GPUs of a node, and how a Slurm job requests them."""

    syntax: Literal["gres", "gpus-per-node", "none"] = "gres"
    """Form of the request: --gres=gpu:8, --gpus-per-node=8, or none if the site has no GPUs."""
    type: Name | None = Field(default=None, description="GPU type in the request, as in gpu:h100:8. null: any type.")
    per_node: PositiveInt = Field(default=8, description="GPUs of a node; each GPU runs one rank.")


class NcclVariable(Section):
    """An environment variable of NCCL, with the reason why this site sets it."""

    value: Line = Field(description="Value of the variable.")
    reason: Line = Field(description="Reason for this value, so that others know when to remove it.")


class NoContainer(Section):
    """Ranks run on the node without a container."""

    kind: Literal["none"] = "none"


class PyxisContainer(Section):
    """Ranks run in a container that Slurm's plugin pyxis starts."""

    kind: Literal["pyxis"] = "pyxis"
    image: Line = Field(description="Image: a squashfs file, or registry#name:tag.")
    mounts: tuple[Line, ...] = Field(default=(), description="Mounted folders of the node: SOURCE:TARGET[:FLAGS].")


class ApptainerContainer(Section):
    """Ranks run in a container that apptainer starts."""

    kind: Literal["apptainer"] = "apptainer"
    image: Line = Field(description="Image: a .sif file, or docker://name:tag.")
    mounts: tuple[Line, ...] = Field(default=(), description="Mounted folders of the node: SOURCE:TARGET[:FLAGS].")


ContainerSection = Annotated[NoContainer | PyxisContainer | ApptainerContainer, Field(discriminator="kind")]


class Cluster(Section):
    """The settings of one site."""

    account: SiteName | None = Field(default=None, description="Slurm account to which jobs are charged.")
    partition: SiteName | None = Field(default=None, description="Slurm partition. null: the site's default.")
    qos: SiteName | None = Field(default=None, description="Slurm quality of service.")
    options: tuple[Option, ...] = ()
    """Additional options of sbatch, such as --mem=0 or --reservation=x. They apply to every part of a job."""
    srun_options: tuple[Option, ...] = ()
    """Additional options of the srun that starts the ranks, such as --mpi=none, --cpu-bind=ldoms or --mem-bind=local."""
    exclude: tuple[SiteName, ...] = ()
    """Nodes that no run may use, given by Slurm's node names, or by the host names or addresses of Ray's nodes."""
    spare_nodes: Count = 0
    """Number of nodes that a Slurm job requests in addition, to replace nodes that caused an earlier attempt to fail."""
    array_tasks: PositiveInt | None = None
    """Largest number of a job array's tasks that run at the same time. null: no limit."""
    gpus: GpuSection = Field(default_factory=GpuSection, description="The GPUs of a node.")
    ranks_per_node: PositiveInt = Field(default=4, description="Ranks per node of a run that computes on CPUs.")
    cpus_per_rank: PositiveInt | None = None
    """Number of CPU cores that each rank requests. null: the site's default."""
    between_gbytes: PositiveFloat | None = None
    """Rate in GB/s at which each GPU can send to other nodes; `moe-dist plan` uses this rate. null: not known."""
    interface: SiteName | None = None
    """Network interface that gloo and NCCL use. null: gloo and NCCL choose an interface themselves."""
    nccl: dict[VariableName, NcclVariable] = Field(default_factory=dict)
    """Environment variables of NCCL, each with its value and reason."""
    prelude: tuple[Line, ...] = ()
    """Shell lines that run before Python starts, such as `module load cuda` or `conda activate x`."""
    kubernetes: KubernetesSection = Field(
        default_factory=KubernetesSection, description="Image, volumes and labels of a site that runs Kubernetes."
    )
    python: PathText | None = None
    """Python interpreter on the nodes. null: the interpreter in the clone's .venv if there is one, else python3."""
    container: ContainerSection = Field(default_factory=NoContainer, description="Container in which the ranks run.")
    domain_nodes: PositiveInt | None = None
    """Number of nodes in the fastest interconnect domain (1: NVLink inside a node). The nodes of an EP group must belong to
    one domain. null: no domain is declared, an EP group may use any nodes."""
    time: Annotated[str, Field(pattern=TIME_PATTERN)] = "24:00:00"
    """Time limit of one attempt of a job, in Slurm's format."""
    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which Slurm sends the signal to save a checkpoint and stop."""
    max_restarts: Count = Field(
        default=MAX_RESTARTS, description="Automatic restarts of one job, whatever ended its attempts."
    )

    @property
    def network_variables(self) -> dict[str, str]:
        """Environment variables for NCCL and gloo, from the keys `nccl` and `interface`."""
        interface = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.interface) if self.interface else {}
        return {name: variable.value for name, variable in self.nccl.items()} | interface

    def limit_warning(self, seconds: float | None = None) -> str:
        """Returns a warning if the time limit `seconds` (by default `time`) leaves an attempt little time until its stop
        signal; else an empty text. A limit of 0 means no limit."""
        seconds = seconds_of(self.time) if seconds is None else seconds
        left = max(0.0, seconds - self.signal_seconds)
        if seconds == 0.0 or left >= TRAIN_SECONDS:
            return ""
        return (
            f"WARNING: the time limit of {seconds:g} s leaves an attempt {left:g} s until its stop signal "
            f"(signal_seconds={self.signal_seconds}), and the start takes part of that; two attempts in a row without "
            "gain end the job; raise the time limit, or lower signal_seconds in the cluster file"
        )

    def violations(self) -> Iterator[Violation]:
        limit = seconds_of(self.time)
        if 0.0 < limit <= self.signal_seconds:  # a limit of 0 means no limit
            problem = (
                f"signal_seconds={self.signal_seconds}: must be shorter than time={self.time!r}, because otherwise every "
                "attempt stops as soon as it starts; lower it, or raise time"
            )
            yield Violation(("time", "signal_seconds"), problem)
        for key, reserved in (("options", LAUNCHERS_OPTIONS), ("srun_options", SRUN_OPTIONS)):
            if ours := [option for option in getattr(self, key) if option[2:].partition("=")[0] in reserved]:
                problem = (
                    f"{key}: {', '.join(ours)}: the launcher sets these options; use the other keys of the cluster file"
                )
                yield Violation((key,), problem)


def seconds_of(time: str) -> float:
    """Converts a Slurm time, minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]], to seconds."""
    if time.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def load_cluster(name_or_path: str | None, env: Mapping[str, str]) -> Cluster:
    """Reads the cluster file that the argument names or, without an argument, $MOE_DIST_CLUSTER. The name is a path, or a
    bare name in configs/clusters. If neither is given, returns the defaults. Raises ConfigError, which lists all faults, if
    the file is unreadable or faulty."""
    path = cluster_file(name_or_path, env)
    if path is None:
        return Cluster()
    try:
        values, problems = read_mapping(path, "keys (account, partition, gpus, ...)")
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml"))) or "none"
        raise ConfigError(
            f"cluster file {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}; give a path, or one "
            f"of those in configs/clusters: {there}"
        ) from error
    if values is None or problems:
        raise ConfigError(problems, see=GUIDE)
    return draft(Cluster, values).checked(
        Cluster.violations, lambda problems: ConfigError([f"{path}: {problem}" for problem in problems], see=GUIDE)
    )


def cluster_file(name_or_path: str | None, env: Mapping[str, str]) -> Path | None:
    """Returns the path of the cluster file that `load_cluster` reads; None if `load_cluster` returns the defaults."""
    asked = name_or_path or env.get(VARIABLE)
    if not asked:
        return None
    bare = "/" not in asked and not asked.endswith((".yaml", ".yml"))
    return FOLDER / f"{asked}.yaml" if bare else find_config(asked)
