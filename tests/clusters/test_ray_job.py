"""Tests jobs on a Ray that `ray start` started and that requires a token: the README's command, moe_dist's Ray launcher,
stops that wait for a save, and a doctor that finds no fault."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_dist.errors import StoppedError
from moe_dist.runtime.run_folder import RunFolder
from tests.support import ray_cluster
from tests.support.notebooks import TUTORIALS, run_tutorial
from tests.support.ray_cluster import CONFIG, ROOT, StartedRay, overrides, steps
from tests.support.ray_rank import SAVE_SECONDS

SLOW_SAVE = 30


@pytest.fixture(scope="module")
def ray_head() -> Iterator[StartedRay]:
    # Each process reads the token once, and only processes that this cluster starts may have the token.
    with ray_cluster.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)) as folder:
        try:
            standing = StartedRay(folder)
            os.environ["RAY_API_SERVER_ADDRESS"] = standing.dashboard
            yield standing
        finally:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
            ray_cluster.end_all(folder)


def readme_command() -> list[str]:
    """Returns the words of the README's `ray job submit`, as a shell in the clone splits them."""
    (text,) = re.findall(r"^\$ (ray job submit (?:[^\n]*\\\n)*[^\n]*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return words.stdout.split("\0")[:-1]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def begun(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def saved_step(run: RunFolder) -> int:
    return int((run.checkpoints / "latest").read_text().strip().removeprefix("step_"))


def test_the_command_of_the_readme_trains(ray_head: StartedRay, tmp_path: Path) -> None:
    done = begun(*readme_command(), *overrides(tmp_path, "readme", 3))
    printed, _ = done.communicate()
    assert done.returncode == 0, printed
    assert [line["step"] for line in steps(RunFolder(tmp_path / "readme"))] == [1, 2, 3]
    assert "WARNING: stop grace" not in printed
    assert "moe_dist ends with verdict 0" in printed
    assert "without a token" not in printed


def test_ray_job_stop_waits_for_a_save_of_half_a_minute(ray_head: StartedRay, tmp_path: Path) -> None:
    command, run = readme_command(), RunFolder(tmp_path / "slow")
    command[command.index("launchers.ray")] = "tests.support.ray_launch"
    at = command.index("--runtime-env-json") + 1
    environment = json.loads(command[at])
    environment["env_vars"][SAVE_SECONDS] = str(SLOW_SAVE)
    command[at:at] = [json.dumps(environment), "--submission-id=slow"]
    del command[at + 2]
    job = begun(*command, *overrides(tmp_path, "slow", 1000))
    wait_until(lambda: len(steps(run)) >= 2, job)
    asked = time.monotonic()
    stopped = subprocess.run(["ray", "job", "stop", "slow"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert time.monotonic() - asked > SLOW_SAVE
    printed, _ = job.communicate()
    latest = run.read_status().attempts[-1]
    assert (latest.verdict, latest.last_step) == (StoppedError.exit_code, saved_step(run)), printed


def test_our_own_submission_returns_the_verdict_and_a_stop_waits_for_the_save(
    ray_head: StartedRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of --env reaches the ranks, but nothing that Ray or the run stores contains it."""
    run, planted = RunFolder(tmp_path / "ours"), secrets.token_hex(16)
    launcher = (sys.executable, "-m", "launchers.ray")
    address = f"--submit={ray_head.dashboard}"
    monkeypatch.setenv("WANDB_API_KEY", planted)
    job = begun(*launcher, CONFIG, *overrides(tmp_path, "ours", 1000), address, "--env=WANDB_API_KEY")
    wait_until(lambda: len(steps(run)) >= 2, job)
    latest = run.read_status().attempts[-1]
    assert ray_cluster.variables_of(latest.pid)["WANDB_API_KEY"] == planted
    listed = subprocess.run(["ray", "job", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--env-file" in listed.stdout
    assert planted not in listed.stdout
    kept = [path for folder in (Path(os.environ["RAY_TMPDIR"]), run.path) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in kept if planted.encode() in path.read_bytes()]
    job_id = next(line.split()[1].rstrip(":") for line in job.stdout if line.startswith("job "))
    stop = begun(*launcher, "--stop", job_id, address)
    said, _ = stop.communicate()
    saved = saved_step(run)  # the save has ended when the command returns
    assert stop.returncode == StoppedError.exit_code, said
    printed, _ = job.communicate()
    assert job.returncode == StoppedError.exit_code, printed
    assert f"stopped on request after step {saved}" in (run.status_json.read_text())
    assert "step 1/1000" in printed  # the log was followed


@pytest.mark.exhaustive
def test_the_tutorial_runs(ray_head: StartedRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(ray_cluster.DATA)
    run_tutorial(TUTORIALS / "ray.ipynb", tmp_path, monkeypatch)
    assert [each.verdict for each in RunFolder(tmp_path / "runs" / "tutorial").read_status().attempts] == [75, 0]
