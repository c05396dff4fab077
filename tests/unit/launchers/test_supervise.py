"""Supervises ranks that fail, hang, ignore signals or are stopped. Each rank is a small program."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from launchers.command import RankCommand
from launchers.rank_tracker import ABORTED, Outcome, ShutdownTimeouts
from launchers.supervise import DelayedStderr, Ranks
from moe_dist.runtime.signals import STOP_SIGNALS, StopSignals
from tests.support.processes import is_alive, wait_until

PATIENT = ShutdownTimeouts(stop=60.0, peers=0.3, kill=60.0)
PRELUDE = """
import os, signal, sys, time
rank, here = int(os.environ["RANK"]), sys.argv[1]
def mark(name, text=""):
    with open(f"{here}/{name}.{rank}.new", "w") as file: file.write(text)
    os.rename(f"{here}/{name}.{rank}.new", f"{here}/{name}.{rank}")
def wait_for(name):
    while not os.path.exists(f"{here}/{name}"): time.sleep(0.01)
def wait_for_end(of):
    wait_for(f"pid.{of}")
    stat = "/proc/" + open(f"{here}/pid.{of}").read() + "/stat"
    try:
        while open(stat).read().rpartition(")")[2].split()[0] != "Z": time.sleep(0.01)
    except FileNotFoundError: pass
"""
REFUSES = "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2): signal.signal(s, signal.SIG_IGN)\n"
STOPS = """
asked = []
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2): signal.signal(s, lambda n, f: asked.append(n))
mark("ready")
while not asked: time.sleep(0.01)
time.sleep(0.3)
mark("asked", " ".join(str(int(n)) for n in asked)); sys.exit(75)
"""


class Run:
    """Ranks that run one program and write their files to `folder`."""

    def __init__(self, folder: Path, program: str, timeouts: ShutdownTimeouts = PATIENT) -> None:
        self.folder, self.timeouts = folder, timeouts
        self.terminal = BytesIO()
        (folder / "program.py").write_text(PRELUDE + textwrap.dedent(program))

    def start(self, stack: ExitStack, num_ranks: int) -> Ranks:
        argv = (sys.executable, str(self.folder / "program.py"), str(self.folder))
        commands = [RankCommand(rank, 0, argv, {"RANK": str(rank)}) for rank in range(num_ranks)]
        logs = [stack.enter_context(self.log(rank).open("ab")) for rank in range(num_ranks)]
        return Ranks(commands, logs, timeouts=self.timeouts, terminal=self.terminal)

    def to_the_end(self, num_ranks: int, *numbers: signal.Signals) -> Outcome:
        """Supervises the ranks until they end. When all ranks are ready, sends the signals `numbers` to this process."""
        with ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            ranks = self.start(stack, num_ranks)
            marks = [self.folder / f"ready.{rank}" for rank in range(num_ranks if numbers else 0)]
            wait_until(lambda: all(mark.exists() for mark in marks), "ranks are ready")
            for number in numbers:
                os.kill(os.getpid(), number)
            return ranks.supervise(signals)

    def log(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.log"


def test_all_done_is_0_and_each_rank_has_its_log(tmp_path: Path) -> None:
    run = Run(tmp_path, "print('out', rank, flush=True); print('err', rank, file=sys.stderr)")
    assert run.to_the_end(3) == Outcome((0, 0, 0))
    assert run.log(0).read_text() == "err 0\n"  # rank 0's standard output goes to the terminal
    assert [run.log(rank).read_text() for rank in (1, 2)] == ["out 1\nerr 1\n", "out 2\nerr 2\n"]
    assert run.terminal.getvalue() == b"err 0\n"


def test_the_first_failure_is_the_cause_and_all_other_ranks_are_killed(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2): signal.signal(s, signal.SIG_IGN)
        mark("pid", str(os.getpid()))
        if rank == 2:
            wait_for("pid.0"); wait_for("pid.1"); wait_for("pid.3")
            raise ValueError("the cause")
        if rank == 1:
            wait_for_end(2); time.sleep(1)
            raise ConnectionError("the consequence")
        time.sleep(100)
        """,
        ShutdownTimeouts(stop=60.0, peers=3.0, kill=0.5),
    )
    outcome = run.to_the_end(4)
    assert outcome == Outcome((-9, 1, 1, -9), (2, 1))
    assert outcome.exit_code(outcome.cause()) == 1
    assert "ValueError: the cause" in run.log(2).read_text()
    assert not any(is_alive(int((tmp_path / f"pid.{rank}").read_text())) for rank in range(4))


