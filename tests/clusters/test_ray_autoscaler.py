"""A run on an autoscaling Ray cluster without workers: the driver asks for the planned nodes, and withdraws the request."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from moe_dist.runtime.run_folder import RunFolder
from tests.support import ray_cluster
from tests.support.ray_cluster import STORE_BYTES, Driver, free_port, overrides, steps

STEPS = 2
NAME = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # of the head, for version 2 of the autoscaler
SECOND = {
    1: {},
    2: {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": NAME, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": NAME},
}


def scaling_config(workers: dict[str, Any], version: int) -> dict[str, Any]:
    """Ray's fake provider: each node that the autoscaler starts is a raylet on this machine."""
    provider = {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake_multinode",
        "max_workers": 4,
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1.0,
        "provider": provider | ({"launch_multiple": True, "head_node_id": NAME} if version == 2 else {}),
        "available_node_types": {**workers, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_starts_the_nodes_of_the_plan(tmp_path: Path, version: int) -> None:
    workers = {"worker": {"resources": {"CPU": 1, "object_store_memory": STORE_BYTES}, "node_config": {}, "max_workers": 4}}
    (tmp_path / "scaling.json").write_text(json.dumps(scaling_config(workers, version)))
    with ray_cluster.environment(AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1", **SECOND[version]) as folder:
        gcs = free_port()
        options = [
            f"--port={gcs}",
            f"--dashboard-port={free_port()}",
            "--num-cpus=0",
            f"--object-store-memory={STORE_BYTES}",
        ]
        scaling = f"--autoscaling-config={tmp_path / 'scaling.json'}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address=127.0.0.1", scaling]
        try:
            subprocess.run([*command, *options], check=True)
            job = Driver(
                "launchers.ray",
                f"127.0.0.1:{gcs}",
                RunFolder(tmp_path / "scaled"),
                *overrides(tmp_path, "scaled", STEPS),
                "--wait-for-nodes=500",
                "--env",
                ray_cluster.MARK,
                log=tmp_path / "scaled.out",
            )
            assert job.wait() == 0, job.printed
            ray.init(f"127.0.0.1:{gcs}")
            states = {group["state"] for group in placement_group_table().values()}
            ray.shutdown()
        finally:
            ray_cluster.end_all(folder)
    assert len(steps(job.run)) == STEPS
    assert states == {"REMOVED"}, "the request, and the actors' group"
