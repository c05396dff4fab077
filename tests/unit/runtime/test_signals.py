"""Tests stop signals, each in a separate process."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_dist.runtime.signals import STOP_SIGNALS

ROOT = Path(__file__).parents[3]
# This code blocks like a collective: the GIL is free, and a signal does not return the main thread to Python.
STUCK = "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64); [libc.pthread_mutex_lock(lock) for _ in range(2)]"


@contextmanager
def program(text: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_any_mix_many_times_is_one_request(number: signal.Signals) -> None:
    text = """
        import sys, time
        from moe_dist.runtime.signals import StopRequest
        stop = StopRequest().__enter__()
        print("no" if not stop.requested else "yes", flush=True)
        while not stop.requested: time.sleep(0.01)
        sys.stdin.readline()
        print(stop.first.name, flush=True)
    """
    with program(text) as process:
        assert line(process) == "no"
        process.send_signal(number)
        for other in STOP_SIGNALS * 3:
            process.send_signal(other)
        out, err = process.communicate("go\n", timeout=600)
    assert (process.returncode, err) == (0, "")
    # the kernel delivers pending signals in the order of their numbers
    assert out.strip() in {s.name for s in STOP_SIGNALS}


def test_the_grace_ends_a_process_whose_main_thread_is_stuck_in_c() -> None:
    text = f"""
        import ctypes
        from moe_dist.runtime.signals import StopRequest
        StopRequest(0.3, lambda: print("expired", flush=True), told=True).__enter__()
        print("ready", flush=True)
        {STUCK}
    """
    with program(text) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert out == "expired\n"
    assert err.startswith("SIGTERM: the run finishes its current step or evaluation, saves, and stops\n")
    assert "SIGTERM came 0.3 s ago" in err
    assert "Current thread" in err


def test_children_ignore_stop_signals_and_die_with_their_parent() -> None:
    text = """
        import os, subprocess, sys, time
        from moe_dist.runtime.signals import child_of
        loop = "import time, sys; print('child', flush=True); time.sleep(100)"
        prepare = child_of(os.getpid(), ignore_stop=True)
        child = subprocess.Popen([sys.executable, "-c", loop], preexec_fn=prepare, stdout=subprocess.PIPE)
        child.stdout.readline()
        for number in (2, 12, 15):
            child.send_signal(number)
        time.sleep(0.3)
        print(child.pid if child.poll() is None else "dead", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), 9)
    """
    with program(text) as process:
        pid = line(process)
        assert pid.isdecimal()
        assert Path(f"/proc/{pid}").exists()
        process.communicate("go\n", timeout=600)
    while Path(f"/proc/{pid}").exists():  # the kernel ends the process at some time; the test's timeout bounds the wait
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break


def test_a_child_whose_parent_is_gone_already_ends(tmp_path: Path) -> None:
    text = """
        from moe_dist.runtime.signals import child_of
        child_of(1 << 22, ignore_stop=False)()
        print("still here")
    """
    with program(text) as process:
        out, _ = process.communicate(timeout=600)
    assert (process.returncode, out) == (1, "")


def test_blocked_signals_become_a_stop_request_once_the_handlers_are_installed() -> None:
    code = (
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "from moe_dist.runtime.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "print(stop.requested)\n"
        "print(stop.__enter__().requested, stop.first.name)\n"
    )
    command = ["env", "--block-signal=TERM,USR2,INT", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "False\nTrue SIGTERM\n"), done.stderr
