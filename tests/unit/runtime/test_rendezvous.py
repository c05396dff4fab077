"""Rank 0 publishes its address in a file. Other ranks find it, and refuse files that somebody else could have written."""

import json
import os
import socket
import stat
import threading
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from moe_dist.errors import ConfigError, ResourceError, StoppedError
from moe_dist.runtime import rendezvous
from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.rendezvous import StartError, StartWait, address_file, find, listening_host, publish, withdraw
from tests.support.messages import refused

FIRST = RankEnv(0, 4, 0, 2, PUBLISHED, attempt=1, attempt_id="job.1")
OTHER = replace(FIRST, rank=3)


def test_other_ranks_find_the_address_that_rank_0_published(tmp_path: Path) -> None:
    path = address_file(tmp_path)
    before = os.umask(0)
    try:
        address, listener = publish(path, FIRST, "127.0.0.1")
    finally:
        os.umask(before)
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert find(path, OTHER, StartWait(3, 0.0)) == address
        assert len(address.secret) == 32
        with socket.create_connection((address.host, address.port), timeout=10):  # the server already listens
            pass
    withdraw(path, address)
    withdraw(path, address)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_attempt_left_is_never_taken(tmp_path: Path) -> None:
    path = address_file(tmp_path)
    address, listener = publish(path, replace(FIRST, attempt_id="job.0"), "127.0.0.1")
    listener.close()
    with pytest.raises(StartError, match=r"rank 3 waited 0\.3 s .*attempt job\.1.*is of attempt job\.0"):
        find(path, OTHER, StartWait(3, 0.3))
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(find(path, OTHER, StartWait(3, 600.0))))
    waiting.start()
    new, listener = publish(path, FIRST, "127.0.0.1")
    waiting.join(600)
    listener.close()
    assert found == [new]
    withdraw(path, address)  # a late withdrawal keeps the new attempt's file
    assert path.exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": "evil"}', "\0"])
def test_half_a_file_is_waited_for(tmp_path: Path, content: str) -> None:
    path = address_file(tmp_path)
    path.write_text(content)
    path.chmod(0o600)
    with refused(StartError):
        find(path, OTHER, StartWait(3, 0.0))


def test_a_file_that_others_could_write_a_link_or_a_fifo_is_refused(tmp_path: Path) -> None:
    path = address_file(tmp_path)
    address, listener = publish(path, FIRST, "127.0.0.1")
    listener.close()
    path.chmod(0o640)
    with refused(ConfigError):
        find(path, OTHER, StartWait(3, 0.0))
    path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps(asdict(address)))
    elsewhere.chmod(0o600)
    path.symlink_to(elsewhere)
    with refused(ConfigError):
        find(path, OTHER, StartWait(3, 0.0))
    path.unlink()
    os.mkfifo(path, 0o600)  # opening it would wait for a writer
    with refused(ConfigError):
        find(path, OTHER, StartWait(3, 0.0))


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = address_file(tmp_path)
    _, listener = publish(path, FIRST, "127.0.0.1")
    listener.close()
    # User 4242 owns the folder, but not the file.
    real = Path.stat
    monkeypatch.setattr(os, "geteuid", lambda: 4242)

    def owned_by_us(self: Path, **options: bool) -> os.stat_result:
        values = list(real(self, **options))
        values[4] = 4242 if self == tmp_path else values[4]
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", owned_by_us)
    with refused(ConfigError, "rendezvous.json"):
        find(path, OTHER, StartWait(3, 0.0))


def test_the_host_is_one_that_the_peers_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listening_host(replace(FIRST, local_world_size=4), {}) == "127.0.0.1"
    assert listening_host(FIRST, {"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    assert listening_host(FIRST, {"MOE_DIST_RENDEZVOUS_HOST": "127.0.0.3", "GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.3"
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("10.1.2.3", 0))])
    assert listening_host(FIRST, {"GLOO_SOCKET_IFNAME": "ib0"}) == "10.1.2.3"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))])
    with refused(ConfigError):
        listening_host(FIRST, {})


def test_an_address_of_another_node_is_reported(tmp_path: Path) -> None:
    with refused(ResourceError):
        publish(address_file(tmp_path), FIRST, "203.0.113.7")
    with refused(ConfigError, "MOE_DIST_RENDEZVOUS_HOST=", golden=False):
        listening_host(FIRST, {"MOE_DIST_RENDEZVOUS_HOST": "no.such.host.invalid"})
    with refused(ConfigError, "set MOE_DIST_RENDEZVOUS_HOST to an IPv4 address of rank 0's node", golden=False):
        listening_host(FIRST, {"MOE_DIST_RENDEZVOUS_HOST": "::1"})


def test_a_wait_names_the_missing_until_it_ends_by_time_or_by_a_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 10.0))
    wait = StartWait(0, 100.0)
    with refused(StartError):
        while True:
            wait.pause(rendezvous.ranks_text({3, 2}))
    assert now == [1100.0]
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for ranks 2, 3 since {seconds} s, for at most 100 s" for seconds in (10, 40, 70)
    ]
    with refused(StoppedError):
        StartWait(0, 100.0, stopped=lambda: True).pause(rendezvous.ranks_text({1}))
    for grace, end in ((300.0, 20.0), (16.0, 10.0)):  # ends at the first poll after 15 s, or after half of the grace period
        now[0], wait = 0.0, StartWait(1, 100.0, stopped=lambda: True, grace_seconds=grace)
        with refused(StoppedError, "rank 1 waited for rank 0", golden=False):
            while True:
                wait.pause("rank 0")
        assert now == [end]
    assert rendezvous.ranks_text(range(1, 65)) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 56 more"
