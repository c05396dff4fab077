"""Ranks find each other under any launcher, also after earlier starts, and refuse ranks of a different start. Each rank
is a thread."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moe_dist.errors import ConfigError, StoppedError
from moe_dist.parallel.meeting import Mailbox, meeting
from moe_dist.runtime import rendezvous
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.rendezvous import StartError, StartWait
from moe_dist.runtime.run_folder import RunFolder
from tests.support.messages import refused
from tests.support.tiny import tiny_config

FIRST = RankEnv(0, 3, 0, 1, "env://", attempt=0, attempt_id="of-rank-0")
SECOND = replace(FIRST, rank=1, attempt=2, attempt_id="of-rank-1")
THIRD = replace(FIRST, rank=2, attempt=1, attempt_id="of-rank-2")
Start = Callable[..., Future[str]]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent, which outlives every start."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=600), wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a rank in a thread. The rank returns its attempt_id when all ranks of its start have seen its key."""

    def run(env: RankEnv, seconds: float, folder: Path, stopped: Callable[[], bool]) -> str:
        with meeting(env, folder, StartWait(env.rank, seconds, stopped=stopped)) as (store, attempt_id):
            assert store.add("ranks of this start", 1) <= env.world_size
            store.set(str(env.rank), attempt_id)
            store.wait([str(rank) for rank in range(env.world_size)], timedelta(seconds=600))
            store.set(f"{env.rank} has seen all", "")
            if env.rank == 0:  # without a launcher's store, rank 0's store ends with this thread
                store.wait([f"{rank} has seen all" for rank in range(env.world_size)], timedelta(seconds=600))
        return attempt_id

    with ThreadPoolExecutor(8) as pool:
        yield lambda env, seconds=600.0, folder=tmp_path, stopped=lambda: False: pool.submit(
            run, env, seconds, folder, stopped
        )


