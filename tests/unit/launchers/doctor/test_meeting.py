"""The nodes of a probe meet at the first of them."""

import json
import threading
from pathlib import Path

import pytest

from launchers.doctor import on_node
from launchers.doctor.on_node import Reachability, connect, listen
from moe_dist.runtime.rendezvous import HOST_VARIABLE

LOCAL = {HOST_VARIABLE: "127.0.0.1"}


def meet(path: Path, nodes: int, variables: dict[str, str]) -> list[Reachability]:
    """What each node saw, the first one last."""
    seen: list[Reachability] = []
    others = [threading.Thread(target=lambda: seen.append(connect(path))) for _ in range(nodes - 1)]
    for other in others:
        other.start()
    first = listen(path, nodes, variables)
    for other in others:
        other.join()
    return [*seen, first]


def test_all_nodes_connect(tmp_path: Path) -> None:
    assert meet(tmp_path / "meeting", 3, LOCAL) == [Reachability({}), Reachability({}), Reachability({})]


def test_a_name_that_does_not_resolve_is_told_by_each(tmp_path: Path) -> None:
    for seen in meet(tmp_path / "meeting", 2, {HOST_VARIABLE: "nowhere.invalid"}):
        assert list(seen.unresolved) == ["nowhere.invalid"]
        assert seen.unreachable == ""


def test_a_first_node_that_nobody_reaches(tmp_path: Path) -> None:
    (tmp_path / "meeting").write_text(json.dumps(["localhost", "127.0.0.1", 1]))
    assert connect(tmp_path / "meeting") == Reachability({}, "Connection refused")


def test_waiting_for_the_address_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_node, "WAIT_SECONDS", 0.2)
    assert connect(tmp_path / "meeting") == Reachability({})
    assert listen(tmp_path / "meeting", 2, LOCAL) == Reachability({})
