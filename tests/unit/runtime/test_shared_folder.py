"""A rank compares folder, number of ranks and attempt name with rank 0 before the start."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.runtime import rendezvous
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.rendezvous import Greeting

RANK_1 = RankEnv(1, 2, 0, 1, "published", 0, "job-7", launched=True)


@pytest.fixture
def greeting(tmp_path: Path) -> Greeting:
    return Greeting("job-7", 2, "node0", str(tmp_path), "0123")


def test_a_rank_waits_for_the_file_of_rank_0(tmp_path: Path, greeting: Greeting) -> None:
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(greeting.difference(RANK_1, tmp_path)))
    other.start()
    time.sleep(0.3)
    assert other.is_alive(), "it waits"
    greeting.probe(tmp_path).touch()
    other.join(600)
    assert found == [""]


@pytest.mark.parametrize(("folder", "words"), [(".", "is another folder"), ("elsewhere", "does not exist")])
def test_another_folder_is_named_with_both_hosts(
    tmp_path: Path, greeting: Greeting, monkeypatch: pytest.MonkeyPatch, folder: str, words: str
) -> None:
    monkeypatch.setattr(rendezvous, "SHARED_SECONDS", 0.2)
    told = greeting.difference(RANK_1, tmp_path / folder)
    assert told.startswith("rank 1 on ")
    assert (
        f"which rank 0 on node0 wrote into {tmp_path}: on this node {tmp_path / folder} {words}; run.root must be" in told
    )


def test_ranks_on_one_node_need_no_file(tmp_path: Path, greeting: Greeting) -> None:
    assert greeting.difference(replace(RANK_1, local_world_size=2), tmp_path / "none") == ""


def test_ranks_of_two_starts_are_told_what_differs(tmp_path: Path, greeting: Greeting) -> None:
    greeting.probe(tmp_path).touch()
    assert greeting.difference(replace(RANK_1, world_size=4), tmp_path).startswith("WORLD_SIZE=4 for rank 1 on ")
    told = greeting.difference(replace(RANK_1, attempt_id="job-6"), tmp_path)
    assert told.startswith("MOE_DIST_ATTEMPT_ID='job-6' for rank 1 on ")
    assert "'job-7' for rank 0 on node0" in told
    # Without a name from a launcher each process draws a name, and later takes rank 0's name.
    assert greeting.difference(replace(RANK_1, attempt_id="drawn", launched=False), tmp_path) == ""
