"""The verdict of a step, and requeueing. srun and scontrol are stand-ins on the path."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.slurm import step
from launchers.slurm.step import SlurmJob, conclude, host_at_fault, name_unconcluded, requeue_job, run_step
from launchers.snapshot import CodeSnapshot
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config

JOB = SlurmJob("12", 1, None, Path("/clone"))
PLACES = {"n1": {0: 0}, "n2": {1: 1, 2: 2}}  # host -> task -> rank
CLOSED = "ConnectionError: connection closed by peer"


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


def recorded(run: RunFolder) -> tuple[int | None, str, int | None]:
    """Verdict, reason and rank of the latest attempt."""
    latest = run.read_status().latest
    assert latest is not None
    return latest.verdict, latest.reason, latest.rank


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
    assert conclude(run, JOB, 137, ended, stopped=False, places=PLACES) == 70
    said = capsys.readouterr().err
    assert said.startswith(f"rank 2 failed first on n2; {run.log_of(2)} ends with:\n\n--- attempt {JOB.attempt_id}")
    assert said.index("loss was nan") < said.index("task 0: Killed")
    assert said.endswith("verdict 70: loss was nan\n")


def test_a_killed_task_replaces_a_peers_verdict(run: RunFolder) -> None:
    leave(run, verdict=1, reason="connection closed")
    ended = ["srun: error: n1: task 0: Out Of Memory", "srun: error: n2: tasks 1-2: Exited with exit code 1"]
    assert conclude(run, JOB, 137, ended, stopped=False, places=PLACES) == 1
    assert recorded(run) == (1, "rank 0 on n1: killed, out of memory", 0)


def test_a_failed_node_is_the_cause_although_slurm_kills_the_others(run: RunFolder) -> None:
    leave(run, verdict=1, reason="connection closed")
    ended = ["srun: error: n1: tasks 0: Exited with exit code 1", "srun: error: Node failure on n2"]
    assert conclude(run, JOB, 137, ended, stopped=True, places=PLACES) == 1
    assert recorded(run)[1:] == ("ranks 1-2: Node failure on n2", 1)


def test_without_a_recorded_verdict_the_first_failed_task_sets_it(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.log_of(1).write_text(f"--- attempt {JOB.attempt_id}\nfine\n")
    run.log_of(2).write_text(f"--- attempt {JOB.attempt_id}\nTraceback (most recent call last):\nImportError: no\n")
    ended = ["srun: error: n2: task 2: Exited with exit code 78", "srun: error: n1: task 0: Killed"]
    assert conclude(run, JOB, 137, ended, stopped=False, places=PLACES) == 78
    said = capsys.readouterr().err
    assert "rank 2 failed first" in said
    assert "ImportError: no" in said
    assert json.loads(run.status_json.read_text())["verdict"] == 78


def test_a_rank_that_took_the_end_of_all_tasks_for_a_stop_is_not_the_cause(run: RunFolder) -> None:
    leave(run, verdict=75, reason="stopped on request while rank 0 waited for ranks 1, 2")
    ended = ["srun: error: n2: task 1: Exited with exit code 65", "srun: error: n1: task 0: Exited with exit code 75"]
    assert conclude(run, JOB, 65, ended, stopped=False, places=PLACES) == 65
    assert recorded(run) == (65, "rank 1 on n2: Exited with exit code 65", 1)


@pytest.mark.parametrize(
    ("ended", "stopped", "reason"),
    [
        (["n2: task 1: Killed", "n1: task 0: Exited with exit code 75"], False, "rank 1 on n2: killed by SIGKILL"),
        # Slurm asks all processes of a job to stop after it has lost a node.
        (["Node failure on n2", "n1: task 0: Exited with exit code 75"], True, "ranks 1-2: Node failure on n2"),
    ],
)
def test_a_killed_rank_or_a_lost_node_is_the_cause_although_rank_0_stopped_waiting_for_it(
    run: RunFolder, ended: list[str], stopped: bool, reason: str
) -> None:
    leave(run, verdict=75, reason="stopped on request while rank 0 waited for ranks 1, 2")
    lines = [f"srun: error: {each}" for each in ended]
    assert conclude(run, JOB, 137, lines, stopped=stopped, places=PLACES) == 1
    assert recorded(run) == (1, reason, 1)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_that_dies_after_all_have_saved_leaves_the_stop(run: RunFolder, stopped: bool) -> None:
    leave(run, verdict=75, reason="stopped on request after step 7")
    ended = ["srun: error: n1: task 0: Exited with exit code 75", "srun: error: n2: task 1: Killed"]
    assert conclude(run, JOB, 137, ended, stopped=stopped, places=PLACES) == 75
    assert recorded(run)[1] == "stopped on request after step 7"


def test_a_stop_before_any_record_gives_75(run: RunFolder) -> None:
    assert conclude(run, JOB, 143, ["srun: error: n1: task 0: Terminated"], stopped=True, places=PLACES) == 75
    assert conclude(run, JOB, 0, [], stopped=False, places=PLACES) == 0


def test_the_killed_rank_is_named_although_its_neighbour_on_the_node_has_a_traceback(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(run, verdict=1, reason=CLOSED)
    run.log_of(1).write_text(f"--- attempt {JOB.attempt_id}\nstep 7\n")
    run.log_of(2).write_text(f"--- attempt {JOB.attempt_id}\nTraceback (most recent call last):\n{CLOSED}\n")
    ended = ["srun: error: n2: task 1: Killed", "srun: error: n2: task 2: Exited with exit code 1"]
    assert conclude(run, JOB, 137, ended, stopped=False, places=PLACES) == 1
    assert recorded(run)[1:] == ("rank 1 on n2: killed by SIGKILL", 1)
    said = capsys.readouterr().err
    assert "rank 1 failed first" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("ended", "reason", "rank"),
    [
        # A task is no rank: here the ranks of the two nodes alternate.
        (["n2: task 3: Segmentation fault (core dumped)"], "rank 3 on n2: killed by SIGSEGV", 3),
        (["n1: task 1: Killed"], "rank 2 on n1: killed by SIGKILL", 2),
        (["n1: tasks 0-1: Exited with exit code 1", "n2: task 2: Bus error"], "rank 1 on n2: killed by SIGBUS", 1),
        (["n1: task 0: Exited with exit code 1", "Node failure on n2"], "ranks 1, 3: Node failure on n2", 1),
        (["n2: task 9: Killed"], "n2: task 9: Killed", None),  # tasks in another order than planned
        # Consequences: after srun has begun to kill, and a task that its peer's failure aborts.
        (["n1: task 0: Exited with exit code 1", "srun: First task exited 60s ago", "n2: task 2: Killed"], CLOSED, 2),
        (["n1: task 0: Aborted (core dumped)", "n2: task 2: Exited with exit code 1"], CLOSED, 2),
    ],
)
def test_the_first_death_is_the_cause_whatever_a_peer_has_recorded(
    run: RunFolder, ended: list[str], reason: str, rank: int | None
) -> None:
    leave(run, verdict=1, reason=CLOSED)
    lines = [each if each.startswith("srun: ") else f"srun: error: {each}" for each in ended]
    places = {"n1": {0: 0, 1: 2}, "n2": {2: 1, 3: 3}}
    assert conclude(run, JOB, 137, lines, stopped=False, places=places) == 1
    assert recorded(run)[1:] == (reason, rank)


def test_a_node_failure_is_recorded_at_once_although_srun_and_rank_0_hang(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm kills the batch script KillWait after the failure, and srun waits for that long and more."""
    monkeypatch.setattr(step, "NODE_SECONDS", 0.2)
    lease = run.open(run.read_config(), RankEnv(0, 3, 0, 1, "published", 1, JOB.attempt_id))
    began = time.monotonic()
    code, ended = run_step(["bash", "-c", "echo 'srun: error: Node failure on n2' >&2; exec sleep 600"])
    assert conclude(run, JOB, code, ended, stopped=True, places=PLACES) == 1
    assert time.monotonic() - began < 300
    lease.release()
    assert recorded(run) == (1, "ranks 1-2: Node failure on n2", 1)


