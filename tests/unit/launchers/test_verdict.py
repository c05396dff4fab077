"""From the exit codes of the ranks, each launcher concludes which rank is at fault, and the attempt's verdict.

Each case is a history of one attempt of four ranks, two on each of the nodes n1 and n2. Slurm reads the history in srun's
lines. The local launcher and Ray get it from their rank tracker.
"""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers.attempts import begin_logs
from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts
from launchers.run_progress import RunState, read_progress
from launchers.slurm.step import outcome_of
from launchers.verdict import Verdict, conclude, last_output
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import Lease
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopSignals
from tests.support.tiny import tiny_config

ATTEMPT = "this"
HOSTS = ("n1", "n1", "n2", "n2")
PLACES = {"n1": {0: 0, 1: 1}, "n2": {2: 2, 3: 3}}
LOST_PEER = "rank 0 on n1 lost a peer: RuntimeError: Connection closed by peer"
HANG = "collective 'combine rows' of layers.1 did not finish in 8 s at step 45; rank 1 did not enter it"
OOM = "Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed."
NO_CULPRIT = "collective 'combine rows' did not finish in 8 s; all ranks have entered it"


@dataclass(frozen=True)
class Case:
    """A history of an attempt, and the verdict that launchers must conclude.

    Attributes:
        ends: (rank, exit code) of the ranks that failed by themselves, in the order in which the launcher learned of
            them. The code None means that the rank's node was lost.
        cause: The rank at fault.
        told: Ranks that noted in the run folder that they ended by themselves.
        record: (verdict, reason, rank) in status.json.
        log: Last line in the log of the rank at fault.
    """

    ends: Sequence[tuple[int, int | None]]
    cause: int | None
    reason: str
    told: Sequence[int] = ()
    record: tuple[int, str, int | None] | None = None
    code: int = 1
    log: str = "step 7"


def by_tracker(case: Case) -> Outcome:
    tracker = RankTracker(4, ShutdownTimeouts(9.0, peers=0.05), say=print)
    ended = dict(case.ends)
    for time, (rank, code) in enumerate(case.ends):
        lost = f"Node failure on {HOSTS[rank]}" if code is None else ""
        tracker.signals_due(StopSignals(), time / 10)
        tracker.end(rank, -signal.SIGKILL if code is None else code, time / 10, frozen=tuple, lost=lost)
    for rank in set(range(4)) - ended.keys():  # killed by the launcher, or ended with 0
        tracker.end(rank, 0 if "exit code 0" in case.reason and rank == case.cause else -signal.SIGKILL, 99.0, frozen=tuple)
    outcome = tracker.outcome(None)
    return Outcome(**{**outcome.__dict__, "hosts": HOSTS})


def by_srun(case: Case) -> Outcome:
    lines = []
    for rank, code in case.ends:
        how = f"Exited with exit code {code}" if (code or 0) > 0 else signal.strsignal(-(code or -9))
        failure = f"{HOSTS[rank]}: task {rank}: {how}"
        lines.append(f"srun: error: {f'Node failure on {HOSTS[rank]}' if code is None else failure}")
    lines += ["srun: Job step aborted: Waiting up to 62 seconds", "srun: error: n1: task 0: Killed"]
    kept = lines if 0 not in dict(case.ends) else lines[:-1]
    return outcome_of(137, kept, PLACES, stopped=False)


