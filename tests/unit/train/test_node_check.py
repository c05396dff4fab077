"""Nodes are checked at the start of a job, before the process group exists."""

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.node.check_result import CheckResult
from moe_dist.runtime.node.facts import NodeFacts, look
from moe_dist.train.start import node_check as start
from moe_dist.train.start.node_check import check_at_start
from tests.support.tiny import tiny_config


def rank_env(rank: int, *, world_size: int = 4) -> RankEnv:
    return RankEnv(rank, world_size, rank % 2, 2, "published", 0, "job.1", launched=True)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    return tiny_config(tiny_data, tmp_path / "runs")


def folder_of(config: Config) -> Path:
    return Path(config.run.root) / config.run.name


def all_ranks(config: Config, variables: dict[str, str] | None = None) -> list[list[CheckResult] | BaseException]:
    """Runs the check on four ranks of two nodes. Returns the results, or the error, of each rank."""
    found: dict[int, list[CheckResult] | BaseException] = {}

    def run(rank: int) -> None:
        try:
            env = {"SLURMD_NODENAME": f"node{rank // 2}", **(variables or {})}
            found[rank] = check_at_start(config, rank_env(rank), folder_of(config), variables=env)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(4)]


def change_on(node: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes a fact of one node."""

    def looked(*arguments: Any, **options: Any) -> NodeFacts:
        facts = look(*arguments, **options)
        return replace(facts, **changes) if facts.node == node else facts

    monkeypatch.setattr(start, "look", looked)


def test_nodes_that_agree_go_on(config: Config) -> None:
    first, *others = all_ranks(config)
    assert isinstance(first, list)
    assert any("all 2 nodes" in result.text for result in first)
    assert isinstance(others[1], list), "the first rank of the other node looks at its own"
    assert others[0] == others[2] == []
    assert not [path.name for path in folder_of(config).iterdir()], "nothing is left"


def test_another_version_on_one_node_ends_rank_0_naming_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    change_on("node1", {"versions": {"python": "3.11.7", "torch": "2.11.0"}}, monkeypatch)
    first, *_ = all_ranks(config)
    assert isinstance(first, ResourceError)
    assert "2.11.0 on node1" in str(first)


def test_a_node_that_cannot_write_ends_by_itself(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    change_on("node1", {"folder_problem": "/runs: Read-only file system"}, monkeypatch)
    found = all_ranks(config)
    assert isinstance(found[2], ConfigError)
    assert "cannot be written on node1" in str(found[2])


def test_the_rendezvous_host_must_resolve(config: Config) -> None:
    found = all_ranks(config, {"MASTER_ADDR": "nowhere.invalid"})
    assert [type(each) for each in (found[0], found[2])] == [ConfigError, ConfigError]
    assert "'nowhere.invalid' does not resolve" in str(found[2])


@pytest.mark.parametrize("seconds", [-60.0, 60.0])
def test_a_clock_that_is_off_is_told(
    seconds: float, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_on("node1", {"clock": time.time() + seconds}, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert all(isinstance(each, list) for each in all_ranks(config))
    (record,) = caplog.records
    assert record.getMessage().startswith("clocks: node1: off by ")


def test_a_late_node_is_not_waited_for_long(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_at_start(config, rank_env(0), folder_of(config), wait_seconds=0.3)
    assert "the nodes of 2 ranks have not reported their facts within 0.3 s" in caplog.text


def test_a_job_on_one_node_waits_for_nobody_and_writes_nothing(config: Config) -> None:
    found = check_at_start(config, rank_env(0, world_size=2), folder_of(config), wait_seconds=600.0)
    assert json.dumps([result.check for result in found if result.is_problem]) == "[]"
    assert not list(folder_of(config).iterdir())
