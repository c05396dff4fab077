"""Runs a rank's actor without Ray, with a real supervisor and a small program."""

import os
import signal
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers.ray import rank as ray_rank
from launchers.ray.rank import RankActor, WorkerInfo
from moe_dist.runtime.environment import RAY_METRICS
from tests.support.messages import refused
from tests.support.processes import wait_until

PRELUDE = """
import os, signal, sys, time
def ready(path=sys.argv[1]):
    with open(path + ".new", "w") as file: file.write(str(os.getpid()))
    os.rename(path + ".new", path)
"""


def started(folder: Path, program: str, *, shown: bool = False) -> RankActor:
    (folder / "rank.py").write_text(PRELUDE + textwrap.dedent(program))
    actor = RankActor(2)
    argv = ["", str(folder / "rank.py"), str(folder / "ready")]  # the actor's own interpreter
    actor.start(argv, {"MOE_DIST_TEST_WORD": "word"}, str(folder / "rank.log"), shown)
    return actor


def rank_pid(folder: Path) -> int:
    wait_until((folder / "ready").exists)
    return int((folder / "ready").read_text())


def test_the_rank_gets_its_variables_and_the_actor_its_exit_code(tmp_path: Path) -> None:
    actor = started(tmp_path, "print(os.environ['MOE_DIST_TEST_WORD'], sys.executable); sys.exit(65)")
    assert actor.wait() == (65, "")
    assert (tmp_path / "rank.log").read_text() == f"word {sys.executable}\n"
    assert repr(actor) == "rank 2"


def test_signals_and_freeze_checks_work_while_the_actor_waits(tmp_path: Path) -> None:
    actor = started(tmp_path, "signal.signal(15, lambda *_: sys.exit(75)); ready(); time.sleep(600)")
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(actor.wait()[0]))
    waiting.start()
    pid = rank_pid(tmp_path)
    assert not actor.frozen()
    os.kill(pid, signal.SIGSTOP)
    wait_until(actor.frozen)
    os.kill(pid, signal.SIGCONT)
    actor.send(signal.SIGTERM)
    waiting.join()
    assert codes == [75]
    assert not actor.frozen()
    actor.send(signal.SIGTERM)  # the rank has ended, so nothing happens


def test_a_killed_supervisor_counts_as_a_killed_rank(tmp_path: Path) -> None:
    actor = started(tmp_path, "ready(); time.sleep(600)")
    supervisor = int(Path(f"/proc/{rank_pid(tmp_path)}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    assert actor.wait()[0] == -signal.SIGKILL


def test_a_rank_that_cannot_be_started_is_an_error_that_names_it(tmp_path: Path) -> None:
    with refused(RuntimeError):
        RankActor(0).start(["/no/such/python"], {}, str(tmp_path / "rank.log"), False)


def test_missing_data_are_named_at_once_and_a_new_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_node_id=lambda: "n1", get_node_labels=dict, get_accelerator_ids=lambda: {"GPU": ["3"]})
    monkeypatch.setattr(ray_rank.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray_rank.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    began, log, actor = time.monotonic(), tmp_path / "log", RankActor(0)
    assert actor.worker([str(log)], str(tmp_path / "data")).missing == (str(tmp_path / "data"),)
    assert time.monotonic() - began < 10.0
    threading.Timer(0.5, log.touch).start()  # as if an NFS client saw the driver's folder late
    assert actor.worker([str(log)], str(tmp_path)) == WorkerInfo("n1", "10.0.0.1", {}, ("3",))
    monkeypatch.setattr(ray_rank, "SEEN_SECONDS", 0.0)
    assert actor.worker([str(tmp_path / "none")], str(tmp_path)).missing == (str(tmp_path / "none"),)


def test_numbers_of_rank_0_reach_rays_gauges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: dict[str, tuple[str, dict[str, str], float]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.description, self.tag_keys = name, description, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.tag_keys
            set_to[self.name] = (self.description, tags, value)

    monkeypatch.setattr(ray_rank, "Gauge", Gauge)
    send = f"""
    import json, socket
    loss = ["moe_dist_loss", "Nats.", {{"run": "x", "term": "total"}}, 2.5]
    samples = [loss, ["moe_dist_step", "Steps.", {{"run": "x"}}, 7]]
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.sendto(json.dumps(samples).encode(), os.environ[{RAY_METRICS!r}])
    """
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    actor = started(tmp_path, send, shown=True)
    assert actor.wait()[0] == 0
    assert list(temporary.iterdir()) == [], "the folder of the socket is deleted at the end of the rank"
    wait_until(lambda: len(set_to) == 2)
    assert set_to["moe_dist_loss"] == ("Nats.", {"run": "x", "term": "total"}, 2.5)
    assert set_to["moe_dist_step"] == ("Steps.", {"run": "x"}, 7)
