"""The local launcher runs small programs instead of training. Tests checks, output and exit codes."""

import os
import signal
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launchers.local import STORE_PREFIX, launch, store_folder
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.lease import Lease
from moe_dist.runtime.run_folder import RunFolder
from tests.support.cover import full
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PRELUDE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from moe_dist.runtime.environment import RankEnv
env = RankEnv.from_environment(os.environ)
rank = env.rank
here = os.path.dirname(__file__)
open(f"{{here}}/started.{{rank}}", "w").close()
def wait_for(name):
    while not os.path.exists(f"{{here}}/{{name}}"): time.sleep(0.01)
"""
# These imports take half a second of CPU time. Only ranks that open the run need them.
IMPORTS = """
from moe_dist.config.load import load_config
from moe_dist.errors import *
from moe_dist.runtime.attempt import Attempt
"""
ATTEMPT = (
    IMPORTS
    + """
with Attempt(env) as attempt:
    attempt.open(load_config(sys.argv[1], sys.argv[2:]))
    open(f"{here}/opened.{rank}", "w").close()
    wait_for("opened.0")
"""
)


def test_cuda_without_a_gpu_is_refused_before_any_rank_starts(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, tiny_data)
    monkeypatch.setattr("launchers.local.nvml", lambda: (None, "NVML Shared Library Not Found"))
    with refused(ResourceError, "parallel.device=cuda: this machine shows no GPU (NVML Shared Library Not Found)"):
        site.launch("", "parallel.device=cuda", "parallel.precision=bf16")
    assert not list(tmp_path.glob("started.*"))


class Site:
    """A folder with a configuration, the program that the ranks run, and run folders."""

    def __init__(self, folder: Path, data: Path, changes: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.config = tiny_config(data, folder / "runs", changes)
        self.yaml = write_config(self.config, folder / "x.yaml")
        self.run = RunFolder.of(self.config)

    def launch(self, program: str, *overrides: str, **options: Any) -> int:
        path = self.folder / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(program))
        return launch(self.yaml, overrides, program=(str(path),), **options)

    def attempt(self, body: str, *overrides: str, **options: Any) -> int:
        return self.launch(ATTEMPT + textwrap.indent(textwrap.dedent(body), "    "), *overrides, **options)

    @property
    def started(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("started.*"))


@pytest.fixture
def site(tmp_path: Path, tiny_data: Path) -> Site:
    return Site(tmp_path, tiny_data)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [(["data.path=/nowhere"], {}), ([], {"nproc": 3}), ([], {"nproc": 8})],  # missing data, or a wrong number of ranks
)
def test_a_bad_configuration_costs_no_process_and_no_folder(
    site: Site, overrides: list[str], options: dict[str, Any]
) -> None:
    with refused(ConfigError, golden=False):
        site.launch("pass", *overrides, **options)
    assert site.started == []
    assert not site.run.path.exists()


def test_what_a_killed_launcher_left_is_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lost, link = tmp_path / f"{STORE_PREFIX}lost", tmp_path / f"{STORE_PREFIX}link"
    for folder in (lost, tmp_path / "target"):
        folder.mkdir()
        (folder / "lock").touch()  # nobody holds this lock
    link.symlink_to(tmp_path / "target")
    with store_folder() as held:
        assert Path(held).stat().st_mode & 0o777 == 0o700
        for folder in (lost, link, held):
            os.utime(folder, (0, 0), follow_symlinks=False)
        with store_folder() as store:
            assert {*tmp_path.glob(f"{STORE_PREFIX}*")} == {link, Path(held), Path(store)}
            assert (tmp_path / "target/lock").exists()


def test_another_configuration_is_refused_unless_the_old_run_is_moved_aside(site: Site) -> None:
    site.attempt("raise StoppedError('saved')")
    with refused(ConfigError, "optimizer.eps"):
        site.launch("pass", "optimizer.eps=0.5")
    assert site.attempt("pass", "optimizer.eps=0.5", overwrite=True) == 0
    assert RunFolder(f"{site.run.path}.old-1").read_config() == site.config
    assert "attempt" in site.run.log_of(1).read_text()


@pytest.mark.parametrize(
    ("leaves", "peer_speaks", "words"),
    [
        ("os.kill(os.getpid(), 9)", True, "killed by SIGKILL"),
        full("os._exit(3)", True, "exit code 3"),
        full("os.kill(os.getpid(), 9)", False, "killed by SIGKILL"),
    ],
)
def test_a_rank_that_leaves_without_an_exception_is_the_cause_whatever_its_peers_wrote(
    site: Site, capfd: pytest.CaptureFixture[str], leaves: str, peer_speaks: bool, words: str
) -> None:
    body = f"""
    attempt.follow(lambda: 7)
    if rank == 1: {leaves}
    if {peer_speaks}: time.sleep(0.5); raise ConnectionError("the consequence")
    {leaves}
    """
    assert site.attempt(body) == 1
    latest = site.run.read_status().attempts[-1]
    assert (latest.verdict, latest.last_step) == (1, 7 if peer_speaks else 0)
    assert words in latest.reason
    assert latest.ended is not None
    if peer_speaks:
        assert latest.rank == 1
        assert f"rank 1 failed first ({words})" in capfd.readouterr().err
    assert not site.run.lease_json.exists()


@pytest.mark.full  # waits for 5 s; test_rank_tracker.py tests the rule
def test_a_frozen_rank_is_the_cause_of_a_peers_timeout(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        open(f"{here}/freezing", "w").close(); os.kill(os.getpid(), 19)
    wait_for("freezing"); time.sleep(0.5); raise TimeoutError("a collective took too long")
    """
    assert site.attempt(body) == 1
    assert "rank 1 failed first (frozen by SIGSTOP" in capfd.readouterr().err
    latest = site.run.read_status().attempts[-1]
    assert latest.rank == 1
    assert latest.reason == (
        "rank 1: frozen by SIGSTOP, and killed after a peer's collective timed out; "
        "TimeoutError: a collective took too long"
    )