def test_consequences_on_rank_0_are_not_shown_before_the_cause(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        """
        if rank == 1:
            wait_for("ready.0"); sys.exit(65)
        def consequence(number, frame):
            print("the consequence", file=sys.stderr, flush=True); time.sleep(1.5); sys.exit(1)
        signal.signal(signal.SIGTERM, consequence)
        mark("ready"); time.sleep(100)
        """,
    )
    outcome = run.to_the_end(2)
    assert (outcome.codes, outcome.failed, outcome.exit_code(1)) == ((1, 65), (1, 0), 65)
    assert run.terminal.getvalue() == b""
    assert run.log(0).read_text() == "the consequence\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_is_forwarded_once(tmp_path: Path, number: signal.Signals) -> None:
    times = 1 if number == signal.SIGINT else 2  # a second Ctrl-C kills the ranks
    outcome = Run(tmp_path, STOPS).to_the_end(2, *[number] * times)
    assert outcome == Outcome((75, 75), stop=number)
    assert outcome.exit_code(None) == 75
    assert [(tmp_path / f"asked.{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_a_full_disk_does_not_block_a_rank() -> None:
    """Writes to the rank's log fail. Its pipe must still be read, because a full pipe would block the rank, and the
    terminal must show everything."""

    class Full(BytesIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    reading, writing = os.pipe()
    terminal = BytesIO()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as rank:
        shown = DelayedStderr(source, Full(), terminal)
        rank.write(b"one\n")
        wait_until(lambda: len(shown._held) > 0, "the first line is read")
        rank.write(b"two\n")
        rank.close()
        shown.finish(show=True)
    assert terminal.getvalue() == b"one\ntwo\n"


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    outcome = Run(tmp_path, REFUSES + "mark('ready'); time.sleep(100)").to_the_end(2, signal.SIGINT, signal.SIGINT)
    assert (outcome.codes, outcome.aborted, outcome.exit_code(None)) == ((-9, -9), True, ABORTED)


def test_replaced_signal_handlers_can_be_renewed_and_the_original_ones_are_restored() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signals.renew()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: signals.first is signal.SIGTERM, "the signal was noted")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(PRELUDE + REFUSES + "mark('pid', str(os.getpid())); time.sleep(100)")
    launcher = f"""
import sys
from launchers.command import RankCommand
from launchers.rank_tracker import ShutdownTimeouts
from launchers.supervise import DelayedStderr, Ranks
from moe_dist.runtime.signals import StopSignals
argv = (sys.executable, {str(tmp_path / "rank.py")!r}, {str(tmp_path)!r})
logs = [open(f"{tmp_path}/log{{rank}}", "ab") for rank in range(2)]
with StopSignals() as signals:
    commands = [RankCommand(rank, 0, argv, {{"RANK": str(rank)}}) for rank in range(2)]
    Ranks(commands, logs, timeouts=ShutdownTimeouts(9)).supervise(signals)
"""
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=Path(__file__).parents[3])
    try:
        wait_until(lambda: all((tmp_path / f"pid.{rank}").exists() for rank in range(2)), "ranks have started")
        pids = [int((tmp_path / f"pid.{rank}").read_text()) for rank in range(2)]
        assert all(is_alive(pid) for pid in pids)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "ranks have ended")
