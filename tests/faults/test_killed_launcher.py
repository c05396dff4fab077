"""SIGKILL ends the launcher at random moments, including start-up and saves. All ranks end too, and the same command
resumes the run, which ends bit-equal to an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_dist.runtime.run_folder import RunFolder
from tests.support.judgement import differences
from tests.support.site import ROOT, settings
from tests.support.tiny import tiny_config, write_config

KILLS = 6
RANKS = 2
MARK = "MOE_DIST_TEST_MARK"


def start(config: Path, mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "launchers.local", str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def marked(mark: str) -> list[int]:
    """Returns running processes with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_run_whose_launcher_is_killed_at_any_moment_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("MOE_DIST_FAULT_SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    wanted = tiny_config(tiny_data, tmp_path / "runs", settings("undisturbed", ranks=RANKS))
    assert start(write_config(wanted, tmp_path / "undisturbed.yaml"), "undisturbed").wait() == 0
    config = tiny_config(tiny_data, tmp_path / "runs", settings("killed", ranks=RANKS) | {"checkpoint.every": 2})
    path, run = write_config(config, tmp_path / "killed.yaml"), RunFolder.of(config)
    begun = RunFolder.of(wanted).read_status().attempts[0]
    whole = begun.ended - begun.started + 3.0  # seconds that an attempt takes with its start-up
    mark = f"{seed}-{os.getpid()}"
    for number in range(KILLS):
        process = start(path, mark)
        # Half of the kills come at a random moment of the whole attempt, and half come during start-up.
        time.sleep(rng.uniform(0.0, 4.0 if number % 2 else whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 600.0
        while (left := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"seed {seed}: {left} outlived the launcher"
    assert start(path, mark).wait() == 0, f"seed {seed}: see {run.path}"
    assert not marked(mark)
    assert differences(run, RunFolder.of(wanted)) == []
