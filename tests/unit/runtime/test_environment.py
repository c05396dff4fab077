"""Rank and rendezvous from environment variables."""

import pytest

from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import ALONE, RankEnv

FULL = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MOE_DIST_INIT_METHOD": "file:///shared/store",
    "MOE_DIST_ATTEMPT": "2",
    "MOE_DIST_ATTEMPT_ID": "job-7.2",
    "MOE_DIST_GRACE_SECONDS": "90",
}


def test_all_that_a_launcher_sets_is_read() -> None:
    expected = RankEnv(5, 8, 1, 4, "file:///shared/store", 2, "job-7.2", launched=True, grace_seconds=90.0)
    assert RankEnv.from_environment(FULL) == expected


def test_a_process_without_a_launcher_is_alone_and_has_an_attempt_of_its_own() -> None:
    first, second = RankEnv.from_environment({}), RankEnv.from_environment({})
    assert (first.rank, first.world_size, first.init_method, first.attempt, first.launched) == (0, 1, ALONE, 0, False)
    assert first.attempt_id != second.attempt_id


def test_torchrun_is_understood() -> None:
    env = {k: v for k, v in FULL.items() if not k.startswith("MOE_DIST")}
    env |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "3"}
    read = RankEnv.from_environment(env)
    assert (read.init_method, read.attempt, read.launched) == ("env://", 3, False)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"RANK": "8"}, ["RANK=5", "RANK=8"][1:]),
        ({"LOCAL_RANK": "4"}, ["LOCAL_RANK=4: must be below the number of ranks, 4"]),
        ({"WORLD_SIZE": "three"}, ["WORLD_SIZE='three': must be a whole number"]),
        ({"WORLD_SIZE": None, "LOCAL_RANK": None}, ["WORLD_SIZE=None", "LOCAL_RANK=None"]),
        ({"LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE=9 is larger than WORLD_SIZE=8"]),
        ({"MOE_DIST_INIT_METHOD": None}, ["no rendezvous for the ranks"]),
        ({"MOE_DIST_ATTEMPT_ID": "../x"}, ["MOE_DIST_ATTEMPT_ID='../x'"]),
        ({"MOE_DIST_GRACE_SECONDS": "soon"}, ["MOE_DIST_GRACE_SECONDS='soon'"]),
        ({"MOE_DIST_GRACE_SECONDS": "-1"}, ["MOE_DIST_GRACE_SECONDS='-1'"]),
    ],
)
def test_problems_are_named_all_at_once(changes: dict[str, str | None], problems: list[str]) -> None:
    env = {k: v for k, v in {**FULL, **changes}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        RankEnv.from_environment(env)
    assert [problem for problem in problems if problem not in str(caught.value)] == []
