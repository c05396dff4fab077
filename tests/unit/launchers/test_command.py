"""From a plan to the argv and environment of each rank."""

from pathlib import Path

import pytest

from launchers.command import Plan, file_rendezvous, fit_world_size, rank_commands, tcp_rendezvous, threads_per_rank
from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import RankEnv
from tests.support.tiny import tiny_config


def plan(**changes: object) -> Plan:
    values: dict[str, object] = {
        "config": Path("configs/x.yaml"),
        "overrides": ("train.steps=3",),
        "ranks_per_node": (2, 1),
        "rendezvous": tcp_rendezvous("node1", 2345),
        "attempt": 4,
        "attempt_id": "job.4",
    }
    return Plan(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_ranks_are_counted_node_by_node() -> None:
    commands = rank_commands(plan())
    assert [(c.rank, c.node, c.env["RANK"], c.env["LOCAL_RANK"], c.env["LOCAL_WORLD_SIZE"]) for c in commands] == [
        (0, 0, "0", "0", "2"),
        (1, 0, "1", "1", "2"),
        (2, 1, "2", "0", "1"),
    ]
    assert {c.env["WORLD_SIZE"] for c in commands} == {"3"}
    assert {c.argv[1:] for c in commands} == {("-m", "moe_dist.train", "configs/x.yaml", "train.steps=3")}


def test_a_rank_reads_what_the_plan_says() -> None:
    command = rank_commands(plan(grace_seconds=12.5))[2]
    env = RankEnv.from_environment(command.env)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (2, 3, 0, 1)
    assert (env.init_method, env.attempt, env.attempt_id) == ("env://", 4, "job.4")
    assert (env.launched, env.grace_seconds) == (True, 12.5)


def test_a_file_rendezvous_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = rank_commands(plan(rendezvous=file_rendezvous(Path("store"))))[0]
    assert RankEnv.from_environment(command.env).init_method == f"file://{tmp_path}/store"


def test_only_local_ranks_are_kept_on_the_loopback_and_cuda_is_left_alone() -> None:
    local = rank_commands(plan(loopback=True, threads=2))[0].env
    spread = rank_commands(plan())[0].env
    assert (local["GLOO_SOCKET_IFNAME"], local["OMP_NUM_THREADS"]) == ("lo", "2")
    assert not {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"} & spread.keys()
    assert not [name for name in local if "CUDA" in name or "NCCL" in name]


@pytest.mark.parametrize(("asked", "overrides"), [(None, ()), (4, ()), (6, ("parallel.edp=3",))])
def test_a_number_of_ranks_stretches_edp(tmp_path: Path, asked: int | None, overrides: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path, tmp_path, {"parallel.ep": 2, "parallel.edp": 2})
    assert fit_world_size(config, asked) == overrides


@pytest.mark.parametrize("asked", [0, 3])
def test_ranks_that_make_no_whole_groups_are_refused(tmp_path: Path, asked: int) -> None:
    with pytest.raises(ConfigError, match=rf"{asked} ranks: must be a positive multiple of parallel\.ep=2"):
        fit_world_size(tiny_config(tmp_path, tmp_path), asked)


def test_threads_are_an_even_share_unless_somebody_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_per_rank(ranks, {}) for ranks in (1, 3, 8, 20)] == [8, 2, 1, 1]
    assert threads_per_rank(2, {"OMP_NUM_THREADS": "5"}) is None
