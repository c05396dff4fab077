"""Under launchers that only set variables (mpirun, srun, Kubernetes pods), all ranks end after a fault. A second start in
the same way resumes the run."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers.restart import committed_step
from moe_dist.errors import ConfigError, StoppedError
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import child_of
from tests.support import plain_rank, slow_close
from tests.support.cover import exhaustive, full
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config
from tests.support.worlds import forked

ROOT = Path(__file__).parents[2]
RANKS, STEPS = 2, 6
WATCHDOG_SECONDS = 10.0
SETTINGS = {
    "train.steps": STEPS, "checkpoint.every": 2, "checkpoint.asynchronous": False, "parallel.timeout_seconds": 600.0,
    "evaluation.every": 1000, "evaluation.balance_efficiency": False, "evaluation.ablate_experts": False,
}  # fmt: skip


def mpirun(rank: int, start: int) -> dict[str, str]:
    size, own = str(RANKS), str(rank)
    names = {"RANK": own, "SIZE": size, "LOCAL_RANK": own, "LOCAL_SIZE": size}
    return {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}


def srun(rank: int, start: int) -> dict[str, str]:
    task = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(RANKS), "SLURM_LOCALID": str(rank), "SLURM_GTIDS": "0,1"}
    return {**task, "SLURM_JOB_ID": "17", "SLURM_STEP_ID": str(start)}  # each start is another job step


def pod(rank: int, start: int) -> dict[str, str]:
    """Returns the variables of a pod whose container is restarted. They are equal in every start."""
    return {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}


def free_port() -> int:
    """Returns a port that stays free between two starts: the kernel gives outgoing connections only higher ports."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def is_frozen(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:  # the process has ended
        return False


class Job:
    """A run of the tiny model by one launcher.

    Args:
        variables: Function from the rank and the number of the start to the variables that the launcher sets for the rank.
    """

    def __init__(self, folder: Path, data: Path, variables: Callable[[int, int], dict[str, str]]) -> None:
        config = tiny_config(data, folder / "runs", SETTINGS)
        self.path, self.run = write_config(config, folder / "x.yaml"), RunFolder.of(config)
        self.log = folder / "log"
        self._variables, self._starts = variables, 0
        self._meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks: list[BaseProcess] = []

    def start(self, *overrides: str, **broken: str) -> None:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MOE_DIST_"))}
        keep |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **broken}
        keep |= {} if self._variables is srun else self._meeting
        self.close()
        self.ranks = [
            forked(
                plain_rank.run, {**keep, **self._variables(rank, self._starts)}, [str(self.path), *overrides], str(self.log)
            )
            for rank in range(RANKS)
        ]
        self._starts += 1

    def codes(self) -> list[int | None]:
        """Waits until all ranks have ended, except frozen ones. Returns all exit codes, with None for a frozen rank."""
        for rank in self.ranks:
            while rank.exitcode is None and not is_frozen(rank.pid):
                rank.join(0.05)
        return [rank.exitcode for rank in self.ranks]

    def records(self) -> list[Mapping[str, Any]]:
        return [reproducible_part(line) for line in read_lines(self.run.metrics_jsonl) if line["kind"] != "hint"]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> list[Mapping[str, Any]]:
    with Job(tmp_path_factory.mktemp("undisturbed"), tiny_data, pod) as job:
        job.start()
        assert job.codes() == [0, 0], job.log.read_text()
        return job.records()


# Each entry is a fault at step 3, after the checkpoint of step 2: its rank, kind, exit codes, and a part of the recorded
# reason. After a kill no launcher reports the signal, and a peer reports its lost connection.
KILLED = (1, "kill", [1, -signal.SIGKILL], "RuntimeError: ")
FIRST_KILLED = (0, "kill", [-signal.SIGKILL, 1], "RuntimeError: ")
FROZEN = (1, "freeze", [1, None], "rank 1 did not enter it and wrote no report: suspended, dead")
RAISED = (1, "raise", [1, 1], "RuntimeError: a fault that a test injected")  # like an error of CUDA


