"""Two local processes act as the pods of an indexed Job: a rank dies, both pods end, and new pods resume the run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launchers.local import launch
from launchers.restart import committed_step
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config, tiny_dataset, write_config

SITE = {"gpus": {"syntax": "none"}, "ranks_per_node": 2, "cpus_per_rank": 1, "signal_seconds": 60}
PROGRAM = "launchers.kubernetes.pod"
CHANGES: dict[str, Any] = {
    "parallel.ep": 2, "parallel.edp": 2, "placement": {"policy": "interleaved"}, "checkpoint.every": 2,
    "parallel.timeout_seconds": 600.0, "evaluation.every": 1000, "evaluation.balance_efficiency": False,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_pods(config: Path, site: Path, *overrides: str) -> list[subprocess.Popen[bytes]]:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", PROGRAM, "--nodes", "0,1", str(config), *overrides, f"--cluster={site}"]
    return [
        subprocess.Popen(command, env={**os.environ, **meeting, "JOB_COMPLETION_INDEX": str(index)}) for index in range(2)
    ]


def exit_codes(pods: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [pod.wait(600) for pod in pods]


def wait_for_step(folder: RunFolder, step: int, pods: Sequence[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 600.0
    while committed_step(folder.checkpoints) < step:
        assert time.monotonic() < end
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.05)


def records(folder: RunFolder) -> list[dict[str, Any]]:
    return [reproducible_part(each) for each in read_lines(folder.metrics_jsonl) if each["kind"] != "hint"]


@pytest.mark.exhaustive  # takes three minutes; test_plain_launchers.py tests four faults of a single pod
def test_pods_lose_a_rank_stop_and_resume(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data")
    changed = tiny_config(tmp_path / "data", tmp_path / "runs", CHANGES)
    config, site = write_config(changed, tmp_path / "run.yaml"), tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump(SITE))
    folder, pods = RunFolder.of(changed), list[subprocess.Popen[bytes]]()
    try:
        pods = start_pods(config, site, "train.steps=100000")
        wait_for_step(folder, 4, pods)
        (victim, _) = psutil.Process(pods[1].pid).children()
        victim.send_signal(signal.SIGKILL)
        assert all(code not in (0, 75, 78) for code in exit_codes(pods))  # Kubernetes replaces both pods

        pods = start_pods(config, site, "train.steps=100000")
        wait_for_step(folder, committed_step(folder.checkpoints) + 2, pods)
        pods[0].send_signal(signal.SIGTERM)  # a drain of one node must save and stop the other pod as well
        assert exit_codes(pods) == [75, 75]

        steps = committed_step(folder.checkpoints) + 2
        pods = start_pods(config, site, f"train.steps={steps}")
        assert exit_codes(pods) == [0, 0]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    other = ["run.name=undisturbed", f"train.steps={steps}"]
    assert launch(config, other) == 0
    assert records(folder) == records(RunFolder(tmp_path / "runs" / "undisturbed"))