def test_an_exit_code_outside_the_table_becomes_1(run: RunFolder) -> None:
    assert conclude(run, JOB, 143, ["srun: error: n1: task 0: Exited with exit code 9"], stopped=False, places=PLACES) == 1
    assert recorded(run)[:2] == (1, "rank 0 on n1: Exited with exit code 9")


@pytest.mark.parametrize("code", [2, 7, 127, 130, 137, 143])
def test_without_any_record_an_exit_code_outside_the_table_is_1_too(tmp_path: Path, code: int) -> None:
    """As where a program is missing, where srun itself fails, or where a signal ends it."""
    run = RunFolder(tmp_path / "none")
    assert conclude(run, JOB, code, [], stopped=False, places=PLACES) == 1
    for own, verdict in ((code, 1), (65, 65)):
        ended = [f"srun: error: n1: task 0: Exited with exit code {own}"]
        assert conclude(run, JOB, code, ended, stopped=False, places=PLACES) == verdict


@pytest.mark.parametrize(
    ("ended", "host"),
    [
        (["n1: task 0: Exited with exit code 1", "Node failure on n2"], "n2"),
        (["n1: task 0: Killed", "n2: tasks 1-2: Exited with exit code 1"], "n1"),
        (["n1: task 0: Exited with exit code 1", "n2: tasks 1-2: Exited with exit code 1"], "n2"),  # rank 2 told the cause
        ([], "n2"),
    ],
)
def test_the_node_at_fault_is_that_of_the_first_death_or_of_the_rank_that_told_the_cause(
    run: RunFolder, ended: list[str], host: str
) -> None:
    leave(run, verdict=1, reason="CUDA error")
    assert host_at_fault(run, JOB, [f"srun: error: {each}" for each in ended], PLACES) == host