def test_a_rank_that_dies_after_the_run_was_done_changes_nothing(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """An example is a rank whose sinks do not close in time."""
    body = """
    attempt.last_step = lambda: 4
    if rank == 0: attempt.finish(); open(f"{here}/done.0", "w").close(); os.kill(os.getpid(), 9)
    wait_for("done.0"); raise ConnectionError("the consequence")
    """
    assert site.attempt(body, max_restarts=3) == 0
    assert "rank 0 failed after the run was done: killed by SIGKILL" in capfd.readouterr().err
    assert [(each.verdict, each.reason) for each in site.run.read_status().attempts] == [(0, "done")]


def starts_of(site: Site) -> list[list[str]]:
    return [line.split() for line in (site.folder / "starts").read_text().splitlines()]


def test_a_failure_is_followed_by_a_new_start_from_the_last_checkpoint(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
    if rank == 0:
        open(f"{here}/starts", "a").write(f"{env.attempt} {env.attempt_id} {env.init_method}\\n")
        attempt._folder.checkpoints.joinpath("latest").write_text(f"step_{2 * env.attempt + 2}")
    attempt.follow(lambda: 2 * env.attempt + 2)
    if env.attempt == 0 and rank == 1: os.kill(os.getpid(), 9)
    if env.attempt == 0: time.sleep(100)
    """
    assert site.attempt(body, max_restarts=3, overwrite=True) == 0
    numbers, names, meetings = zip(*starts_of(site), strict=True)
    assert numbers == ("0", "1")
    assert len(set(names)) == len(set(meetings)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("restart ")]
    assert said == ["restart 1 of 3, from the checkpoint of step 2: rank 1: killed by SIGKILL"]
    status = site.run.read_status()
    assert [(each.restarts, each.verdict, each.rank) for each in status.attempts] == [(0, 1, 1), (1, 0, 0)]


def test_ranks_that_die_before_they_open_the_run_are_attempts_with_their_reason(site: Site) -> None:
    assert site.launch("raise ImportError('libcuda')", max_restarts=5) == 1
    first, second = site.run.read_status().attempts
    for ending in (first, second):
        assert ending.reason == f"rank {ending.rank}: exit code 1; ImportError: libcuda"
    assert (first.restarts, second.restarts) == (0, 1)
    assert site.launch("sys.exit(69 if rank == 1 else 0)") == 69


def test_a_stop_before_the_ranks_are_ready_is_no_failure_to_start_again_from(site: Site) -> None:
    def stop() -> None:
        while len(site.started) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert site.launch("time.sleep(100)", max_restarts=3) == 75
    thread.join()
    (ending,) = site.run.read_status().attempts
    assert (ending.verdict, ending.rank) == (75, None)


def test_a_run_that_somebody_else_writes_to_is_not_started_again(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.run.path.mkdir(parents=True)
    lease = Lease(site.run.lease_json, "another").acquire(0.0)
    try:
        program = ATTEMPT.replace("sys.argv[2:])", "sys.argv[2:]), wait_seconds=0.1").replace(
            'wait_for("opened.0")', "pass"
        )
        assert site.launch(program, max_restarts=3) == 1
    finally:
        lease.release()
    err = capfd.readouterr().err
    assert "not restarted: attempt another, process" in err
    assert site.run.log_of(0).read_text().count("--- attempt") == 1
