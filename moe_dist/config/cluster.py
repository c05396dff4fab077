"""The cluster file: settings of one site. It is never part of a run's identity, so a run may continue at another site.

    configs/clusters/<name>.yaml, chosen by `--cluster` or $MOE_DIST_CLUSTER; without either, the defaults below.

Its values become part of shell lines. Names may hold no special characters of the shell, all other values are quoted where
they are used, except `prelude`, which is shell code. So a cluster file is as powerful as a script: read one before you use
it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.partial import draft
from moe_dist.config.section import Count, Name, PathText, Section, Violation
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError

FOLDER = source_root() / "configs" / "clusters"
VARIABLE = "MOE_DIST_CLUSTER"
GUIDE = "docs/scaling.md"

# Account, partition, interface: names that sites choose, also without special characters of the shell.
SITE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.,@:=+-]{0,127}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
TIME_PATTERN = r"^([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}$"
OPTION_PATTERN = r"^--[a-z][a-z-]*(=[^\x00-\x1f\x7f-\x9f]+)?$"
LINE_PATTERN = r"^[^\x00-\x08\x0a-\x1f\x7f-\x9f]+$"
SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
VariableName = Annotated[str, Field(pattern=VARIABLE_PATTERN)]
Option = Annotated[str, Field(pattern=OPTION_PATTERN)]
# Options that the launcher sets itself, from the plan, the run and the other keys of the cluster file.
LAUNCHERS_OPTIONS = frozenset(
    (
        *("account", "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "export", "gpus", "gres"),
        *("gpus-per-node", "hetjob", "input", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
        *("output", "parsable", "partition", "qos", "requeue", "signal", "test-only", "time", "wait", "wrap"),
    )
)
Line = Annotated[str, Field(pattern=LINE_PATTERN)]


class GpuSection(Section):
    """The GPUs of a node, and how the site asks for them."""

    syntax: Literal["gres", "gpus-per-node", "none"] = "gres"
    """--gres=gpu:8, --gpus-per-node=8, or no GPUs at this site."""
    type: Name | None = Field(default=None, description="Type in the request, as in gpu:h100:8; null asks for any.")
    per_node: PositiveInt = Field(default=8, description="GPUs of a node, one rank each.")


class NcclVariable(Section):
    """One variable of NCCL with the reason why this site sets it."""

    value: Line = Field(description="Its value.")
    reason: Line = Field(description="Why; a variable that nobody can explain is one that nobody dares to remove.")


class NoContainer(Section):
    """Ranks run on the node as it is."""

    kind: Literal["none"] = "none"


class PyxisContainer(Section):
    """Ranks run in a container that Slurm's plugin pyxis starts."""

    kind: Literal["pyxis"] = "pyxis"
    image: Line = Field(description="Image: a squashfs file, or registry#name:tag.")
    mounts: tuple[Line, ...] = Field(default=(), description="What it sees of the node: SOURCE:TARGET[:FLAGS].")


class ApptainerContainer(Section):
    """Ranks run in a container that apptainer starts."""

    kind: Literal["apptainer"] = "apptainer"
    image: Line = Field(description="Image: a .sif file, or docker://name:tag.")
    mounts: tuple[Line, ...] = Field(default=(), description="What it sees of the node: SOURCE:TARGET[:FLAGS].")


ContainerSection = Annotated[NoContainer | PyxisContainer | ApptainerContainer, Field(discriminator="kind")]


