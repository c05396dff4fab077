"""The verdict of an attempt whose ranks have ended."""

import signal
from pathlib import Path

import pytest

from launchers.attempts import begin_logs, conclude, run_attempts
from launchers.rank_tracker import Outcome
from moe_dist.runtime.attempt import verdict_of
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import Lease
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopSignals
from tests.support.cover import rest_full
from tests.support.passing_faults import FAULTS, RESTARTS
from tests.support.tiny import tiny_config

LOST = "it was lost with its node 10.0.0.4"


@pytest.mark.parametrize(
    ("codes", "lost", "reason"),
    [
        ((-9, 1), {0: LOST}, f"rank 0: {LOST}"),
        ((-9, -9), {1: LOST}, f"rank 1: {LOST}"),  # rank 0 waited for it, and was killed on another machine
    ],
)
def test_a_lost_rank_is_the_cause_although_a_killed_rank_0_holds_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], lost: dict[int, str], reason: str
) -> None:
    monkeypatch.setitem(Lease.__init__.__kwdefaults__, "stale_seconds", 0.5)  # pyright: ignore[reportArgumentType]
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    lease = folder.open(config, RankEnv(0, 2, 0, 1, "published", 0, "ray-x"))
    lease._ended.set()  # no heartbeat any more
    assert folder.write_status(verdict=1, reason="connection closed by peer", last_step=7, attempt_id="ray-x", rank=1)
    (cause,) = lost
    outcome = Outcome(codes, cause, None, aborted=False, lost=lost, hosts=("10.0.0.4", "x"))
    assert conclude(folder, "ray-x", outcome, begin_logs(folder, 2, "ray-x"))[0] == 1
    latest = folder.read_status().latest
    assert latest is not None
    assert (latest.reason, latest.rank, latest.last_step) == (reason, cause, 7)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(-9, "rank 1 on 10.0.0.5: killed by SIGKILL, out of memory?"), (-11, "rank 1 on 10.0.0.5: killed by SIGSEGV")],
)
def test_the_cause_on_several_nodes_names_the_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    folder.open(config, RankEnv(0, 2, 0, 1, "published", 0, "ray-x")).release()
    outcome = Outcome((1, code), 1, None, aborted=False, hosts=("10.0.0.4", "10.0.0.5"))
    assert conclude(folder, "ray-x", outcome, begin_logs(folder, 2, "ray-x")) == (1, reason)
    latest = folder.read_status().latest
    assert latest is not None
    assert (latest.reason, latest.rank) == (reason, 1)
    assert f"rank 1 failed first ({reason.partition(': ')[2]}) on 10.0.0.5; " in capsys.readouterr().err


def test_a_rank_that_took_the_end_of_all_ranks_for_a_stop_is_not_the_cause(tmp_path: Path) -> None:
    """As one that still waits for the others: the launcher ends it with SIGTERM after the failure of another."""
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    lease = folder.open(config, RankEnv(0, 2, 0, 2, "published", 0, "local-x"))
    assert folder.write_status(verdict=75, reason="stopped on request", last_step=0, attempt_id="local-x", rank=0)
    lease.release()
    offsets = begin_logs(folder, 2, "local-x")
    assert conclude(folder, "local-x", Outcome((75, 65), 1, None, aborted=False), offsets)[0] == 65
    latest = folder.read_status().latest
    assert latest is not None
    assert (latest.verdict, latest.rank) == (65, 1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGTERM, "SIGTERM came before the ranks were ready"),
        (1, "the run stopped on request, but rank 1 did not: exit code 1, see "),
    ],
)
def test_a_rank_that_does_not_stop_as_the_others_do_is_named_and_changes_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, said: str
) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    lease = folder.open(config, RankEnv(0, 2, 0, 2, "published", 0, "local-x"))
    assert folder.write_status(verdict=75, reason="stopped on request", last_step=0, attempt_id="local-x", rank=0)
    lease.release()
    outcome = Outcome((75, code), 1, signal.SIGTERM, aborted=False)
    assert conclude(folder, "local-x", outcome, begin_logs(folder, 2, "local-x")) == (75, "stopped on request")
    assert said in (error := capsys.readouterr().err)
    assert "failed first" not in error


