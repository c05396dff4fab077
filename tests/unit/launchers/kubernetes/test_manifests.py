"""Validates the manifests of runs with Kubernetes' published schemas. A RayJob has no such schema: its pod templates are
validated, and its keys are compared with KubeRay's reference."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launchers.command import plan_job
from launchers.kubernetes.__main__ import Kind, manifests, text_of
from launchers.kubernetes.manifests import object_name
from launchers.kubernetes.pod import node_of_pod
from launchers.ray.nodes import DOMAIN
from launchers.restart import FINAL
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.errors import EXIT_DONE, ConfigError, StoppedError
from moe_dist.plan.preflight import layout_of_file
from tests.support.tiny import tiny_config, tiny_dataset, write_config

KUBERNETES = "1.30"
# The keys that the manifests use, as named in KubeRay 1.5's API reference of ray.io/v1.
RAY_JOB = {"entrypoint", "runtimeEnvYAML", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "labels", "rayStartParams", "template"}
SITE: dict[str, Any] = {
    "gpus": {"per_node": 2},
    "cpus_per_rank": 3,
    "interface": "eth0",
    "signal_seconds": 120,
    "exclude": ["bad-node"],
    "kubernetes": {
        "image": "registry/moe-dist:0.1",
        "namespace": "research",
        "secrets": ["wandb"],
        "node_labels": {"pool": "training"},
        "service_account": "trainer",
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    return folder


PINNED = {
    "parallel.ep": 4,
    "parallel.device": "cuda",
    "placement": {
        "policy": "pinned",
        "groups": {
            "text": {"ranks": [0, 3], "node": {"labels": {"modality": "text"}}},
            "image": {"ranks": [1, 2], "node": {"labels": {"modality": "image"}}},
        },
    },
}


def made(
    tmp_path: Path, data: Path, kind: Kind, changes: Mapping[str, Any] | None = None, site: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    values = {**SITE, **(site or {})}
    values["kubernetes"] = {"claims": {"shared": str(tmp_path), "data": str(data)}, **values["kubernetes"]}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(values))
    config = write_config(tiny_config(data, tmp_path / "runs", changes or PINNED), tmp_path / "run.yaml")
    return manifests(config, [], cluster=str(tmp_path / "site.yaml"), kind=kind)


def of_kind(found: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in found if each["kind"] == kind]


def as_pod(template: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "x"}, "spec": template["spec"]}


def test_jobs_are_valid_and_their_text_reads_back(tmp_path: Path, data: Path) -> None:
    found = made(tmp_path, data, Kind.JOB)
    assert [each["kind"] for each in found] == ["ConfigMap", "Service", "Job", "Job"]
    for each in found:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    assert list(yaml.safe_load_all(text_of(found))) == found
    for job in of_kind(found, "Job"):  # test_same_ranks.py tests the pods' ranks
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["requests"]["nvidia.com/gpu"] == "2"
        assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_all_pods_meet_at_the_pod_of_rank_0(tmp_path: Path, data: Path) -> None:
    found = made(tmp_path, data, Kind.JOB)
    (service,) = of_kind(found, "Service")
    for job in of_kind(found, "Job"):
        pod = job["spec"]["template"]["spec"]
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert variables["MASTER_ADDR"] == f"tiny-part0-0.{service['metadata']['name']}"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_errors_that_would_repeat_end_a_job_and_a_stop_does_not(tmp_path: Path, data: Path) -> None:
    (job, _) = of_kind(made(tmp_path, data, Kind.JOB), "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert set(actions["FailJob"]) == FINAL - {EXIT_DONE, StoppedError.exit_code}
    assert actions["Ignore"] == [StoppedError.exit_code]
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_a_failed_run_ends_all_pods_and_kubernetes_counts_pods(tmp_path: Path, data: Path) -> None:
    changes = {"parallel.ep": 2, "parallel.edp": 2, "parallel.device": "cuda"}
    jobs = of_kind(made(tmp_path, data, Kind.JOB, changes), "Job")
    assert [job["spec"]["completions"] for job in jobs] == [2]
    assert [job["spec"]["backoffLimit"] for job in jobs] == [2 * Cluster().max_restarts]


def test_ray_job_has_a_worker_group_for_each_kind_of_node(tmp_path: Path, data: Path) -> None:
    found = made(tmp_path, data, Kind.RAYJOB)
    (job,) = of_kind(found, "RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) == RAY_JOB
    cluster = job["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    assert [(group["labels"], group["replicas"]) for group in groups] == [
        ({"modality": "text"}, 1),
        ({"modality": "image"}, 1),
    ]
    for group in groups:
        assert set(group) == WORKER_GROUP
        assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
        assert group["template"]["spec"]["nodeSelector"] == {"pool": "training", **group["labels"]}
    for template in (cluster["headGroupSpec"]["template"], *(group["template"] for group in groups)):
        kubernetes_validate.validate(as_pod(template), KUBERNETES, strict=True)
    assert json.loads(job["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


def test_secrets_are_named_and_their_values_are_nowhere(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    for kind in Kind:
        text = json.dumps(made(tmp_path, data, kind))
        assert "planted-secret" not in text
        assert '{"secretRef": {"name": "wandb"}}' in text


def test_nodes_of_an_ep_group_share_a_domain(tmp_path: Path, data: Path) -> None:
    changes = {"parallel.ep": 4, "parallel.edp": 2, "parallel.device": "cuda", "train.global_batch": 16}
    site = {"domain_nodes": 2, "kubernetes": {**SITE["kubernetes"], "domain_label": "nvidia.com/gpu.clique"}}
    changes["placement"] = {"policy": "interleaved"}
    jobs = of_kind(made(tmp_path, data, Kind.JOB, changes, site), "Job")
    assert [job["spec"]["completions"] for job in jobs] == [2, 2]  # one Job for each EP group
    for number, job in enumerate(jobs):
        (term,) = job["spec"]["template"]["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "nvidia.com/gpu.clique"
        assert term["labelSelector"]["matchLabels"]["moe-dist/domain"] == str(number)
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
    (ray,) = of_kind(made(tmp_path, data, Kind.RAYJOB, changes, site), "RayJob")
    labels = [group["labels"][DOMAIN] for group in ray["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert labels == ["domain-0", "domain-1"]


def test_what_pods_could_not_reach_is_refused(tmp_path: Path, data: Path) -> None:
    changes = {"parallel.ep": 4, "parallel.device": "cuda", "placement": {"policy": "interleaved"}}
    site = {"domain_nodes": 2, "kubernetes": {"claims": {"shared": "/elsewhere"}}}
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, data, Kind.JOB, changes, site)
    text = str(caught.value)
    for words in ("kubernetes.image=null", "run.root=", "data.path=", "kubernetes.domain_label=null", "/elsewhere"):
        assert words in text


@pytest.mark.parametrize(("name", "expected"), [("Run_1.b", "run-1-b"), ("2024_run", "run-2024-run"), ("x" * 40, "x" * 40)])
def test_names_of_objects_are_valid(name: str, expected: str) -> None:
    assert object_name(name) == expected


def test_long_names_that_end_differently_stay_apart() -> None:
    names = {object_name("a_long_name_of_a_sweep_over_many_seeds_and_rates_" + end) for end in ("seed1", "seed2")}
    assert len(names) == 2
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40 for name in names)


@pytest.mark.parametrize(("nodes", "index"), [("0,9", "0"), ("0,1", "2"), ("0,1", None), ("", "0")])
def test_a_pod_outside_of_its_job_is_refused(tmp_path: Path, data: Path, nodes: str, index: str | None) -> None:
    made(tmp_path, data, Kind.JOB)
    plan = plan_job(layout_of_file(tmp_path / "run.yaml", []), load_cluster(str(tmp_path / "site.yaml"), {}))
    with pytest.raises(ConfigError, match="moe-dist launch kubernetes"):
        node_of_pod(plan, nodes, index)
