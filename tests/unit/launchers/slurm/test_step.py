"""The verdict of a step, and requeueing. srun and scontrol are stand-ins on the path."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.slurm.step import SlurmJob, conclude, requeue_job, run_step
from launchers.snapshot import CodeSnapshot
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config

JOB = SlurmJob("12", 1, None, Path("/clone"))
HOSTS = {"n1": (0,), "n2": (1, 2)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run in its second start, which has said nothing yet."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c-1")
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    folder.open(config, RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id)).release()
    return folder


def leave(run: RunFolder, *, verdict: int, reason: str) -> None:
    """Rank 2 ends the attempt: rank 0 has the lease meanwhile, as it must."""
    lease = run.open(run.read_config(), RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id))
    assert run.write_status(verdict=verdict, reason=reason, last_step=7, attempt_id=JOB.attempt_id, rank=2)
    lease.release()


def test_sruns_lines_about_failed_tasks_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    words = "echo srun: step created >&2; echo 'srun: error: n2: task 1: Exited with exit code 70' >&2; exit 143"
    code, ended = run_step(["bash", "-c", words])
    assert (code, ended) == (143, ["srun: error: n2: task 1: Exited with exit code 70"])
    assert capfd.readouterr().err == "srun: step created\n"
    assert run_step(["bash", "-c", "kill -9 $$"])[0] == 137


def test_the_verdict_comes_from_the_ranks_and_the_failed_rank_is_printed_first(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(run, verdict=70, reason="loss was nan")
    run.log_of(2).write_text(f"--- attempt old\nno\n--- attempt {JOB.attempt_id}, now, n2\nloss was nan\n")
    ended = ["srun: error: n1: task 0: Killed", "srun: error: n2: tasks 1-2: Exited with exit code 70"]
    assert conclude(run, JOB, 137, ended, stopped=False, ranks_of=HOSTS) == 70
    said = capsys.readouterr().err
    assert said.startswith(f"rank 2 failed first; {run.log_of(2)} ends with:\n\n--- attempt {JOB.attempt_id}")
    assert said.index("loss was nan") < said.index("task 0: Killed")
    assert said.endswith("verdict 70: loss was nan\n")


def test_a_killed_task_replaces_a_peers_verdict(run: RunFolder) -> None:
    leave(run, verdict=1, reason="connection closed")
    ended = ["srun: error: n1: task 0: Out Of Memory", "srun: error: n2: tasks 1-2: Exited with exit code 1"]
    assert conclude(run, JOB, 137, ended, stopped=False, ranks_of=HOSTS) == 1
    latest = run.read_status().latest
    assert latest is not None
    assert (latest.verdict, latest.reason, latest.rank) == (1, "n1: task 0: Out Of Memory", None)


def test_a_failed_node_is_the_cause_although_slurm_kills_the_others(run: RunFolder) -> None:
    leave(run, verdict=1, reason="connection closed")
    ended = ["srun: error: n1: tasks 0: Exited with exit code 1", "srun: error: Node failure on n2"]
    assert conclude(run, JOB, 137, ended, stopped=True, ranks_of=HOSTS) == 1
    latest = run.read_status().latest
    assert latest is not None
    assert latest.reason == "Node failure on n2"


def test_without_a_recorded_verdict_the_first_failed_task_sets_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.log_of(1).write_text(f"--- attempt {JOB.attempt_id}\nfine\n")
    run.log_of(2).write_text(f"--- attempt {JOB.attempt_id}\nTraceback (most recent call last):\nImportError: no\n")
    ended = ["srun: error: n2: task 2: Exited with exit code 78", "srun: error: n1: task 0: Killed"]
    assert conclude(run, JOB, 137, ended, stopped=False, ranks_of=HOSTS) == 78
    said = capsys.readouterr().err
    assert "rank 2 failed first" in said
    assert "ImportError: no" in said
    assert json.loads(run.status_json.read_text())["verdict"] == 78


def test_a_stop_before_any_record_gives_75(run: RunFolder) -> None:
    assert conclude(run, JOB, 143, ["srun: error: n1: task 0: Terminated"], stopped=True, ranks_of=HOSTS) == 75
    assert conclude(run, JOB, 0, [], stopped=False, ranks_of=HOSTS) == 0


# --- the next attempt


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """`slurm(state, code)`: a scontrol whose job has this state and whose requeue ends with this code."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked = tmp_path / "asked"

    def make(state: str, code: int) -> Path:
        requeue = f'[ "$1" = requeue ] && {{ echo no >&2; exit {code}; }}'
        (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{asked}\n{requeue}\necho JobState={state}\n')
        (tmp_path / "scontrol").chmod(0o755)
        return asked

    return make


@pytest.mark.parametrize(
    ("state", "code", "no", "words", "requeued"),
    [
        ("RUNNING", 0, None, "requeued: the next attempt resumes from the last checkpoint", True),
        ("RUNNING", 1, None, "Slurm refuses to requeue the job: scontrol requeue 12: no; continue with: sbatch", True),
        ("COMPLETING", 0, None, "Slurm is ending the job (COMPLETING)", False),
        ("RUNNING", 0, "enough", "not requeued: enough; to continue anyway: sbatch", False),
    ],
)
def test_a_job_is_requeued_if_it_runs_and_slurm_allows_it(
    slurm: Callable[[str, int], Path],
    capsys: pytest.CaptureFixture[str],
    state: str,
    code: int,
    no: str | None,
    words: str,
    requeued: bool,
) -> None:
    asked = slurm(state, code)
    requeue_job(JOB, CodeSnapshot(Path("/runs/it's/slurm/x")), no)
    said = capsys.readouterr().err
    assert words in said
    assert ("requeue 12" in asked.read_text() if asked.exists() else False) == requeued
    if "go on" in words and "next" not in words:
        assert """sbatch '/runs/it'"'"'s/slurm/x/train.sbatch'""" in said


def test_one_task_of_an_array_goes_on_by_itself(
    slurm: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm("RUNNING", 1)
    requeue_job(SlurmJob("12", 1, 3, Path("/clone")), CodeSnapshot(Path("/s")), None)
    assert "continue with: sbatch --array=3 /s/train.sbatch" in capsys.readouterr().err
