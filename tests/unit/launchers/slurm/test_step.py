"""Tests how the tasks of a step end, and how a job is requeued. srun and scontrol are stand-ins on PATH."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.slurm import step
from launchers.slurm.step import SlurmJob, name_unconcluded, outcome_of, requeue_job, run_step
from launchers.snapshot import CodeSnapshot
from launchers.verdict import conclude
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.stand_ins import stand_in
from tests.support.tiny import tiny_config

JOB = SlurmJob("12", 1, None, Path("/clone"))
PLACES = {"n1": {0: 0}, "n2": {1: 1, 2: 2}}  # host -> task -> rank
CLOSED = "ConnectionError: connection closed by peer"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose second attempt has begun and has recorded nothing yet."""
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c-1")
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    folder.open(config, RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id)).release()
    return folder


def leave(run: RunFolder, *, verdict: int, reason: str) -> None:
    """Rank 2 records the end of the attempt while rank 0 holds the lease."""
    lease = run.open(run.read_config(), RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id))
    assert run.write_status(verdict=verdict, reason=reason, last_step=7, attempt_id=JOB.attempt_id, rank=2)
    lease.release()


def recorded(run: RunFolder) -> tuple[int | None, str, int | None]:
    """Returns verdict, reason and rank of the latest attempt."""
    latest = run.read_status().attempts[-1]
    return latest.verdict, latest.reason, latest.rank


def test_sruns_lines_about_failed_tasks_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    words = "echo srun: step created >&2; echo 'srun: error: n2: task 1: Exited with exit code 70' >&2; exit 143"
    code, ended = run_step(["bash", "-c", words])
    assert (code, ended) == (143, ["srun: error: n2: task 1: Exited with exit code 70"])
    assert capfd.readouterr().err == "srun: step created\n"
    assert run_step(["bash", "-c", "kill -9 $$"])[0] == 137


# --- srun's lines say how the ranks ended; tests/unit/launchers/test_verdict.py tests the verdicts


@pytest.mark.parametrize(
    ("lines", "codes", "failed"),
    [
        # The number of a task is not its rank, because the ranks of the two nodes alternate.
        (["n2: task 3: Segmentation fault (core dumped)"], (0, 0, 0, -11), (3,)),
        (["n1: task 1: Killed"], (0, 0, -9, 0), (2,)),
        (["n1: tasks 0-1: Exited with exit code 3", "n2: task 2: Bus error"], (3, -7, 3, 0), (0, 2, 1)),
        (["n2: task 3,2: Aborted"], (0, -6, 0, -6), (3, 1)),
        (["n2: task 9: Killed"], (0, 0, 0, 0), ()),  # task 9 is not in the plan
        # After its announcement srun kills the remaining tasks. Their ranks did not fail.
        (
            ["n1: task 0: Exited with exit code 3", "srun: First task exited 60s ago", "n2: task 2: Killed"],
            (3, -9, 0, 0),
            (0,),
        ),
        (
            ["n1: task 0: Exited with exit code 3", "srun: forcing job termination", "n2: task 2: Terminated"],
            (3, -15, 0, 0),
            (0,),
        ),
        (["n1: task 0: Exited with exit code 75", "n2: task 2: Exited with exit code 1"], (75, 1, 0, 0), (1,)),
    ],
)
def test_sruns_lines_tell_which_ranks_failed(lines: list[str], codes: tuple[int, ...], failed: tuple[int, ...]) -> None:
    places = {"n1": {0: 0, 1: 2}, "n2": {2: 1, 3: 3}}
    shown = [each if each.startswith("srun: ") else f"srun: error: {each}" for each in lines]
    outcome = outcome_of(137, shown, places, stopped=False)
    assert (outcome.codes, outcome.failed, outcome.hosts) == (codes, failed, ("n1", "n2", "n1", "n2"))
    assert (outcome.stop is not None) == (codes[0] == 75)


def test_a_failed_task_ends_the_others_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun alone would let the other tasks run for LINGER_SECONDS."""
    monkeypatch.setattr(step, "PEER_SECONDS", 0.2)
    waits = "trap 'echo srun: forcing job termination >&2; exit 143' TERM; sleep 600 2>/dev/null & wait"
    began = time.monotonic()
    code, lines = run_step(["bash", "-c", f"echo 'srun: error: n2: task 1: Exited with exit code 78' >&2; {waits}"])
    assert (code, lines) == (143, ["srun: error: n2: task 1: Exited with exit code 78", "srun: forcing job termination"])
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("code", [0, 75])
def test_a_task_that_is_done_or_stopped_ends_no_other(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(step, "PEER_SECONDS", 0.0)
    words = f"echo 'srun: error: n2: task 1: Exited with exit code {code}' >&2; sleep 0.5; exit 5"
    assert run_step(["bash", "-c", words])[0] == 5


def test_a_node_failure_is_recorded_at_once_although_srun_and_rank_0_hang(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job must not wait until srun ends. Slurm kills the batch script earlier, when KillWait has passed since the
    node failure."""
    monkeypatch.setattr(step, "NODE_SECONDS", 0.2)
    lease = run.open(run.read_config(), RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id))
    began = time.monotonic()
    code, ended = run_step(["bash", "-c", "echo 'srun: error: Node failure on n2' >&2; exec sleep 600"])
    outcome = outcome_of(code, ended, PLACES, stopped=True)
    assert conclude(run, JOB.attempt_id, outcome).code == 1
    assert time.monotonic() - began < 300
    lease.release()
    assert recorded(run) == (1, "ranks 1-2: Node failure on n2", 1)


