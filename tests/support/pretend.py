"""A rank that does all of a training but its steps, without torch, for tests of clusters and launchers.

It opens the run, checks its place, gains steps, and ends as PRETEND says. PRETEND has the end of each attempt, and the last
one repeats: `stop+5 done` means 5 steps and exit code 75, then 0. Ends are:

    done       exit code 0
    stop       75, at once
    wait       75, after a stop signal
    fail       1, without a message
    diverge    rank 2 diverges; peers are killed
    kill       rank 1 is killed by SIGKILL; its peers get a connection error
    freeze     rank 1 is stopped by SIGSTOP; the collective of its peers times out
    gpu        rank 1 has lost its GPU
    config     78, on all ranks
    close      0, but a sink of rank 0 closes 10 s late
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from launchers.restart import committed_step
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DivergedError, StoppedError
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.place import Found, RunPlace, check_place
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopRequest

PROGRAM = "-m tests.support.pretend"
CLOSE_SECONDS = 10.0


def main(config_path: Path, overrides: list[str]) -> int:
    env = RankEnv.from_environment(os.environ)
    attempt = Attempt(env)
    told = os.environ["PRETEND"].split()
    how, _, gained = told[min(env.attempt, len(told) - 1)].partition("+")
    with StopRequest(env.grace_seconds, attempt.expire) as stop, attempt:
        config = load_config(config_path, overrides)
        folder = attempt.open(config)
        while folder.read_status().of(env.attempt_id) is None:  # rank 0 has not opened the run folder yet
            time.sleep(0.02)
        check_place(RunPlace.from_environment(os.environ), Found.from_environment(os.environ))
        print(f"attempt {env.attempt}: rank {env.rank} is here", file=sys.stderr, flush=True)
        time.sleep(1.0)  # waits for the slowest rank
        step = committed_step(folder.checkpoints) + int(gained or 0)
        attempt.follow(lambda: config.train.steps if how in ("done", "close") else step)
        if env.rank == 0 and gained:
            (folder.checkpoints / "latest").write_text(f"step_{step}")
        end(how, env, folder, stop, step)
        if how == "close":
            attempt.finish()
            time.sleep(CLOSE_SECONDS if env.rank == 0 else 0.0)
            print("closed", file=sys.stderr, flush=True)
    return attempt.exit_code


def end(how: str, env: RankEnv, folder: RunFolder, stop: StopRequest, step: int) -> None:
    while how == "wait" and not stop.requested:
        time.sleep(0.02)
    if how in ("stop", "wait"):
        raise StoppedError(f"stopped on request after step {step}")
    if how == "fail":
        os._exit(1)
    if how == "kill" and env.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "freeze" and env.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "freeze":
        time.sleep(1.0)
        raise TimeoutError("a collective took too long")
    if how == "gpu" and env.rank == 1:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    if how == "config":
        raise ConfigError("optimizer.lr=-1: must be positive")
    if how in ("kill", "gpu"):
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
