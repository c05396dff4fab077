"""Variables and messages of the Ray driver, without a cluster."""

import contextlib
import json
import socket
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.rank_tracker import Outcome
from launchers.ray import driver
from launchers.ray.driver import connected, grace_text, site_variables, stop_grace, worker_variables, workers_table
from launchers.ray.job import RayJob
from launchers.ray.rank import WorkerInfo
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ResourceError
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopSignals

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
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


def test_without_gpus_facts_about_gpus_are_ignored() -> None:
    workers = [WorkerInfo("n", "10.0.0.1", {}, ())] * 4
    assert all("CUDA_VISIBLE_DEVICES" not in each for each in worker_variables(PLAN, workers))


def test_rank_0_listens_at_its_own_node_or_at_the_interface_of_the_site() -> None:
    assert site_variables(Cluster(), WORKERS, 0) == {"MOE_DIST_RENDEZVOUS_HOST": "10.0.0.1"}
    assert site_variables(Cluster(), WORKERS, 1) == {}
    site = Cluster.model_validate({"interface": "ib0", "nccl": {"NCCL_IB_HCA": {"value": "mlx5", "reason": "no RoCE"}}})
    named = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0", "NCCL_IB_HCA": "mlx5"}
    assert site_variables(site, WORKERS, 0) == named


def test_each_rank_is_shown_where_it_is() -> None:
    assert workers_table(PLAN, WORKERS).splitlines() == [
        "rank 0  10.0.0.1  modality=text  GPU 3  experts of text",
        "rank 1  10.0.0.2  -  GPU 0  experts of image",
        "rank 2  10.0.0.1  -  GPU 1",
        "rank 3  10.0.0.2  -  GPU 5  experts of image",
    ]


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({}, None),
        (JOB, 3.0),
        ({**JOB, "RAY_JOB_STOP_WAIT_TIME_S": "300"}, 300.0),
        ({**JOB, "RAY_JOB_STOP_WAIT_TIME_S": "x"}, 3.0),
    ],
    ids=["no job", "Ray's default", "set", "no number"],
)
def test_the_grace_is_that_of_rays_job_api(env: dict[str, str], seconds: float | None) -> None:
    assert stop_grace(env) == seconds


@pytest.mark.parametrize(
    ("grace", "save", "said", "warned"),
    [
        (300.0, None, "the grace period for a stop is 300 s (RAY_JOB_STOP_WAIT_TIME_S); this run has not saved yet", False),
        (300.0, 30.0, "its last saves took up to 30.0 s", False),
        (300.0, 290.0, "`ray job stop` may kill the run before it has saved", True),
        (3.0, None, "RAY_JOB_STOP_WAIT_TIME_S", True),
        (3.0, 0.1, "RAY_JOB_STOP_WAIT_TIME_S", True),
    ],
)
def test_a_grace_too_short_for_the_measured_saves_is_warned_of(
    grace: float, save: float | None, said: str, warned: bool
) -> None:
    text = grace_text(grace, save)
    assert said in text
    assert ("WARNING" in text) == warned


def test_a_missing_cluster_is_a_placement_error_with_a_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = "{}:{}".format(*gone.getsockname())
    with pytest.raises(ResourceError, match=f"no Ray cluster at {address}") as error, connected({"RAY_ADDRESS": address}):
        pass
    assert "--submit ADDRESS" in str(error.value)


def test_outside_of_a_job_there_is_no_grace_to_tell() -> None:
    assert grace_text(None, 5.0) == ""


def test_each_attempt_avoids_the_nodes_where_the_attempts_before_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gather_gang` is a stand-in: its own tests show what `avoid` does."""
    folder, avoided = RunFolder(tmp_path / "run"), list[set[str]]()
    plan = JobPlan((NodePlan(0, (0,)), NodePlan(1, (1,))))
    ends = [((1, -9), (0, 1)), ((1, 1), (0, 1)), ((0, 0), ())]  # the codes of both ranks, and the ranks that failed

    def gather_gang(*_: object, avoid: Collection[str], **__: object) -> Any:
        attempt = len(avoided)
        avoided.append({*avoid})
        nodes = [SimpleNamespace(node_id=f"attempt {attempt}, node of rank {rank}") for rank in range(2)]

        def run(*_: object) -> Outcome:
            (folder.checkpoints / "latest").write_text(f"step_{1 + attempt}")
            return Outcome(*ends[attempt])

        parts = {"job": plan, "workers": WORKERS[:2], "hosts": ("n0", "n1"), "node": nodes.__getitem__}
        return SimpleNamespace(**parts, run=run, close=lambda: None)

    folder.checkpoints.mkdir(parents=True)
    monkeypatch.setattr(driver, "gather_gang", gather_gang)
    monkeypatch.setattr(driver, "connected", lambda env: contextlib.nullcontext({}))
    monkeypatch.setattr(driver, "LAST_LINES_SECONDS", 0.0)
    job = RayJob(Path("x.yaml"), (), plan, Cluster(), folder, tmp_path, 5, None, ("-m", "moe_dist.train"))
    with StopSignals() as signals:
        assert driver.drive(job, signals) == 0
    first, second = "attempt 0, node of rank 1", "attempt 1, node of rank 0"
    assert avoided == [set(), {first}, {first, second}]
