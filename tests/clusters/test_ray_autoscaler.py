"""If a run starts on an autoscaling Ray cluster without workers, the autoscaler gets the run's request for nodes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from moe_dist.errors import StoppedError
from moe_dist.runtime.run_folder import RunFolder
from tests.support import ray_cluster
from tests.support.ray_cluster import STORE_BYTES, Driver, free_port, overrides

COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
# Ray's fake provider starts nodes that look for the head at another port, so none of them joins.
SCALING = {
    "cluster_name": "fake_multinode",
    "max_workers": 4,
    "idle_timeout_minutes": 10,
    "upscaling_speed": 1.0,
    "provider": {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True},
    "available_node_types": {
        "worker": {"resources": {"CPU": 1, "object_store_memory": STORE_BYTES}, "node_config": {}, "max_workers": 4},
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    },
    "head_node_type": "ray.head.default",
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
    **{f"{name}_commands": [] for name in COMMANDS},
}


def test_an_autoscaler_is_asked_for_the_nodes_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "scaling.json").write_text(json.dumps(SCALING))
    with ray_cluster.environment(AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1") as folder:
        gcs = free_port()
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--node-ip-address=127.0.0.1"]
        command += [f"--autoscaling-config={tmp_path / 'scaling.json'}", f"--port={gcs}", "--num-cpus=0"]
        command += [f"--dashboard-port={free_port()}", f"--object-store-memory={STORE_BYTES}"]
        try:
            subprocess.run(command, check=True)
            run, log = RunFolder(tmp_path / "scaled"), tmp_path / "scaled.out"
            arguments = [*overrides(tmp_path, "scaled", 2), "--wait-for-nodes=500", "--env", ray_cluster.MARK]
            job = Driver("launchers.ray", f"127.0.0.1:{gcs}", run, *arguments, log=log)

            def queued() -> bool:
                said = "".join(path.read_text() for path in folder.glob("ray/session_2*/logs/monitor.log"))
                return "Queue 4 new nodes for launch" in said

            job.wait_until(queued, "four nodes are requested")
            job.process.send_signal(signal.SIGINT)
            assert job.wait() == StoppedError.exit_code, job.printed
        finally:
            ray_cluster.end_all(folder)
