"""Ranks on several nodes check that they see rank 0's folder."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.rendezvous import shared_with_rank_0

RANK_0 = RankEnv(0, 2, 0, 1, "published", 0, "job-7")
RANK_1 = replace(RANK_0, rank=1)


def test_a_rank_that_sees_the_file_goes_on_and_nothing_is_left(tmp_path: Path) -> None:
    seen = threading.Event()

    def rank_1() -> None:
        with shared_with_rank_0(tmp_path, RANK_1, wait_seconds=600.0):
            seen.set()

    other = threading.Thread(target=rank_1)
    other.start()
    with shared_with_rank_0(tmp_path, RANK_0):
        assert seen.wait(600)
    other.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("attempt_id", "folder", "words"),
    [
        ("job-6", ".", "on this node it is a different folder, or rank 0 has not started"),
        ("job-7", "elsewhere", "on this node it does not exist"),
    ],
)
def test_another_folder_ends_with_78(tmp_path: Path, attempt_id: str, folder: str, words: str) -> None:
    stranger = replace(RANK_1, attempt_id=attempt_id)
    with (
        shared_with_rank_0(tmp_path, RANK_0),
        pytest.raises(ConfigError, match=f"rank 1 waited .*{words}; run.root must be") as raised,
        shared_with_rank_0(tmp_path / folder, stranger, wait_seconds=0.2),
    ):
        pass
    assert raised.value.exit_code == 78


def test_ranks_on_one_node_skip_the_check(tmp_path: Path) -> None:
    with shared_with_rank_0(tmp_path / "none", replace(RANK_1, local_world_size=2), wait_seconds=0.0):
        assert not list(tmp_path.iterdir())
