"""The rank supervisor runs small programs as ranks. It leaves no process behind, however the rank or the actor ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cover import full
from tests.support.processes import is_alive, wait_until

ROOT = Path(__file__).parents[4]
# `escape` starts a process in a new session whose parent has ended. The process writes its pid to a file.
ESCAPED = """
import os, sys, time
def escape(path):
    if os.fork():
        while not os.path.exists(path): time.sleep(0.01)
        return
    os.setsid()
    if os.fork(): os._exit(0)
    with open(path + ".new", "w") as file: file.write(str(os.getpid()))
    os.rename(path + ".new", path)
    time.sleep(600); os._exit(0)
"""


class Kept:
    """A supervisor that is started in the same way as by an actor."""

    def __init__(self, folder: Path, program: str, *, shown: bool = False, scratch: str = "") -> None:
        self.log, self.escaped = folder / "rank.log", folder / "escaped"
        (folder / "rank.py").write_text(ESCAPED + textwrap.dedent(program))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launchers.ray.rank_supervisor"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        argv = [sys.executable, str(folder / "rank.py"), str(self.escaped)]
        self.say(
            json.dumps({"argv": argv, "env": dict(os.environ), "log": str(self.log), "shown": shown, "scratch": scratch})
        )
        self.pid = int(self.hear()["pid"])

    def say(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def actor_dies(self) -> None:
        self.process.stdin.close()
        self.process.stdin = None

    def inner_pid(self) -> int:
        """Returns the pid of the supervisor's second process, which is the rank's parent."""
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def escaped_pid(self) -> int:
        wait_until(lambda: self.escaped.exists() and bool(self.escaped.read_text()))
        return int(self.escaped.read_text())


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def start(program: str, **options: Any) -> Kept:
        made.append(Kept(tmp_path, program, **options))
        return made[-1]

    yield start
    for each in made:
        each.process.communicate()


@pytest.mark.parametrize("code", [full(0), 70, full(-9)])
def test_the_exit_code_is_reported_and_remaining_processes_are_killed(kept: Callable[..., Kept], code: int) -> None:
    end = f"sys.exit({code})" if code >= 0 else "os.kill(os.getpid(), 9)"
    supervisor = kept(f"escape(sys.argv[1]); {end}")
    assert supervisor.hear() == {"code": code}
    escaped = supervisor.escaped_pid()
    assert supervisor.process.wait() == 0
    assert not is_alive(escaped)


def test_nothing_is_left_when_the_actor_dies(kept: Callable[..., Kept], tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    refuses = "import signal\nfor s in (15, 12, 2): signal.signal(s, signal.SIG_IGN)\n"
    supervisor = kept(refuses + "escape(sys.argv[1]); time.sleep(600)", scratch=str(scratch))
    escaped = supervisor.escaped_pid()
    assert is_alive(supervisor.pid)
    supervisor.actor_dies()
    assert supervisor.process.wait() == 0
    assert not is_alive(supervisor.pid)
    assert not is_alive(escaped)
    assert not scratch.exists()


def test_the_rank_dies_with_its_supervisor(kept: Callable[..., Kept]) -> None:
    supervisor = kept("open(sys.argv[1], 'w').write('0'); time.sleep(600)")
    supervisor.escaped_pid()
    os.kill(supervisor.inner_pid(), signal.SIGKILL)
    wait_until(lambda: not is_alive(supervisor.pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signals_are_forwarded_and_the_supervisor_ignores_its_own(
    kept: Callable[..., Kept], number: signal.Signals
) -> None:
    # Python drops an exception that a signal handler raises while a file without `with` is closed.
    program = """
    import signal
    def stop(number, frame): sys.exit(75)
    for s in (15, 12, 2): signal.signal(s, stop)
    with open(sys.argv[1], "w") as file: file.write("0")
    time.sleep(600)
    """
    supervisor = kept(program)
    supervisor.escaped_pid()
    os.kill(supervisor.inner_pid(), number)
    supervisor.say(number.name)
    assert supervisor.hear() == {"code": 75}


def test_a_rank_can_be_interrupted_as_from_a_terminal(kept: Callable[..., Kept]) -> None:
    supervisor = kept("with open(sys.argv[1], 'w') as file: file.write('0')\ntime.sleep(600)")
    supervisor.escaped_pid()
    supervisor.say("SIGINT")
    assert supervisor.hear() == {"code": -signal.SIGINT}  # KeyboardInterrupt was raised, so the rank does not ignore SIGINT


@pytest.mark.parametrize(("shown", "output", "log"), [(True, [b"err", b"out"], "err\n"), (False, [], "out\nerr\n")])
def test_rank_0_is_shown_and_others_speak_into_their_log(
    kept: Callable[..., Kept], shown: bool, output: list[bytes], log: str
) -> None:
    supervisor = kept("print('out', flush=True); print('err', file=sys.stderr, flush=True)", shown=shown)
    assert supervisor.hear() == {"code": 0}
    assert sorted(supervisor.process.communicate()[1].splitlines()) == output
    assert supervisor.log.read_text() == log
