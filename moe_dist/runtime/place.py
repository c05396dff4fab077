"""Checks that a rank runs on its planned node, local rank and GPU, before the process group is created.

The launcher writes the planned node, local rank and GPU to MOE_DIST_PLACE. Their actual values come from SLURMD_NODENAME,
SLURM_LOCALID, the node's features (Slurm) or labels (Ray), and CUDA_VISIBLE_DEVICES.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from moe_dist.errors import ConfigError, PlacementError

PLACE = "MOE_DIST_PLACE"
FEATURES = "MOE_DIST_NODE_FEATURES"  # comma-separated features of this node; set by launchers.slurm
LABELS = "MOE_DIST_NODE_LABELS"  # labels of this node as a JSON mapping; set by launchers.ray


@dataclass(frozen=True)
class RunPlace:
    """The node, local rank and GPU that the plan assigns to one rank.

    Attributes:
        node: Index of the node in the plan.
        local_rank: Local rank on the node.
        host: Host name; None as long as no nodes are allocated.
        feature, labels: Slurm feature and Ray labels that the node must have.
        gpu: Index of the GPU among the visible GPUs; None if the run uses no GPUs.
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
        """Returns the content of MOE_DIST_PLACE; None if the variable is not set, for example under torchrun. Raises
        ConfigError if the variable is invalid."""
        text = env.get(PLACE)
        if not text:
            return None
        try:
            values = json.loads(text)
            return cls(**{**values, "groups": tuple(values.get("groups", ()))})  # JSON has no tuples
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"environment variable {PLACE}={text!r}: {error}; start ranks with a launcher") from error


@dataclass(frozen=True)
class Found:
    """The actual node, local rank and GPUs of a rank. None means unknown. `features` and `labels` belong to the node."""

    host: str | None = None
    local_rank: int | None = None
    features: frozenset[str] | None = None
    labels: Mapping[str, str] | None = None
    gpus: tuple[str, ...] | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "Found":
        """Reads MOE_DIST_NODE_FEATURES, MOE_DIST_NODE_LABELS and CUDA_VISIBLE_DEVICES. SLURMD_NODENAME and SLURM_LOCALID
        are read only if MOE_DIST_NODE_FEATURES is set, because inside a Slurm job other launchers inherit both."""
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
    """Raises PlacementError with all differences between the planned and the actual place. Without a plan does nothing."""
    if place is None:
        return
    problems = []
    if place.host is not None and found.host != place.host:
        problems.append(f"its node must be {place.host}, but it runs on {found.host}")
    if found.local_rank is not None and found.local_rank != place.local_rank:
        problems.append(f"its local rank must be {place.local_rank}, but is {found.local_rank}")
    alone = found.gpus is not None and len(found.gpus) == 1  # the launcher shows each rank only its own GPU
    if place.gpu is not None and found.gpus is not None and place.gpu >= len(found.gpus) and not alone:
        shown = ",".join(found.gpus) or "none"
        problems.append(
            f"it needs GPU {place.gpu} of {found.host}, but its visible GPUs are {shown} (CUDA_VISIBLE_DEVICES)"
        )
    if place.feature is not None and found.features is not None and place.feature not in found.features:
        has = ", ".join(sorted(found.features)) or "none"
        problems.append(f"its node must have the feature {place.feature!r}; {found.host} has {has}")
    if found.labels is not None:
        problems += [
            f"its node must have the label {name}={value!r}; {found.host} has {name}={found.labels.get(name)!r}"
            for name, value in place.labels.items()
            if found.labels.get(name) != value
        ]
    if problems:
        groups = f" (experts of {', '.join(place.groups)})" if place.groups else ""
        raise PlacementError(
            f"rank {place.rank}{groups} is not on its planned node: {'; '.join(problems)}; start the job with a launcher, "
            "which requests the right nodes, or change placement.groups.<group>.node"
        )