def test_ranks_of_other_nodes_wait_while_rank_0_waits_for_the_lease(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another attempt writes to the run for minutes (by the clock of the waiting ranks), so rank 0 waits for the lease."""
    now = [0.0]

    def sleep(_: float) -> None:
        now[0] = min(now[0] + 10.0, 310.0)
        time.sleep(0.01)

    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setenv(rendezvous.HOST_VARIABLE, "127.0.0.1")
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    other = folder.open(config, RankEnv(0, 1, 0, 1, PUBLISHED, 0, "other"))
    zero = RankEnv(0, 2, 0, 1, PUBLISHED, 0, "of-both")

    def rank_0() -> str:
        Attempt(zero).open(config)  # a rank opens the run before the rendezvous
        return start(zero, folder=folder.path).result(600)

    with ThreadPoolExecutor(1) as pool:
        later = start(replace(zero, rank=1), 1800.0, folder=folder.path)
        first = pool.submit(rank_0)
        while now[0] < 300.0:
            assert not later.done()
            time.sleep(0.01)
        other.release()
        assert [each.result(600) for each in (first, later)] == ["of-both", "of-both"]
    assert any("waiting for rank 0, whose address must come" in record.getMessage() for record in caplog.records)


def test_all_ranks_take_the_name_of_rank_0_though_each_drew_its_own(start: Start, agent: TCPStore, tmp_path: Path) -> None:
    """A start and two restarts use the store of the same agent, in which old keys remain."""
    for name in ("first", "second", "third"):
        ranks = [start(env) for env in (SECOND, THIRD, replace(FIRST, attempt_id=name))]
        assert [rank.result(600) for rank in ranks] == [name] * 3
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_a_process_of_an_earlier_start_delays_no_later_one(start: Start, agent: TCPStore) -> None:
    hellos = Mailbox(PrefixStore("moe_dist/hello", agent))
    hellos.post("a token whose process is gone")
    PrefixStore("moe_dist/hello", agent).add("count", 1)  # this rank was killed before it wrote its token
    ranks = [start(env) for env in (FIRST, SECOND, THIRD)]
    assert {rank.result(600) for rank in ranks} == {"of-rank-0"}


def test_ranks_far_apart_meet_and_rank_0_says_who_is_missing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The launcher has no store, so rank 0 publishes its address (`published`), or owns the store at MASTER_ADDR
    (`owned`)."""
    monkeypatch.setattr(rendezvous, "SOON_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.2)
    monkeypatch.setattr(rendezvous, "SHARED_SECONDS", 0.0)  # no rank waits for late ranks
    monkeypatch.setenv("MOE_DIST_RENDEZVOUS_HOST", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)  # unset under mpirun, srun and Kubernetes
    owned = [FIRST, SECOND, THIRD]
    published = [replace(each, init_method=PUBLISHED, attempt_id="job.1") for each in owned]
    for first, second, third in (published, published[::-1], owned, owned[::-1]):
        caplog.clear()
        ranks = [start(first), start(second)]
        time.sleep(1.0)
        assert not any(rank.done() for rank in ranks)
        place = (
            f"address must come into {tmp_path}/rendezvous.json"
            if third in published
            else f"store must be at 127.0.0.1:{port}"
        )
        missing = "rank 2 since" if third.rank == 2 else f"rank 0, whose {place}"
        assert [line for line in caplog.messages if line.startswith(f"waiting for {missing}")]
        ranks.append(start(third))
        assert {rank.result(600) for rank in ranks} == {"job.1" if third in published else "of-rank-0"}


@contextmanager
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(rendezvous, "SHARED_SECONDS", 0.2)
        yield


@pytest.mark.parametrize(
    ("change", "elsewhere", "words"),
    [
        ({"world_size": 6}, "", "WORLD_SIZE=6 for rank 2 on "),
        ({"launched": True, "attempt_id": "job-6"}, "", "MOE_DIST_ATTEMPT_ID='job-6' for rank 2 on "),
        ({}, "other/{name}", "on this node {folder} does not exist; run.root must be a folder that all nodes share"),
    ],
)
def test_all_ranks_end_at_once_with_what_differs_on_one(
    start: Start,
    agent: TCPStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Mapping[str, object],
    elsewhere: str,
    words: str,
) -> None:
    folder = tmp_path / elsewhere.format(name=tmp_path.name)
    with quick(monkeypatch):
        ranks = [start(FIRST), start(SECOND), start(replace(THIRD, **change), folder=folder)]  # type: ignore[arg-type]
        errors = [rank.exception(600) for rank in ranks]
    assert {type(error) for error in errors} == {ConfigError}
    assert {words.format(folder=folder) in str(error) for error in errors} == {True}
    assert len({str(error) for error in errors}) == 1


def test_a_rank_that_never_comes_ends_all_by_name(start: Start, agent: TCPStore) -> None:
    errors = [rank.exception(600) for rank in (start(FIRST, 0.5), start(SECOND))]
    assert {type(error) for error in errors} == {StartError}
    assert {str(error).partition(";")[0] for error in errors} == {"rank 0 waited 0.5 s for rank 2"}


def test_a_stop_while_rank_0_waits_stops_all_with_75(start: Start, agent: TCPStore) -> None:
    stop = threading.Event()
    ranks = [start(FIRST, stopped=stop.is_set), start(SECOND)]
    time.sleep(0.5)
    stop.set()
    assert {type(rank.exception(600)) for rank in ranks} == {StoppedError}


def test_a_stop_of_one_rank_before_it_meets_rank_0_stops_all_with_75(start: Start, agent: TCPStore) -> None:
    """All ranks must stop. Otherwise ranks 0 and 2 would wait for the stopped rank until start_seconds are over."""
    ranks = [start(SECOND, stopped=lambda: True)]
    time.sleep(0.5)
    ranks += [start(FIRST), start(THIRD)]
    assert {str(rank.exception(600)).partition(";")[0] for rank in ranks} == {
        "stopped on request while rank 1 waited for rank 0"
    }
    assert {type(rank.exception(600)) for rank in ranks} == {StoppedError}


def test_a_name_without_address_or_a_wrong_port_is_said(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    late = start(SECOND, 0.1).exception(600)
    assert isinstance(late, StartError)
    assert "rank 0, whose store must be at no.such.host.invalid:29500 (MASTER_ADDR='no.such.host.invalid' does not" in str(
        late
    )
    assert "MASTER_ADDR='no.such.host.invalid' does not resolve on" in str(start(FIRST, 0.1).exception(600)), "also rank 0"
    monkeypatch.setenv("MASTER_PORT", "http")
    wrong = start(SECOND).exception(600)
    assert isinstance(wrong, ConfigError)
    assert "no.such.host.invalid:http has no port number" in str(wrong)


def test_a_silent_listener_on_the_port_is_named_within_ten_seconds(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch alone would wait without limit for the listener's answer."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        monkeypatch.setenv("MASTER_PORT", str(foreign.getsockname()[1]))
        began = time.monotonic()
        waiting = start(SECOND, 12.0)
        while not (said := [line for line in caplog.messages if "another program uses MASTER_PORT" in line]):
            assert not waiting.done()
            time.sleep(0.05)
        assert "rank 0, whose store must be at 127.0.0.1:" in said[0]
        assert time.monotonic() - began < 10.0
        assert isinstance(waiting.exception(600), StartError)
        assert "cannot open a store at 127.0.0.1" in str(start(FIRST, 12.0).exception(600))


def test_a_second_run_on_the_port_is_told_the_first_and_does_not_disturb_it(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night, day, words = tmp_path / "night", tmp_path / "day", "MASTER_PORT: the run 'night', whose rank 0 is on "
    night.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    first = [start(FIRST, folder=night), start(SECOND, folder=night)]  # rank 0 owns the store, and waits for rank 2
    time.sleep(1.0)
    with refused(ConfigError, words, golden=False):
        start(SECOND, folder=day).result(600)
    assert not any(rank.done() for rank in first)
    first.append(start(THIRD, folder=night))
    assert {rank.result(600) for rank in first} == {"of-rank-0"}

    taken = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=600), wait_for_workers=False)  # another run's store
    PrefixStore("moe_dist", taken).set("run", '["night", "node1"]')
    monkeypatch.setenv("MASTER_PORT", str(taken.port))
    with refused(ConfigError, words, golden=False):
        start(FIRST, folder=day).result(600)
