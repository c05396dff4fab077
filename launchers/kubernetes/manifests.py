"""Makes the Kubernetes objects of a run: a RayJob of KubeRay, or one indexed Job for each kind of node.

As in all other launchers, `launchers.command.plan_job` plans the nodes. Each pod stands for one planned node, and
requests all GPUs of that node. The objects belong to the APIs batch/v1 and ray.io/v1. The labels of worker groups need
KubeRay 1.5 or later.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launchers.command import JobPlan, NodePlan
from launchers.ray.nodes import DOMAIN, nodes_sharing_ep_groups
from launchers.restart import FINAL, STOPPED
from moe_dist.config.cluster import Cluster
from moe_dist.errors import EXIT_DONE

Manifest = dict[str, Any]
FILES = "/etc/moe_dist"  # folder of the configuration and the cluster file in every pod
RUN, PART, SET = "moe-dist/run", "moe-dist/part", "moe-dist/domain"  # labels of pods
_MOST_NAME = 40  # largest number of characters that an object's name takes from the run's name; a pod's name is longer


@dataclass(frozen=True)
class Part:
    """Planned nodes whose pods are equal. Parts with the same number `domain` must run in one interconnect domain. With
    None, any nodes may run the part."""

    name: str
    nodes: tuple[NodePlan, ...]
    labels: Mapping[str, str]
    domain: int | None = None


def parts_of(plan: JobPlan, *, ep: int, domains: bool) -> tuple[Part, ...]:
    """Divides the planned nodes into sets with equal pods. With `domains`, each EP group must stay in one domain."""
    domain_of: dict[int, int] = {}
    for number, indexes in enumerate(nodes_sharing_ep_groups(plan, ep) if domains else []):
        if len(indexes) > 1:  # a single node is in one domain anyway
            domain_of |= dict.fromkeys(indexes, number)
    found: dict[tuple[tuple[tuple[str, str], ...], int | None, int], list[NodePlan]] = {}
    for node in plan.nodes:
        key = (tuple(sorted(node.ray_labels.items())), domain_of.get(node.index), len(node.ranks))
        found.setdefault(key, []).append(node)
    return tuple(
        Part(f"part{number}", tuple(nodes), dict(labels), domain)
        for number, ((labels, domain, _), nodes) in enumerate(found.items())
    )


def object_name(run: str) -> str:
    """Returns a name for the Kubernetes objects of a run, with lower-case letters, digits and dashes. The name begins with
    a letter, as names of Services must. A name that is too long is cut, and ends with a hash of the whole name."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if len(name) <= _MOST_NAME:
        return name
    return f"{name[: _MOST_NAME - 9].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Manifests:
    """Makes the objects of one run.

    Attributes:
        files: Names and texts of the files in the folder `FILES`: the configuration, and the cluster file if there is one.
        arguments: Configuration, overrides and options for the launcher inside the pods.
    """

    run: str
    plan: JobPlan
    parts: tuple[Part, ...]
    cluster: Cluster
    files: Mapping[str, str]
    arguments: tuple[str, ...]

    def jobs(self) -> list[Manifest]:
        """Returns a ConfigMap, a Service that gives the pods host names, and a Job for each part.

        A rank that fails ends its pod; the other ranks then lose their connections to this rank, and all pods end.
        Kubernetes replaces the pods, and the ranks resume from the last checkpoint, at most `max_restarts` times. If the
        exit code says that the error would repeat, the Job ends at once.
        """
        name, first = object_name(self.run), next(part for part in self.parts if part.nodes[0].index == 0)
        service = self._object("v1", "Service", name)
        # Addresses are published at once, because the ranks meet before their pods count as ready.
        service["spec"] = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {RUN: name}}
        rank0 = f"{name}-{first.name}-0.{name}"  # host name of the first pod of an indexed Job
        meeting = {"MASTER_ADDR": rank0, "MASTER_PORT": str(self.cluster.kubernetes.port)}
        return [self._config_map(), service, *(self._job(part, name, meeting) for part in self.parts)]

    def ray_job(self) -> list[Manifest]:
        """Returns a ConfigMap, and a RayJob whose driver restarts the ranks itself."""
        driver = shlex.join([self._python, "-m", "launchers.ray", *self.arguments])
        environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.cluster.signal_seconds)}}
        job = self._object("ray.io/v1", "RayJob", object_name(self.run))
        job["spec"] = {
            "entrypoint": driver,
            "runtimeEnvYAML": json.dumps(environment),  # JSON is YAML
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},  # no rank runs on the head
                    "template": self._pod("ray-head", labels={}, resources={}),
                },
                "workerGroupSpecs": [self._worker_group(part) for part in self.parts],
            },
        }
        return [self._config_map(), job]

    @property
    def _python(self) -> str:
        return self.cluster.python or "python"

    def _object(self, version: str, kind: str, name: str) -> Manifest:
        namespace = self.cluster.kubernetes.namespace
        place = {} if namespace is None else {"namespace": namespace}
        return {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, **place, "labels": {RUN: object_name(self.run)}},
        }

    def _config_map(self) -> Manifest:
        return self._object("v1", "ConfigMap", object_name(self.run)) | {"data": dict(self.files)}

    def _job(self, part: Part, name: str, meeting: Mapping[str, str]) -> Manifest:
        nodes = ",".join(str(node.index) for node in part.nodes)
        words = [self._python, "-m", "launchers.kubernetes.pod", "--nodes", nodes, *self.arguments]
        template = self._pod("ranks", labels=self._selector(part), resources=self._resources(part), part=part)
        (container,) = template["spec"]["containers"]
        # `exec` replaces the shell that has run the prelude. `launchers.kubernetes.pod` therefore gets the signals of
        # Kubernetes.
        lines = [*self.cluster.prelude, f"exec {shlex.join(words)}"]
        container["command"] = ["bash", "-c", "\n".join(lines)] if self.cluster.prelude else words
        container["env"] += [{"name": key, "value": value} for key, value in meeting.items()]
        template["spec"] |= {"subdomain": name, "restartPolicy": "Never"}
        job = self._object("batch/v1", "Job", f"{name}-{part.name}")
        final = sorted(FINAL - {EXIT_DONE, STOPPED})
        job["spec"] = {
            "completionMode": "Indexed",
            "completions": len(part.nodes),
            "parallelism": len(part.nodes),
            "backoffLimit": self.cluster.max_restarts * len(part.nodes),  # counts pods, because a failed run ends all pods
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},  # a drain
                    # After a pod is drained, the ranks of the other pods save and end with this exit code.
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": final}},
                ]
            },
            "template": template,
        }
        return job

    def _worker_group(self, part: Part) -> Manifest:
        labels = dict(part.labels) | ({DOMAIN: f"domain-{part.domain}"} if part.domain is not None else {})
        pod = self._pod("ray-worker", labels=self._selector(part), resources=self._resources(part), part=part)
        count = len(part.nodes)
        group = {"groupName": part.name, "replicas": count, "minReplicas": count, "maxReplicas": count}
        return {**group, "labels": labels, "rayStartParams": {}, "template": pod}

    def _selector(self, part: Part) -> dict[str, str]:
        return {**self.cluster.kubernetes.node_labels, **part.labels}

    def _resources(self, part: Part) -> dict[str, str]:
        cpus = len(part.nodes[0].ranks) * (self.cluster.cpus_per_rank or 1)
        gpus = self.plan.gpus_per_node
        return {"cpu": str(cpus)} | ({self.cluster.kubernetes.gpu_resource: str(gpus)} if gpus else {})

    def _pod(
        self, name: str, *, labels: Mapping[str, str], resources: Mapping[str, str], part: Part | None = None
    ) -> Manifest:
        """Returns the template of a pod with one container called `name`."""
        site = self.cluster.kubernetes
        own = {RUN: object_name(self.run)} | ({PART: part.name} if part is not None else {})
        volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in site.claims]
        mounts = [{"name": claim, "mountPath": path} for claim, path in site.claims.items()]
        memory = {"medium": "Memory", "sizeLimit": f"{site.shared_memory_gib}Gi"}
        volumes += [
            {"name": "moe-dist-files", "configMap": {"name": object_name(self.run)}},
            {"name": "moe-dist-shm", "emptyDir": memory},
        ]
        mounts += [{"name": "moe-dist-files", "mountPath": FILES}, {"name": "moe-dist-shm", "mountPath": "/dev/shm"}]
        container: Manifest = {
            "name": name,
            "image": site.image,
            "env": [{"name": key, "value": value} for key, value in self.cluster.network_variables.items()],
            "envFrom": [{"secretRef": {"name": secret}} for secret in site.secrets],
            "resources": {"requests": dict(resources), "limits": {k: v for k, v in resources.items() if k != "cpu"}},
            "volumeMounts": mounts,
        }
        spec: Manifest = {
            "containers": [container],
            "volumes": volumes,
            "nodeSelector": dict(labels),
            "terminationGracePeriodSeconds": self.cluster.signal_seconds,
        }
        if site.service_account is not None:
            spec["serviceAccountName"] = site.service_account
        if part is not None and part.domain is not None:
            own[SET] = str(part.domain)
            together = {"labelSelector": {"matchLabels": {RUN: own[RUN], SET: own[SET]}}, "topologyKey": site.domain_label}
            spec["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [together]}}
        if site_exclude := list(self.cluster.exclude):
            away = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": site_exclude}
            terms = {"nodeSelectorTerms": [{"matchExpressions": [away]}]}
            spec.setdefault("affinity", {})["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
        return {"metadata": {"labels": own}, "spec": spec}


def uncovered(paths: Mapping[str, str], claims: Sequence[str]) -> dict[str, str]:
    """Returns the `paths` (by configuration key) that are outside all the mounted folders in `claims`."""
    folders = [claim.rstrip("/") + "/" for claim in claims]
    return {key: path for key, path in paths.items() if not any(f"{path}/".startswith(folder) for folder in folders)}