@pytest.mark.parametrize(
    ("variables", "breaks"),
    [
        exhaustive(mpirun, (KILLED, RAISED)),
        exhaustive(srun, (FROZEN, FIRST_KILLED)),
        full(pod, (KILLED, FROZEN, RAISED, FIRST_KILLED)),
    ],
)
def test_each_fault_ends_all_ranks_and_the_same_start_goes_on(
    tmp_path: Path,
    tiny_data: Path,
    undisturbed: list[Mapping[str, Any]],
    variables: Callable[[int, int], dict[str, str]],
    breaks: Sequence[tuple[int, str, list[int | None], str]],
) -> None:
    with Job(tmp_path, tiny_data, variables) as job:
        for rank, kind, codes, cause in breaks:
            patience = [f"parallel.watchdog_seconds={WATCHDOG_SECONDS}"] if kind == "freeze" else []
            job.start(*patience, **fault(rank=rank, step=3, phase="before_step", kind=kind))
            assert job.codes() == codes, job.log.read_text()
            latest = job.run.read_status().attempts[-1]
            assert latest.verdict == 1
            assert cause in latest.reason
        job.start("train.global_batch=7")
        assert job.codes() == [ConfigError.exit_code] * 2, "and so at every start"
        job.start(**fault(rank=1, step=3, phase="after_step", kind="stop"))
        assert job.codes() == [StoppedError.exit_code] * 2, "a signal to one rank stops all"
        job.start(**({slow_close.ENDS: str(tmp_path)} if variables is pod else {}))
        assert job.codes() == [0, 0], job.log.read_text()
        if variables is pod:
            assert slow_close.seconds_apart(tmp_path) < slow_close.BUDGET_SECONDS - 5
        assert [each.verdict for each in job.run.read_status().attempts] == [1] * len(breaks) + [StoppedError.exit_code, 0]
        assert job.records() == undisturbed


class Torchrun:
    """`torchrun` on one node with two ranks, which restarts them once."""

    def __init__(self, folder: Path, data: Path) -> None:
        config = tiny_config(data, folder / "runs", SETTINGS)
        self.path, self.run = write_config(config, folder / "x.yaml"), RunFolder.of(config)

    def start(self, *overrides: str, **broken: str) -> subprocess.Popen[str]:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **broken}
        return subprocess.Popen(
            [*agent, "--max-restarts=1", *PROGRAM, str(self.path), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=child_of(os.getpid(), ignore_stop=False),
        )

    def ends(self) -> list[int | None]:
        return [each.verdict for each in self.run.read_status().attempts]


@pytest.mark.exhaustive  # six processes that import torch, and 30 s until torchrun kills a frozen rank
def test_torchrun_restarts_its_ranks_whatever_their_code_and_passes_a_stop_on(tmp_path: Path, tiny_data: Path) -> None:
    job = Torchrun(tmp_path, tiny_data)
    wrong = job.start("train.global_batch=7")
    printed, _ = wrong.communicate()
    assert wrong.returncode == 1
    assert printed.count("train.global_batch=7: ") >= 2, "in both attempts"
    assert re.search(r"exitcode  : 78 ", printed), printed
    assert not job.run.status_json.exists()

    breaks = fault(rank=1, step=3, phase="before_step", kind=("freeze", "kill"))
    broken = job.start(f"parallel.watchdog_seconds={WATCHDOG_SECONDS}", **breaks)
    printed, _ = broken.communicate()
    assert (broken.returncode, job.ends()) == (1, [1, 1]), printed
    assert "Signal 9 (SIGKILL) received" in printed
    assert FROZEN[3] in job.run.read_status().attempts[0].reason

    stopped = job.start("train.steps=100000", "checkpoint.every=100000")
    while not any(line["step"] >= 5 for line in read_lines(job.run.metrics_jsonl)):
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.05)
    stopped.terminate()
    printed, _ = stopped.communicate()
    latest = job.run.read_status().attempts[-1]
    assert (latest.verdict, committed_step(job.run.checkpoints)) == (StoppedError.exit_code, latest.last_step), printed
    assert latest.last_step >= 5
    assert stopped.returncode == 1, "torchrun has codes of its own"


def listening(pids: Sequence[int]) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(pid).net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    found.add((each.laddr.ip, each.laddr.port))
    return found


@pytest.mark.full  # a run of many steps
def test_ports_are_on_the_interface_of_the_job_survive_garbage_and_close(tmp_path: Path, tiny_data: Path) -> None:
    with Job(tmp_path, tiny_data, srun) as job:
        job.start("train.steps=100000", "checkpoint.every=2", MOE_DIST_RENDEZVOUS_HOST="127.0.0.1")
        pids = [rank.pid for rank in job.ranks if rank.pid is not None]
        while committed_step(job.run.checkpoints) < 2:
            assert all(rank.is_alive() for rank in job.ranks), job.log.read_text()
            time.sleep(0.05)
        ports = listening(pids)
        assert len(ports) >= RANKS, "each rank listens for gloo"
        assert {address.removeprefix("::ffff:") for address, _ in ports} == {"127.0.0.1"}
        for address, port in ports:
            for garbage in (b"GET / HTTP/1.0\r\n\r\n", random.randbytes(4096)):
                with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=10.0) as connection:
                    connection.sendall(garbage)
        before = committed_step(job.run.checkpoints)
        while committed_step(job.run.checkpoints) < before + 6:  # the run continues
            assert all(rank.is_alive() for rank in job.ranks), job.log.read_text()
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGTERM)
        assert job.codes() == [75, 75], job.log.read_text()
        for address, port in ports:
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=10.0).close()
