"""A rank without torch that does everything in a training except its steps, for tests of clusters and launchers.

It opens the run, checks its place, counts steps, and ends as PRETEND says. PRETEND lists how each attempt ends, in order;
all later attempts end like the last one. With `stop+5 done` the first attempt takes 5 steps and exits with 75, and later
ones exit with 0. Ends are:

    done       all ranks exit with 0
    stop       all ranks exit with 75 at once; the end `wait` does this only after a stop signal
    fail       all ranks exit with 1, without a message
    diverge    rank 2 diverges, and its peers are killed
    kill:R     SIGKILL kills rank R, and its peers lose the connection
    exit:R     rank R exits natively with 3, and its peers lose the connection
    freeze:R   SIGSTOP freezes rank R, and its peers end by their watchdogs
    gpu        rank 1 loses its GPU
    config     all ranks exit with 78
    close      all ranks exit with 0, but a sink of rank 0 closes 10 s late
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launchers.restart import committed_step
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DivergedError, StoppedError
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.place import Found, RunPlace, check_place
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopRequest
from moe_dist.runtime.watchdog import Watchdog

PROGRAM = "-m tests.support.pretend"
CLOSE_SECONDS = 10.0
WATCHDOG_SECONDS = 4.0


def main(config_path: Path, overrides: list[str]) -> int:
    env = RankEnv.from_environment(os.environ)
    attempt = Attempt(env)
    told = os.environ["PRETEND"].split()
    how, _, gained = told[min(env.attempt, len(told) - 1)].partition("+")
    how, _, victim = how.partition(":")
    with StopRequest(env.grace_seconds, attempt.expire) as stop, attempt:
        config = load_config(config_path, overrides)
        folder = attempt.open(config)
        while folder.read_status().of(env.attempt_id) is None:  # rank 0 has not yet opened the run folder
            time.sleep(0.02)
        check_place(RunPlace.from_environment(os.environ), Found.from_environment(os.environ))
        print(f"{here(env)} {env.rank} is here", file=sys.stderr, flush=True)
        logs = [folder.log_of(rank) for rank in range(env.world_size)]
        while not all(log.exists() and here(env) in log.read_text() for log in logs):
            time.sleep(0.02)  # a node may start many seconds late, and its ranks must not look frozen or killed
        step = committed_step(folder.checkpoints) + int(gained or 0)
        attempt.follow(lambda: config.train.steps if how in ("done", "close") else step)
        if env.rank == 0 and gained:
            (folder.checkpoints / "latest").write_text(f"step_{step}")
        if victim:
            leave(how, int(victim), env, attempt, folder, step)
        end(how, env, folder, stop, step)
        if how == "close":
            attempt.finish()
            time.sleep(CLOSE_SECONDS if env.rank == 0 else 0.0)
            print("closed", file=sys.stderr, flush=True)
    return attempt.exit_code


def here(env: RankEnv) -> str:
    return f"attempt {env.attempt}: rank"


def leave(how: str, victim: int, env: RankEnv, attempt: Attempt, folder: RunFolder, step: int) -> None:
    if env.rank == victim:
        {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "exit": lambda: os._exit(3)}.get(
            how, lambda: os.kill(os.getpid(), signal.SIGSTOP)
        )()
    if how == "freeze":
        tracker = CollectiveTracker()
        cpu: Any = SimpleNamespace(type="cpu")
        ranks = {"rank": env.rank, "world_size": env.world_size, "attempt_id": env.attempt_id}
        watchdog = {"seconds": WATCHDOG_SECONDS, "logs": folder.logs, "step": lambda: step, "end": attempt.give_up}
        Watchdog(tracker, **ranks, **watchdog).start()
        with tracker.inside("combine rows", device=cpu, layer="layers.1"):
            time.sleep(600.0)
    time.sleep(0.3)
    raise RuntimeError("[pair.cc:544] Connection closed by peer [10.0.0.1]:1")  # the text of gloo's error


def end(how: str, env: RankEnv, folder: RunFolder, stop: StopRequest, step: int) -> None:
    while how == "wait" and not stop.requested:
        time.sleep(0.02)
    if how in ("stop", "wait"):
        raise StoppedError(f"stopped on request after step {step}")
    if how == "fail":
        os._exit(1)
    if how == "gpu" and env.rank == 1:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    if how == "config":
        raise ConfigError("optimizer.lr=-1: must be positive")
    if how == "gpu":
        time.sleep(1.0)  # the peers notice the closed connection
        raise ConnectionError("connection closed by peer")
    if how == "diverge" and env.rank == 2:
        raise DivergedError("loss was nan for 10 steps in a row")
    while how == "diverge":
        time.sleep(0.02)
        with contextlib.suppress(OSError):
            if folder.has_verdict(env.attempt_id):
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
