"""Defines the section of a cluster file that has the settings of a site on Kubernetes."""

from typing import Annotated

from pydantic import Field

from moe_dist.config.base.section import PathText, PositiveInt, Section

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
