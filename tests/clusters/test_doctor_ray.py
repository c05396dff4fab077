"""On a real Ray of four labelled nodes the doctor reports requests that no node fits, and visits every node."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support import ray_cluster
from tests.support.ray_cluster import CONFIG, DATA, INTERLEAVED, ROOT, RayCluster

Says = Callable[..., tuple[int, list[str]]]
# Ray's store of the cluster's state listens at all addresses, and this test sets no token.
EXPOSED = "WARN exposure: Ray accepts connections from other machines ("


@pytest.fixture(scope="module")
def says(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Says]:
    """Returns a function that runs the doctor and returns its exit code and its lines of output without notes."""
    root = tmp_path_factory.mktemp("runs")
    with ray_cluster.environment() as folder:
        cluster = RayCluster(folder)

        def run(*arguments: str) -> tuple[int, list[str]]:
            fixed = [f"run.root={root}", f"data.path={DATA}", "--on=ray"]
            done = subprocess.run(
                [sys.executable, "-m", "launchers.doctor", CONFIG, *fixed, *arguments],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": cluster.address},
                capture_output=True,
                text=True,
                check=False,
            )
            assert "Traceback" not in done.stderr, done.stderr
            return done.returncode, [line for line in done.stdout.splitlines() if not line.startswith("--")]

        try:
            yield run
        finally:
            cluster.close()
            ray_cluster.end_all(folder)


def faults(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("WARN", "FAIL")) and not line.startswith(EXPOSED)]


def test_every_node_is_visited_and_nothing_is_wrong_but_that_it_is_open(says: Says) -> None:
    code, lines = says(INTERLEAVED, "--probe", "--fabric")
    assert (code, faults(lines)) == (1, []), "\n".join(lines)
    checks = [line[5:].partition(":")[0] for line in lines]
    assert checks == [
        *("configuration", "plan", "scheduler", "nodes", "exposure", "rendezvous host", "ports", "shared folder", "room"),
        *("data", "clocks", "versions", "apex", "/dev/shm", "open files", "cores", "fabric"),
    ]
    assert "6 pairs of 4 nodes" in lines[-1]


def test_no_ray_at_all() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-m", "launchers.doctor", CONFIG, f"data.path={DATA}", f"run.root={ROOT / 'runs'}", "--on=ray"],
        cwd=ROOT,
        env={**env, "RAY_ADDRESS": "127.0.0.1:1", "RAY_gcs_rpc_server_reconnect_timeout_s": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69, done.stdout + done.stderr
    assert "FAIL scheduler: no Ray" in done.stdout
