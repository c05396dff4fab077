"""Tests without a cluster which variables ranks get on Ray, and which nodes each attempt avoids."""

import contextlib
import json
import socket
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.command import JobPlan, LaunchPlan, NodePlan
from launchers.rank_tracker import Outcome
from launchers.ray import driver
from launchers.ray.driver import connected, site_variables, worker_variables
from launchers.ray.job import RayJob
from launchers.ray.rank import WorkerInfo
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ResourceError
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopSignals

PLAN = JobPlan((NodePlan(0, (0, 2)), NodePlan(1, (1, 3))), gpus_per_node=2, groups=(("text",), ("image",), (), ("image",)))
WORKERS = [
    WorkerInfo("n0", "10.0.0.1", {"modality": "text", "ray.io/node-id": "n0"}, ("3",)),
    WorkerInfo("n1", "10.0.0.2", {}, ("0",)),
]
WORKERS += [WorkerInfo("n0", "10.0.0.1", {}, ("1",)), WorkerInfo("n1", "10.0.0.2", {}, ("5",))]


def test_a_rank_sees_the_gpus_of_its_node_with_its_own_at_its_local_rank() -> None:
    variables = worker_variables(PLAN, WORKERS)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables] == ["3,1", "0,5", "3,1", "0,5"]
    for rank, worker in enumerate(WORKERS):
        local = PLAN.place_of(rank).local_rank
        assert variables[rank]["CUDA_VISIBLE_DEVICES"].split(",")[local] == worker.gpus[0]
    assert json.loads(variables[0]["MOE_DIST_NODE_LABELS"]) == dict(WORKERS[0].labels)
    without = [WorkerInfo("n", "10.0.0.1", {}, ())] * 4
    assert all("CUDA_VISIBLE_DEVICES" not in each for each in worker_variables(PLAN, without))


def test_rank_0_listens_at_its_own_node_or_at_the_interface_of_the_site() -> None:
    assert site_variables(Cluster(), WORKERS, 0) == {"MOE_DIST_RENDEZVOUS_HOST": "10.0.0.1"}
    assert site_variables(Cluster(), WORKERS, 1) == {}
    site = Cluster.model_validate({"interface": "ib0", "nccl": {"NCCL_IB_HCA": {"value": "mlx5", "reason": "no RoCE"}}})
    named = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5"}
    assert site_variables(site, WORKERS, 0) == named


def test_a_missing_cluster_is_a_placement_error_with_a_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = "{}:{}".format(*gone.getsockname())
    with pytest.raises(ResourceError, match=f"no Ray cluster at {address}") as error, connected({"RAY_ADDRESS": address}):
        pass
    assert "--submit ADDRESS" in str(error.value)


def test_each_attempt_avoids_the_nodes_where_the_attempts_before_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gather_gang` is a stand-in; test_gang.py tests its argument `avoid`."""
    folder, avoided = RunFolder(tmp_path / "run"), list[set[str]]()
    plan = JobPlan((NodePlan(0, (0,)), NodePlan(1, (1,))))
    ends = [((1, -9), (0, 1)), ((1, 1), (0, 1)), ((0, 0), ())]  # (exit codes of both ranks, ranks that failed)

    def gather_gang(*_: object, avoid: Collection[str], **__: object) -> Any:
        attempt = len(avoided)
        avoided.append({*avoid})
        nodes = [SimpleNamespace(node_id=f"attempt {attempt}, node of rank {rank}", address="") for rank in range(2)]

        def run(*_: object) -> Outcome:
            (folder.checkpoints / "latest").write_text(f"step_{1 + attempt}")
            return Outcome(*ends[attempt])

        parts = {"job": plan, "workers": WORKERS[:2], "hosts": ("n0", "n1"), "node": nodes.__getitem__}
        return SimpleNamespace(**parts, run=run, close=lambda: None)

    folder.checkpoints.mkdir(parents=True)
    monkeypatch.setattr(driver, "gather_gang", gather_gang)
    monkeypatch.setattr(driver, "connected", lambda env: contextlib.nullcontext({}))
    monkeypatch.setattr(driver, "LAST_LINES_SECONDS", 0.0)
    launch = LaunchPlan(Path("x.yaml"), (), plan, {}, 0, "x")
    job = RayJob(launch, Cluster(), folder, tmp_path, 5)
    with StopSignals() as signals:
        assert driver.drive(job, signals) == 0
    first, second = "attempt 0, node of rank 1", "attempt 1, node of rank 0"
    assert avoided == [set(), {first}, {first, second}]
