"""Whether a rank is where the plan wants it: node feature or label, host, local rank, GPU. Before there is a process group.

A launcher says where a rank belongs (MOE_DIST_PLACE, from `launchers.command`); what is there comes from the node itself:
SLURMD_NODENAME, SLURM_LOCALID and the node's features under Slurm, the node's labels under Ray, CUDA_VISIBLE_DEVICES.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from moe_dist.errors import ConfigError, PlacementError

PLACE = "MOE_DIST_PLACE"
FEATURES = "MOE_DIST_NODE_FEATURES"  # of the node this process runs on, comma-separated; by launchers.slurm
LABELS = "MOE_DIST_NODE_LABELS"  # likewise, a JSON mapping; by launchers.ray


@dataclass(frozen=True)
class RunPlace:
    """Where the plan puts one rank.

    Attributes:
        rank: Over all nodes.
        node: Index of the node in the plan.
        local_rank: Among the ranks of the node.
        groups: Expert groups that live on it.
        host: Name of the node; None where the plan does not know it.
        feature, labels: What the node must have.
        gpu: Index among the GPUs that the rank sees; None without GPUs.
    """

    rank: int
    node: int
    local_rank: int
    groups: tuple[str, ...] = ()
    host: str | None = None
    feature: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    gpu: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "RunPlace | None":
        """The place in MOE_DIST_PLACE; None where nobody planned one (torchrun).

        Raises:
            ConfigError: it cannot be read.
        """
        text = env.get(PLACE)
        if not text:
            return None
        try:
            values = json.loads(text)
            return cls(**{**values, "groups": tuple(values.get("groups", ()))})
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"environment variable {PLACE}={text!r}: {error}; start ranks with a launcher") from error


@dataclass(frozen=True)
class Found:
    """What a rank finds where it runs. None: nobody here can tell.

    Attributes:
        host: Name of the node.
        local_rank: Among the tasks of the node.
        features, labels: Of the node.
        gpus: The GPUs that the rank sees.
    """

    host: str | None = None
    local_rank: int | None = None
    features: frozenset[str] | None = None
    labels: Mapping[str, str] | None = None
    gpus: tuple[str, ...] | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Found":
        """Reads MOE_DIST_NODE_FEATURES, MOE_DIST_NODE_LABELS and CUDA_VISIBLE_DEVICES; SLURMD_NODENAME and SLURM_LOCALID
        only where our Slurm launcher has set the first: any other process of a Slurm job inherits those."""
        features, labels, gpus = (env.get(name) for name in (FEATURES, LABELS, "CUDA_VISIBLE_DEVICES"))
        slurm = env if features is not None else {}
        local = slurm.get("SLURM_LOCALID", "")
        return cls(
            host=slurm.get("SLURMD_NODENAME") or socket.gethostname(),
            local_rank=int(local) if local.isdecimal() else None,
            features=None if features is None else frozenset(filter(None, features.split(","))),
            labels=None if labels is None else json.loads(labels),
            gpus=None if gpus is None else tuple(filter(None, gpus.split(","))),
        )


def check_place(place: RunPlace | None, found: Found) -> None:
    """Holds a rank's place against what is there. No plan, no complaint.

    Raises:
        PlacementError: it is elsewhere; says which rank, what the plan says and what is there, all differences at once.
    """
    if place is None:
        return
    problems = [*_where(place, found), *_what(place, found)]
    if problems:
        groups = f" (experts of {', '.join(place.groups)})" if place.groups else ""
        raise PlacementError(
            f"rank {place.rank}{groups} is not where the plan puts it: {'; '.join(problems)}; start the job with a launcher, "
            "which asks for such nodes, or change placement.groups.<group>.node"
        )


def _where(place: RunPlace, found: Found) -> list[str]:
    problems = []
    if place.host is not None and found.host != place.host:
        problems.append(f"it belongs on {place.host} and runs on {found.host}")
    if found.local_rank is not None and found.local_rank != place.local_rank:
        problems.append(f"it is to be number {place.local_rank} on its node and is number {found.local_rank}")
    if place.gpu is not None and found.gpus is not None and place.gpu >= len(found.gpus):
        shown = ",".join(found.gpus) or "none"
        problems.append(
            f"it is to compute on GPU {place.gpu} of {found.host}, which shows it {shown} (CUDA_VISIBLE_DEVICES)"
        )
    return problems


def _what(place: RunPlace, found: Found) -> list[str]:
    problems = []
    if place.feature is not None and found.features is not None and place.feature not in found.features:
        has = ", ".join(sorted(found.features)) or "none"
        problems.append(f"its node must have the feature {place.feature!r}; {found.host} has {has}")
    if found.labels is not None:
        problems += [
            f"its node must have the label {name}={value!r}; {found.host} has {name}={found.labels.get(name)!r}"
            for name, value in place.labels.items()
            if found.labels.get(name) != value
        ]
    return problems
