"""Every end of an attempt leaves a verdict. Each test runs a process, because a failed rank exits."""

import errno
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_dist.runtime.attempt import verdict_of
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import LeaseError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys
from moe_dist.config.load import load_config
from moe_dist.errors import *
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import RankEnv
with Attempt(RankEnv.from_environment(os.environ)) as attempt:
    attempt.open(load_config(sys.argv[1]))
    attempt.follow(lambda: 7)
    {body}
sys.exit(attempt.exit_code)
"""


def run(tmp_path: Path, body: str, **env: str) -> tuple[subprocess.CompletedProcess[str], RunFolder]:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    path = write_config(config, tmp_path / "x.yaml")
    program = PROGRAM.format(body=textwrap.dedent(body))
    given = {"MOE_DIST_ATTEMPT_ID": "this", **env}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, **given},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done, RunFolder.of(config)


@pytest.mark.parametrize(
    ("body", "code", "reason", "shown"),
    [
        ("pass", 0, "done", ""),
        ("raise StoppedError('saved')", 75, "saved", "saved\n"),
        ("raise DataError('damaged')", 65, "damaged", "damaged\n"),
        ("raise KeyError('ours')", 1, "KeyError: 'ours'", "Traceback"),
        # A finished run stays finished, even if its sinks raise or leave threads.
        ("attempt.finish(); raise KeyError('a sink')", 0, "done", "Traceback"),
        (
            "attempt.finish(); import threading, time; threading.Thread(target=time.sleep, args=(900,)).start()",
            0,
            "done",
            "",
        ),
        ("attempt.expire(); os._exit(1)", 1, "did not stop within the grace period", ""),
    ],
)
def test_verdicts(tmp_path: Path, body: str, code: int, reason: str, shown: str) -> None:
    done, folder = run(tmp_path, body)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(shown)
    latest = folder.read_status().attempts[-1]
    assert (latest.attempt_id, latest.verdict, latest.last_step, latest.rank) == ("this", code, 7, 0)
    assert latest.rank_host == socket.gethostname()
    assert latest.reason.startswith(reason)
    assert latest.ended is not None
    assert folder.told("this") == {0}
    assert not folder.lease_json.exists()


def test_a_rank_that_ends_otherwise_tells_nothing_and_the_next_attempt_clears_what_was_told(tmp_path: Path) -> None:
    _, folder = run(tmp_path, "os._exit(3)")
    assert folder.told("this") == set()
    folder.tell("this", 0)
    folder.open(folder.read_config(), RankEnv(0, 1, 0, 1, "published", 1, "next")).release()
    assert not list(folder.path.glob(".told_*"))


def test_a_rank_other_than_0_gives_the_verdict_under_the_lease_of_rank_0(tmp_path: Path) -> None:
    body = """import subprocess; environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2", "MOE_DIST_INIT_METHOD": "file:///x", "INNER": "1"}
    if "INNER" in os.environ: raise DataError('rank 1 saw it')
    print(subprocess.run([sys.executable, "-c", os.environ["PROGRAM"], sys.argv[1]], env=environment).returncode)
    raise ConnectionError('rank 0 saw rank 1 go')"""
    done, folder = run(tmp_path, body, PROGRAM=PROGRAM.format(body=body))
    assert (done.returncode, done.stdout) == (1, "65\n")
    latest = folder.read_status().attempts[-1]
    assert (latest.verdict, latest.reason, latest.rank) == (65, "rank 1 saw it", 1)


def test_a_rank_that_learned_of_an_error_waits_for_the_failed_rank_to_record_it(tmp_path: Path) -> None:
    """Rank 1 ends first, but only rank 0 knows the error. This happens after a vote."""
    body = """import subprocess; environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2", "MOE_DIST_INIT_METHOD": "file:///x", "INNER": "1"}
    if "INNER" in os.environ:
        import moe_dist.runtime.attempt as module
        from moe_dist.runtime.run_folder import RunFolder
        module.CAUSE_SECONDS = 100.0
        look = RunFolder.has_verdict
        RunFolder.has_verdict = lambda self, name: print("waits", flush=True) or look(self, name)
        heard = DataError('it failed on ranks [0]')
        heard.consequence = True
        raise heard
    inner = subprocess.Popen([sys.executable, "-c", os.environ["PROGRAM"], sys.argv[1]], env=environment, stdout=-1)
    print(inner.stdout.readline().decode(), end="", flush=True)  # or nothing, at its end
    raise DataError('latest names nothing')"""
    done, folder = run(tmp_path, body, PROGRAM=PROGRAM.format(body=body))
    assert (done.returncode, done.stdout) == (65, "waits\n")
    latest = folder.read_status().attempts[-1]
    assert (latest.verdict, latest.reason, latest.rank) == (65, "latest names nothing", 0)


LOST = "[pair.cc:544] Connection closed by peer [127.0.0.1]:1"


@pytest.mark.parametrize("launched", ["this", ""])
def test_a_rank_that_lost_a_peer_blames_nobody_and_tells_where_it_cannot_know(tmp_path: Path, launched: str) -> None:
    """Only moe_dist's launchers compare how all ranks ended. srun, mpirun and torchrun tell moe_dist nothing about the
    ends of other ranks."""
    done, folder = run(tmp_path, f"raise RuntimeError({LOST!r})", MOE_DIST_ATTEMPT_ID=launched)
    latest = folder.read_status().attempts[-1]
    assert (done.returncode, latest.verdict, latest.rank, latest.rank_host) == (1, 1, None, "")
    assert latest.reason.startswith(f"rank 0 on {socket.gethostname()} lost a peer: RuntimeError: {LOST}")
    for text in (latest.reason, done.stderr):
        assert ("do not tell moe_dist which one and why" in text) == (not launched)


def test_errors_of_a_full_or_lost_disk_name_file_and_fix() -> None:
    verdict, reason = verdict_of(OSError(errno.ENOSPC, "No space left on device", "runs/x/config.yaml"))
    assert verdict == 1
    assert reason.startswith("runs/x/config.yaml: No space left on device; repair this")
    assert verdict_of(OSError(errno.EIO, "Input/output error"))[1].startswith("Input/output error; repair this")
    assert verdict_of(ConnectionError("reset"))[1] == "ConnectionError: reset"


def test_a_lost_lease_ends_the_attempt_before_any_other_obstacle_to_a_commit(tmp_path: Path) -> None:
    """A failed save is tried again, but an attempt that has lost its lease must end."""
    name = tiny_config(tmp_path / "data", tmp_path / "runs").run.name
    body = f"attempt.require(lambda: print('asked')); os.unlink({str(tmp_path / 'runs' / name / 'lease.json')!r}); "
    done, _ = run(tmp_path, body + "attempt.check_commit()")
    assert "lost the lease" in done.stderr
    assert done.returncode == LeaseError.exit_code
    assert "asked" not in done.stdout