def test_a_run_that_was_asked_to_stop_is_not_restarted_whatever_ended_a_rank(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder, attempts = RunFolder.of(config), []

    def run(restarts: int, attempt_id: str) -> tuple[Outcome, list[int]]:
        attempts.append(attempt_id)
        folder.open(config, RankEnv(0, 2, 0, 2, "published", 0, attempt_id)).release()
        return Outcome((75, -9), 1, signal.SIGTERM, aborted=False), begin_logs(folder, 2, attempt_id)

    assert run_attempts(folder, run, StopSignals(), prefix="local", max_restarts=3, option="--max-restarts") == 1
    assert len(attempts) == 1


@pytest.mark.parametrize("prefix", ["local", "ray"])
@pytest.mark.parametrize("fault", rest_full(FAULTS))
def test_local_and_ray_restart_after_a_fault_that_may_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str, fault: str
) -> None:
    """tests/unit/launchers/slurm/test_job.py tests that Slurm requeues a job as often after these faults."""
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder, (verdict, reason) = RunFolder.of(config), verdict_of(FAULTS[fault])
    begun: list[int] = []

    def run(restarts: int, attempt_id: str) -> tuple[Outcome, list[int]]:
        begun.append(restarts)
        lease = folder.open(config, RankEnv(0, 2, 0, 2, "published", restarts, attempt_id))
        (folder.checkpoints / "latest").write_text(f"step_{1 + restarts}")
        offsets = begin_logs(folder, 2, attempt_id)
        assert folder.write_status(verdict=verdict, reason=reason, last_step=1, attempt_id=attempt_id, rank=1)
        lease.release()
        return Outcome((1, verdict), 1, None, aborted=False), offsets

    assert run_attempts(folder, run, StopSignals(), prefix=prefix, max_restarts=RESTARTS, option="--max-restarts") == 1
    assert len(begun) == 1 + RESTARTS
    assert [each.reason for each in folder.read_status().attempts] == [reason] * len(begun)
    assert f"it was restarted {RESTARTS} times already" in capsys.readouterr().err


@pytest.mark.parametrize(("prefix", "option"), [("local", "--max-restarts"), ("ray", "--max-restarts")])
@pytest.mark.parametrize(
    ("codes", "steps", "starts", "said"),
    [
        ([-9, 1, 1, 0], [1, 2, 3, 4], 4, ""),  # faults of any kind, each after a new checkpoint
        ([-9, -9, 0], [1, 1, 1], 3, ""),
        ([-9, -9, 0], [0, 0, 0], 2, "2 attempts in a row committed no checkpoint after step 0"),
        ([1] * 9, list(range(1, 10)), 4, "it was restarted 3 times already (--max-restarts)"),
        ([78, 0], [1, 1], 1, ""),
        ([69, 0], [1, 1], 1, ""),
        ([65, 0], [1, 1], 1, ""),
        ([70, 0], [1, 1], 1, ""),
        ([75, 0], [1, 1], 1, ""),
    ],
)
def test_local_and_ray_restart_by_one_rule(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
    option: str,
    codes: list[int],
    steps: list[int],
    starts: int,
    said: str,
) -> None:
    folder = RunFolder(tmp_path / "run")
    for made in (folder.logs, folder.checkpoints):
        made.mkdir(parents=True)
    begun: list[int] = []

    def run(restarts: int, attempt_id: str) -> tuple[Outcome, list[int]]:
        begun.append(restarts)
        (folder.checkpoints / "latest").write_text(f"step_{steps[restarts]}")
        code = codes[restarts]
        failed = 0 if code not in (0, 75) else None
        return Outcome((code,), failed, None, aborted=False), begin_logs(folder, 1, attempt_id)

    run_attempts(folder, run, StopSignals(), prefix=prefix, max_restarts=3, option=option)
    assert begun == list(range(starts))
    assert said in capsys.readouterr().err