def test_without_a_record_the_node_at_fault_is_that_of_the_task_that_ended_first(run: RunFolder) -> None:
    ended = ["srun: error: n1: task 0: Exited with exit code 1", "srun: error: n2: task 1: Exited with exit code 1"]
    assert host_at_fault(run, JOB, ended, PLACES) == "n1"
    assert host_at_fault(run, JOB, ["srun: Job step aborted: Waiting up to 32 seconds"], PLACES) is None


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
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{'; '.join(f'echo {line!r}' for line in shown) or 'exit 1'}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    leave(run, verdict=1, reason=CLOSED)
    assert name_unconcluded(run, JOB.attempt_id, {"n1": [0, 2], "n2": [1]}) == 1
    found = recorded(run)
    assert (found[0], found[2]) == (1, rank)
    assert found[1].startswith(reason)
    assert (CLOSED in found[1]) == (rank is None), "a peer's error is shown only where no node is known"
    assert name_unconcluded(run, "slurm-none", {}) == 1


def test_what_the_ranks_recorded_before_the_batch_script_was_killed_stays(run: RunFolder) -> None:
    leave(run, verdict=75, reason="stopped on request after step 7")
    assert name_unconcluded(run, JOB.attempt_id, {}) == 75
    assert recorded(run)[1] == "stopped on request after step 7"


# --- the next attempt


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """`slurm(state, code)`: a scontrol whose job has this state and whose requeue ends with this code; and an sbatch."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked = tmp_path / "asked"

    def make(state: str, code: int) -> Path:
        requeue = f'[ "$1" = requeue ] && {{ echo no >&2; exit {code}; }}'
        (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" >>{asked}\n{requeue}\necho JobState={state}\n')
        (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$* ${{SLURM_RESTART_COUNT-}}" >>{asked}\necho 99\n')
        for name in ("scontrol", "sbatch"):
            (tmp_path / name).chmod(0o755)
        return asked

    return make


@pytest.mark.parametrize(
    ("state", "code", "no", "words", "requeued"),
    [
        ("RUNNING", 0, None, "requeued: the next attempt resumes from the last checkpoint", True),
        ("RUNNING", 1, None, "Slurm refuses to requeue the job: scontrol requeue 12: no; continue with: sbatch", True),
        ("COMPLETING Restarts=1 PreemptTime=None", 0, None, "Slurm is ending the job (COMPLETING) for good;", False),
        (
            "CANCELLED Restarts=1 StartTime=2026-11-27T10:00:00 PreemptTime=2026-11-27T09:00:00",  # of the attempt before
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
    continued = "the next attempt" in words or "has requeued" in words
    assert ("""sbatch '/runs/it'"'"'s/slurm/x/train.sbatch'""" in said) != continued


def test_a_job_that_a_preemption_cancels_is_submitted_again_with_its_count(
    slurm: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = slurm("COMPLETING Restarts=1 StartTime=2026-11-27T09:00:00 PreemptTime=2026-11-27T10:00:00", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # of this job, not of the next
    attempts = tmp_path / "job_12.json"
    attempts.write_text("[[75, 0, 7]]")
    (tmp_path / "job_12_faults").write_text("n3")
    (tmp_path / "job_120_faults").write_text("n4")  # of another job
    requeue_job(JOB, CodeSnapshot(Path("/s")), attempts, None)
    assert "does not requeue it (PreemptMode=CANCEL); submitted again as job 99" in capsys.readouterr().err
    assert asked.read_text().splitlines()[-1] == "--parsable --dependency=afterany:12 /s/train.sbatch "
    assert (tmp_path / "job_99.json").read_text() == "[[75, 0, 7]]"
    assert (tmp_path / "job_99_faults").read_text() == "n3"


@pytest.mark.parametrize("number", ["14", "12"])
def test_one_task_of_an_array_goes_on_by_itself(
    slurm: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str], number: str
) -> None:
    """Slurm gives an array's last task the id of the whole array: by that id all tasks would be requeued."""
    asked = slurm("RUNNING", 1)
    env = {"SLURM_JOB_ID": number, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": "/clone"}
    requeue_job(SlurmJob.from_environment(env), CodeSnapshot(Path("/s")), Path("none"), None)
    assert asked.read_text().splitlines() == ["--oneliner show job 12_3", "requeue 12_3"]
    assert "continue with: sbatch --array=3 /s/train.sbatch" in capsys.readouterr().err
