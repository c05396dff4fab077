"""All nodes of a probe connect to the first node."""

import json
import threading
from pathlib import Path

import pytest

from launchers.doctor import on_node
from launchers.doctor.on_node import connect, listen
from moe_dist.runtime.rendezvous import HOST_VARIABLE

Seen = tuple[dict[str, str], str]
LOCAL = {HOST_VARIABLE: "127.0.0.1"}


def meet(path: Path, nodes: int, variables: dict[str, str]) -> tuple[dict[str, str], list[Seen]]:
    """Returns what the first node saw, and what each other node saw."""
    seen: list[Seen] = []
    others = [threading.Thread(target=lambda: seen.append(connect(path))) for _ in range(nodes - 1)]
    for other in others:
        other.start()
    first = listen(path, nodes, variables)
    for other in others:
        other.join()
    return first, seen


def test_all_nodes_connect(tmp_path: Path) -> None:
    assert meet(tmp_path / "meeting", 3, LOCAL) == ({}, [({}, "")] * 2)


def test_a_name_that_does_not_resolve_is_told_by_each(tmp_path: Path) -> None:
    first, ((second, error),) = meet(tmp_path / "meeting", 2, {HOST_VARIABLE: "nowhere.invalid"})
    assert (list(first), list(second), error) == (["nowhere.invalid"], ["nowhere.invalid"], "")


def test_a_first_node_that_nobody_reaches(tmp_path: Path) -> None:
    (tmp_path / "meeting").write_text(json.dumps(["localhost", "127.0.0.1", 1]))
    assert connect(tmp_path / "meeting") == ({}, "Connection refused")


def test_waiting_for_the_address_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_node, "WAIT_SECONDS", 0.2)
    assert connect(tmp_path / "meeting") == ({}, "")
    assert listen(tmp_path / "meeting", 2, LOCAL) == {}
