"""Runs the default job under torchrun on two nodes (network namespaces with two ranks each). One agent is lost, and the run
ends bit-equal to an undisturbed run. The test needs root and the command `ip`, like `make test-clusters`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers.local import launch
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.clusters.conftest import DEFAULT, QUICK
from tests.support.cover import exhaustive
from tests.support.faults import PROGRAM, fault
from tests.support.shape import drawn
from tests.support.slurm import ROOT, overrides

STEPS = 6
SETTINGS = {
    **QUICK,
    "train.steps": STEPS,
    "checkpoint.every": 2,
    "checkpoint.asynchronous": "false",  # so that the step of the last checkpoint is known
    "parallel.timeout_seconds": 600,
}


@dataclass(frozen=True)
class Node:
    """A node: the prefix of commands that run on it, its address and its network interface."""

    enter: tuple[str, ...]
    address: str
    interface: str


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    names = [f"moe{os.getpid()}{side}" for side in "ab"]
    link = [f"me{os.getpid()}{side}" for side in "ab"]
    hosts = [f"{host}{drawn().domain}" for host in drawn().names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", link[0], "netns", names[0], "type", "veth", "peer", "name", link[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, link, strict=True), 1):
            ip("-n", name, "address", "add", f"{drawn().wire}.{number}/24", "dev", end)
            for up in (end, "lo"):
                ip("-n", name, "link", "set", up, "up")
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')
        enter = [("ip", "netns", "exec", name, *named, host) for name, host in zip(names, hosts, strict=False)]
        yield Node(enter[0], f"{drawn().wire}.1", link[0]), Node(enter[1], f"{drawn().wire}.2", link[1])
    finally:
        for name in names:  # no process is left, so the links disappear with their namespaces
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Torchrun:
    """The agents of one job, one on each node.

    Args:
        run: Overrides of the default configuration.
    """

    def __init__(self, nodes: Sequence[Node], backend: str, run: Sequence[str], log: Path) -> None:
        self._nodes, self._backend, self._run, self.log = nodes, backend, run, log
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self, number: int, **variables: str) -> subprocess.Popen[bytes]:
        node, first = self._nodes[number], self._nodes[0]
        meet = [f"--node-rank={number}", f"--master-addr={first.address}", f"--master-port={drawn().port}"]
        if self._backend == "c10d":
            conf = f"is_host={1 - number},read_timeout=600,keep_alive_max_attempt=6"  # a slow node must not count as lost
            meet = [f"--rdzv-endpoint={first.address}:{drawn().port}", "--rdzv-id=test", f"--rdzv-conf={conf}"]
            meet += ["--rdzv-backend=c10d", f"--local-addr={node.address}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=3"]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_DIST", "SLURM_", "OMP_"))}
        # Otherwise c10d keeps one store for all restarts, and an agent that joins later never gets the store's address.
        env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        env |= {"OMP_NUM_THREADS": "1"} if drawn().threads == "user" else {}  # otherwise torchrun itself sets it to 1
        env |= {"GLOO_SOCKET_IFNAME": node.interface, **variables}
        with self.log.open("ab") as log:
            agent = subprocess.Popen(
                [*node.enter, *command, *meet, *PROGRAM, DEFAULT, *self._run], cwd=ROOT, env=env, stdout=log, stderr=log
            )
        self.agents.append(agent)
        return agent

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            ended = [agent.returncode for agent in self.agents if agent.poll()]
            assert not ended, f"an agent ended with {ended}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def lose(self, agent: subprocess.Popen[bytes]) -> None:
        """Kills the agent and its ranks at the same time, as if their node were lost."""
        for process in (psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)):
            process.send_signal(signal.SIGKILL)
        agent.wait()
        self.agents.remove(agent)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as made:
        yield made


def records(run: RunFolder) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics_jsonl.read_text().splitlines())
    return [reproducible_part(line) for line in lines if line["kind"] != "hint"]  # some hints depend on times


def frozen(agent: subprocess.Popen[bytes]) -> bool:
    return any(each.status() == psutil.STATUS_STOPPED for each in psutil.Process(agent.pid).children(recursive=True))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backend", [exhaustive("static"), "c10d"])
def test_torchrun_on_two_nodes_loses_an_agent_and_ends_with_the_undisturbed_bits(
    nodes: tuple[Node, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # runs are bit-equal only with equal numbers of threads
    undisturbed, run = (RunFolder(tmp_path / name) for name in ("undisturbed", "disturbed"))
    own, others = (overrides({**SETTINGS, "run.root": tmp_path, "run.name": each.path.name}) for each in (undisturbed, run))
    assert launch(ROOT / DEFAULT, own) == 0

    job = Torchrun(nodes, backend, others, tmp_path / "torchrun.log")
    try:
        breaks = fault(rank=drawn().freezing_rank, step=drawn().freezing_step, phase="before_step", kind="freeze")
        first, second = (0, 1) if drawn().agent_skew >= 0 else (1, 0)
        agents = {first: job.start(first, **breaks)}
        time.sleep(abs(drawn().agent_skew))
        agents[second] = job.start(second, **breaks)
        lost = agents[1]
        job.wait_for(lambda: frozen(lost))
        job.lose(lost)
        job.start(1)  # a new agent counts its restarts from zero
        job.wait_for(lambda: all(agent.poll() == 0 for agent in job.agents))
    finally:
        for agent in list(job.agents):
            if agent.poll() is None:
                job.lose(agent)

    assert records(run) == records(undisturbed)
    first, *_, last = run.read_status().attempts
    assert first.verdict != 0
    assert (last.verdict, last.last_step) == (0, STEPS)
    assert first.attempt_id != last.attempt_id
    left = [path.name for path in run.path.iterdir() if path.name.startswith((".shared", ".nodes", "rendezvous"))]
    assert not left, "ranks that share files left them behind"