@pytest.mark.parametrize(
    ("states", "reason", "rank"),
    [
        (["DOWN+NOT_RESPONDING", "IDLE"], "ranks 0, 2: Node failure on n1", 0),
        (["IDLE", "DOWN*"], "rank 1: Node failure on n2", 1),
        (["DOWN", "DOWN"], "ranks 0-2: Node failure on n1, n2", 0),
        (
            ["IDLE+DRAIN", "IDLE+CLOUD+POWERED_DOWN"],
            "Slurm killed the batch script on n1 before it could name the cause: its node",
            None,
        ),
        (None, "Slurm killed the batch script on n1 before it could name the cause", None),  # slurmctld does not answer
    ],
)
def test_a_batch_script_that_slurm_killed_is_named_by_the_next_attempt(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: list[str] | None,
    reason: str,
    rank: int | None,
) -> None:
    shown = [f"NodeName=n{1 + index} Arch=x State={state} Weight=1" for index, state in enumerate(states or [])]
    stand_in(tmp_path, monkeypatch, scontrol="; ".join(f"echo {line!r}" for line in shown) or "exit 1")
    leave(run, verdict=1, reason=CLOSED)
    assert name_unconcluded(run, JOB.attempt_id, {"n1": [0, 2], "n2": [1]}, asked=False, restarts=1) == 1
    found = recorded(run)
    assert (found[0], found[2]) == (1, rank)
    assert found[1].startswith(reason)
    assert (CLOSED in found[1]) == (rank is None), "a peer's error is shown only where no node is known"


def test_what_the_ranks_recorded_before_the_batch_script_was_killed_stays(run: RunFolder) -> None:
    leave(run, verdict=75, reason="stopped on request after step 7")
    assert name_unconcluded(run, JOB.attempt_id, {}, asked=False, restarts=1) == 75
    assert recorded(run)[1] == "stopped on request after step 7"


def test_a_batch_script_that_was_killed_after_a_stop_signal_was_asked_to_stop(run: RunFolder) -> None:
    """A job is preempted while its ranks import torch for longer than KillWait. The verdict is 75, even if the ranks have
    not opened the run yet."""
    for attempt_id in (JOB.attempt_id, "slurm-c1-12-2"):
        assert name_unconcluded(run, attempt_id, {}, asked=True, restarts=2) == 75
        record = run.read_status().of(attempt_id)
        assert (record.verdict, record.rank) == (75, None)
        assert "KillWait is too short" in record.reason


# --- the next attempt


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """`slurm(state, code)` makes stand-ins for sbatch and scontrol. This scontrol shows a job in `state`, and its
    requeue exits with `code`."""

    def make(state: str, code: int) -> Path:
        stand_in(
            tmp_path,
            monkeypatch,
            scontrol=f'echo "$*" >>asked; [ "$1" = requeue ] && {{ echo no >&2; exit {code}; }}; echo JobState={state}',
            sbatch='echo "$* ${SLURM_RESTART_COUNT-}" >>asked; echo 99',
        )
        return tmp_path / "asked"

    return make


@pytest.mark.parametrize(
    ("state", "code", "no", "words", "requeued"),
    [
        ("RUNNING", 0, None, "requeued", True),
        ("RUNNING", 1, None, "Slurm refuses to requeue the job: scontrol requeue 12: no; continue with: sbatch", True),
        ("COMPLETING Restarts=1 PreemptTime=None", 0, None, "Slurm is ending the job (COMPLETING) for good;", False),
        (
            "CANCELLED Restarts=1 StartTime=2026-11-27T10:00:00 PreemptTime=2026-11-27T09:00:00",  # of the previous attempt
            *(0, None, "Slurm is ending the job (CANCELLED) for good;", False),
        ),
        ("COMPLETING Restarts=2 PreemptTime=None", 0, None, "Slurm has requeued the job (COMPLETING)", False),
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
    requeue_job(JOB, CodeSnapshot(Path("/runs/it's/slurm/x")), Path("none"), no)
    said = capsys.readouterr().err
    assert words in said
    assert ("requeue 12" in asked.read_text() if asked.exists() else False) == requeued
    continued = words == "requeued" or "has requeued" in words
    assert ("""sbatch '/runs/it'"'"'s/slurm/x/train.sbatch'""" in said) != continued


def test_a_job_that_a_preemption_cancels_is_submitted_again_with_its_count(
    slurm: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = slurm("COMPLETING Restarts=1 StartTime=2026-11-27T09:00:00 PreemptTime=2026-11-27T10:00:00", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # must not reach the new job
    attempts = tmp_path / "job_12.json"
    attempts.write_text("[[75, 0, 7]]")
    (tmp_path / "job_12_faults").write_text("n3")
    (tmp_path / "job_120_faults").write_text("n4")  # nodes at fault of another job
    requeue_job(JOB, CodeSnapshot(Path("/s")), attempts, None)
    assert "does not requeue it (PreemptMode=CANCEL); submitted again as job 99" in capsys.readouterr().err
    assert asked.read_text().splitlines()[-1] == "--parsable --dependency=afterany:12 /s/train.sbatch "
    assert (tmp_path / "job_99.json").read_text() == "[[75, 0, 7]]"
    assert (tmp_path / "job_99_faults").read_text() == "n3"


@pytest.mark.parametrize("number", ["14", "12"])
def test_one_task_of_an_array_goes_on_by_itself(
    slurm: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str], number: str
) -> None:
    """Slurm gives an array's last task the id of the whole array. Requeueing that id would requeue all tasks."""
    asked = slurm("RUNNING", 1)
    env = {"SLURM_JOB_ID": number, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": "/clone"}
    requeue_job(SlurmJob.from_environment(env), CodeSnapshot(Path("/s")), Path("none"), None)
    assert asked.read_text().splitlines() == ["--oneliner show job 12_3", "requeue 12_3"]
    assert "continue with: sbatch --array=3 /s/train.sbatch" in capsys.readouterr().err