CASES = {
    "an exception": Case([(0, 1), (2, 1), (1, 1)], 2, "ValueError: x", [0, 1, 2], (1, "ValueError: x", 2)),
    "os._exit": Case([(1, 3), (0, 1)], 1, "rank 1 on n1: exit code 3; step 7", [0, 2], (1, LOST_PEER, None)),
    "a native exit, learned of late": Case(
        [(0, 1), (2, 1), (3, 127)],
        3,
        "rank 3 on n2: exit code 127; undefined symbol: x",
        [0, 2],
        (1, LOST_PEER, None),
        log="undefined symbol: x",
    ),
    "os._exit with 0": Case([(0, 1), (2, 1)], 3, "rank 3 on n2: exit code 0; step 7", [0, 1, 2], (1, LOST_PEER, None)),
    "an abort": Case([(3, -6), (0, 1)], 3, "rank 3 on n2: killed by SIGABRT", [0, 1, 2], (1, LOST_PEER, None)),
    "an abort after a peer's error": Case([(3, -6), (0, 1)], 0, "CUDA error", [0, 1, 2], (1, "CUDA error", 0)),
    "a killed rank": Case([(0, 1), (1, -9)], 1, "rank 1 on n1: killed by SIGKILL", [0], (1, LOST_PEER, None)),
    "a rank killed by SIGSEGV": Case([(1, -11)], 1, "rank 1 on n1: killed by SIGSEGV"),
    "a rank in no collective": Case(
        [(0, 1), (2, 1), (3, 1)], 1, f"rank 1 on n1: {HANG}", [0, 2, 3], (1, HANG, 1), log="step 45"
    ),
    "all in the collective": Case([(0, 1), (2, 1), (3, 1), (1, 1)], None, NO_CULPRIT, range(4), (1, NO_CULPRIT, None)),
    "a broken network": Case([(0, 1), (2, 1), (3, 1), (1, 1)], None, LOST_PEER, range(4), (1, LOST_PEER, None)),
    "a lost node": Case([(0, 1), (2, None), (3, None)], 2, "ranks 2-3: Node failure on n2", [0], (1, LOST_PEER, None)),
    "divergence, and killed peers": Case([(2, 70), (1, -9)], 2, "loss was nan", [2], (70, "loss was nan", 2), code=70),
    "an error before the record": Case([(2, 70), (1, -9)], 2, "rank 2 on n2: exit code 70; step 7", code=70),
    "data missing on one node": Case(
        [(3, 78), (0, 75), (1, 75)],
        3,
        "rank 3 on n2: exit code 78; data.path='/data': does not exist",
        [0, 1, 2],
        (75, "stopped on request while rank 0 waited for rank 3", 0),
        code=78,
        log="data.path='/data': does not exist\nsee docs/data.md",
    ),
    "death before status.json": Case([(0, -9)], 0, "rank 0 on n1: killed by SIGKILL"),
    "another program": Case([(1, 2), (0, 1)], 1, "rank 1 on n1: exit code 2; step 7"),
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tiny_config(tmp_path / "data", tmp_path / "runs"))


def began(folder: RunFolder, record: tuple[int, str, int | None] | None = None, told: Sequence[int] = ()) -> None:
    """Begins an attempt as rank 0, and writes the notes and the record that the attempt's ranks leave behind."""
    config = tiny_config(folder.path.parents[1] / "data", folder.path.parent)
    lease = folder.open(config, RankEnv(0, 4, 0, 2, "published", 0, ATTEMPT))
    begin_logs(folder, 4, ATTEMPT)
    if record is not None:
        verdict, reason, rank = record
        host = HOSTS[rank] if rank is not None and rank in told else ""  # a rank records only its own host
        more = {"rank": rank, "rank_host": host}
        assert folder.write_status(verdict=verdict, reason=reason, last_step=7, attempt_id=ATTEMPT, **more)
    for rank in told:
        folder.tell(ATTEMPT, rank)
    lease.release()


@pytest.mark.parametrize("outcome", [by_tracker, by_srun])
@pytest.mark.parametrize("name", CASES)
def test_all_launchers_blame_the_same_rank(folder: RunFolder, name: str, outcome: Callable[[Case], Outcome]) -> None:
    case = CASES[name]
    if name == "death before status.json":
        folder.prepare()
        begin_logs(folder, 4, ATTEMPT)
    else:
        began(folder, case.record, case.told)
    for rank in range(4):
        with folder.log_of(rank).open("a") as log:
            log.write(f"{case.log}\n" if rank == case.cause else "connection closed\n")
    verdict = conclude(folder, ATTEMPT, outcome(case), restarts=0, lasted=5.0)
    assert verdict == Verdict(case.code, case.reason, case.cause)
    latest = folder.read_status().attempts[-1]
    assert (latest.verdict, latest.reason, latest.rank) == (case.code, case.reason, case.cause)
    assert latest.ended is not None
    shown = read_progress(folder.path)
    assert shown.state in (RunState.FAILED, RunState.REFUSED, RunState.DIVERGED)


def test_a_frozen_rank_is_at_fault_with_the_collective_that_its_peers_waited_in(folder: RunFolder) -> None:
    began(folder, (1, HANG, 1), [0])
    outcome = Outcome((1, -9, -9, -9), (0,), frozen=(1,))
    assert conclude(folder, ATTEMPT, outcome) == Verdict(
        1, f"rank 1: frozen by SIGSTOP, and killed after a peer's collective timed out; {HANG}", 1
    )


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            [f"slurmstepd-n2: error: {OOM}", "srun: error: n2: task 3: Out Of Memory"],
            f"rank 3 on n2: killed by SIGKILL, {OOM}",
        ),
        (
            [
                "slurmstepd: error: StepId=12.0 exceeded memory limit (9 > 8), being killed",
                "srun: error: n1: task 1: Killed",
            ],
            "rank 1 on n1: killed by SIGKILL, StepId=12.0 exceeded memory limit (9 > 8), being killed",
        ),
        (["srun: error: n1: task 1: Out Of Memory"], "rank 1 on n1: killed by SIGKILL, out of memory"),
    ],
)
def test_the_words_of_a_memory_limit_stand_in_the_verdict(folder: RunFolder, lines: list[str], reason: str) -> None:
    began(folder, (1, LOST_PEER, None), [0])
    outcome = outcome_of(137, [*lines, "srun: error: n2: task 2: Exited with exit code 1"], PLACES, stopped=False)
    assert conclude(folder, ATTEMPT, outcome).reason == reason