class Cluster(Section):
    """One site."""

    account: SiteName | None = Field(default=None, description="Slurm account that pays.")
    partition: SiteName | None = Field(default=None, description="Slurm partition; null is the site's default.")
    qos: SiteName | None = Field(default=None, description="Slurm quality of service.")
    options: tuple[Option, ...] = ()
    """Further options of sbatch, for every part of a job, as --mem=0, --exclude=node7, --reservation=x."""
    gpus: GpuSection = Field(default_factory=GpuSection, description="The GPUs of a node.")
    ranks_per_node: PositiveInt = Field(default=4, description="Ranks of a node where they compute on the CPU.")
    cpus_per_rank: PositiveInt | None = None
    """CPU cores a rank asks for; null leaves that to the site."""
    interface: SiteName | None = None
    """Network interface of the interconnect, for gloo and NCCL; null lets them choose."""
    nccl: dict[VariableName, NcclVariable] = Field(default_factory=dict)
    """Variables of NCCL, each with its value and reason."""
    prelude: tuple[Line, ...] = ()
    """Shell lines before Python starts, as `module load cuda` or `conda activate x`."""
    python: PathText | None = None
    """Interpreter on the nodes; null is that of the clone's .venv, else python3."""
    container: ContainerSection = Field(default_factory=NoContainer, description="What the ranks run in.")
    domain_nodes: PositiveInt | None = None
    """Nodes of the fastest domain (1: NVLink inside a node), which an EP group must not leave; null: not declared, an EP
    group may lie on any nodes."""
    time: Annotated[str, Field(pattern=TIME_PATTERN)] = "24:00:00"
    """Time limit of one start of a job, as Slurm writes it."""
    signal_seconds: PositiveInt = 300
    """Seconds before the time limit at which ranks are told to save and stop."""
    max_restarts: Count = Field(default=20, description="How often a job is started again before somebody has to look.")

    @property
    def network_variables(self) -> dict[str, str]:
        """Environment variables for NCCL and gloo: `nccl`, and both libraries' interface."""
        interface = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.interface) if self.interface else {}
        return {name: variable.value for name, variable in self.nccl.items()} | interface

    def violations(self) -> Iterator[Violation]:
        """Two rules. A signal sent at once would stop every job as soon as it trains. A repeated option would override the
        plan, or be overridden."""
        limit = seconds_of(self.time)
        if 0.0 < limit <= self.signal_seconds:  # a limit of 0 means none
            problem = (
                f"signal_seconds={self.signal_seconds}: must be shorter than time={self.time!r}, or ranks are told to save "
                "and stop as soon as they have begun; lower it, or ask for more time"
            )
            yield Violation(("time", "signal_seconds"), problem)
        if ours := [option for option in self.options if option[2:].partition("=")[0] in LAUNCHERS_OPTIONS]:
            problem = f"options: {', '.join(ours)}: the launcher says that; use the other keys of the cluster file"
            yield Violation(("options",), problem)


def seconds_of(time: str) -> float:
    """Seconds of a Slurm time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
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
    """The cluster file given by the argument, else by $MOE_DIST_CLUSTER, else the defaults.

    Args:
        name_or_path: A path, or the bare name of a file in configs/clusters.
        env: The environment.

    Raises:
        ConfigError: the file cannot be read, or has faults; lists all of them.
    """
    path = cluster_file(name_or_path, env)
    if path is None:
        return Cluster()
    try:
        values, problems = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml"))) or "none"
        raise ConfigError(
            f"cluster file {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}; give a path, or one "
            f"of those in configs/clusters: {there}"
        ) from error
    if values is not None and not isinstance(values, dict):
        problems = [*problems, f"must be a mapping of keys (account, partition, gpus, ...), got {type(values).__name__}"]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems], see=GUIDE)
    read = draft(Cluster, values or {})
    problems = [*read.problems, *(read.broken(read.value.violations()) if read.value is not None else [])]
    if problems or read.value is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems], see=GUIDE)
    return read.value


def cluster_file(name_or_path: str | None, env: Mapping[str, str]) -> Path | None:
    """Path of the cluster file, chosen as in `load_cluster`; None for the defaults."""
    asked = name_or_path or env.get(VARIABLE)
    if not asked:
        return None
    bare = "/" not in asked and not asked.endswith((".yaml", ".yml"))
    return FOLDER / f"{asked}.yaml" if bare else find_config(asked)