@pytest.mark.parametrize(
    ("lines", "record", "verdict"),
    [
        (["n1: task 0: Exited with exit code 75", "n2: task 2: Killed"], (75, "saved", 0), 75),
        (["n1: task 0: Terminated"], None, 75),
        (["n2: task 2: Exited with exit code 78"], None, 78),
        (["n2: task 2: Exited with exit code 1"], (1, "CUDA error", 2), 1),  # failed while it saved
        (["Node failure on n2", "n1: task 0: Exited with exit code 75"], (75, "stopped while rank 0 waited", 0), 1),
    ],
)
def test_a_requested_stop_is_no_failure_unless_a_node_was_lost_or_an_error_recorded(
    folder: RunFolder, lines: list[str], record: tuple[int, str, int | None] | None, verdict: int
) -> None:
    began(folder, record, [0] if record else [])
    outcome = outcome_of(143, [f"srun: error: {line}" for line in lines], PLACES, stopped=True)
    assert conclude(folder, ATTEMPT, outcome).code == verdict


@pytest.mark.parametrize("code", [2, 7, 127, 130, 137, 143])
def test_an_exit_code_of_srun_that_is_no_verdict_is_1(folder: RunFolder, code: int) -> None:
    assert conclude(folder, "none", outcome_of(0, [], PLACES, stopped=False)) == Verdict(0)
    assert conclude(folder, ATTEMPT, outcome_of(code, [], PLACES, stopped=False)).code == 1


@pytest.mark.parametrize(("codes", "failed"), [((-9, 1, 1, 1), (0, 1)), ((-9, -9, 1, 1), (0, 1))])
def test_a_lost_rank_is_at_fault_although_a_killed_rank_0_holds_the_lease(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], failed: tuple[int, ...]
) -> None:
    monkeypatch.setitem(Lease.__init__.__kwdefaults__, "stale_seconds", 0.5)  # pyright: ignore[reportArgumentType]
    config = tiny_config(folder.path.parents[1] / "data", folder.path.parent)
    lease = folder.open(config, RankEnv(0, 4, 0, 1, "published", 0, ATTEMPT))
    lease._ended.set()  # ends the heartbeat
    assert folder.write_status(verdict=1, reason=LOST_PEER, last_step=7, attempt_id=ATTEMPT, rank=None)
    outcome = Outcome(codes, failed, lost={0: "lost with its node 10.0.0.4"}, hosts=HOSTS)
    assert conclude(folder, ATTEMPT, outcome) == Verdict(1, "rank 0: lost with its node 10.0.0.4", 0)
    latest = folder.read_status().attempts[-1]
    assert (latest.reason, latest.last_step) == ("rank 0: lost with its node 10.0.0.4", 7)
    assert not folder.lease_json.exists()


def test_the_failed_rank_is_printed_first_and_the_others_in_groups(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    began(folder, (1, LOST_PEER, None), [0, 1, 2])
    folder.log_of(3).write_text(f"--- attempt {ATTEMPT}, now\nTraceback (most recent call last):\nImportError: no\n")
    conclude(folder, ATTEMPT, Outcome((1, 1, 1, 3), (0, 1, 2, 3), hosts=HOSTS))
    said = capsys.readouterr().err
    assert said.startswith(f"rank 3 failed first (exit code 3) on n2; {folder.log_of(3)} ends with:\n\nTraceback")
    assert said.endswith("the other ranks ended after it: 0-2 (exit code 1)\n")


CHAIN = """Traceback (most recent call last):
First: x

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
Second: y"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("\n".join(f"line {i}" for i in range(30)), "\n".join(f"line {i}" for i in range(10, 30))),
        ("noise\nTraceback (most recent call last):\n  x\nE: 1", "Traceback (most recent call last):\n  x\nE: 1"),
        (f"Traceback (most recent call last):\nOld: handled and logged\nnoise\n{CHAIN}", CHAIN),
    ],
    ids=["no traceback", "traceback", "chain"],
)
def test_the_last_output_of_an_attempt_is_its_last_traceback(tmp_path: Path, said: str, expected: str) -> None:
    log = tmp_path / "log"
    log.write_text(f"--- attempt old, then\nTraceback (most recent call last):\nof old\n--- attempt new, now\n{said}\n")
    assert last_output(log, "new") == expected
    assert last_output(tmp_path / "none", "new") == ""
