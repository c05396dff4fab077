"""A rank compares its planned place with its actual place."""

import pytest

from moe_dist.errors import ConfigError, PlacementError
from moe_dist.runtime.place import Found, RunPlace, check_place
from tests.support.messages import refused

PLACE = RunPlace(3, 1, 1, ("image",), "node2", "vision", {"modality": "image"}, 1)
RIGHT = Found("node2", 1, frozenset({"vision", "h100"}), {"modality": "image", "x": "y"}, ("0", "1"))


def test_a_place_survives_the_environment() -> None:
    assert RunPlace.from_environment({"MOE_DIST_PLACE": PLACE.to_json()}) == PLACE
    assert RunPlace.from_environment({}) is None
    with refused(ConfigError):
        RunPlace.from_environment({"MOE_DIST_PLACE": '{"rank": 3}'})


def test_the_planned_place_passes_and_an_unknown_one_too() -> None:
    check_place(PLACE, RIGHT)
    check_place(PLACE, Found("node2"))
    check_place(PLACE, Found("node2", gpus=("4",)))  # under srun --gpus-per-task each rank sees only its own GPU
    check_place(None, RIGHT)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found("node1"), ""),
        (Found("node2", 0), ""),
        (Found("node2", features=frozenset({"text"})), ""),
        (Found("node2", features=frozenset()), ""),
        (Found("node2", labels={"modality": "text"}), "modality"),
        (Found("node2", gpus=()), ""),
    ],
)
def test_a_wrong_place_ends_with_69_in_words(found: Found, words: str) -> None:
    with refused(PlacementError, words) as raised:
        check_place(PLACE, found)
    assert PlacementError.exit_code == 69
    assert str(raised.value).startswith("rank 3 (experts of image) is not on its planned node")


def test_the_actual_place_is_read_from_the_environment() -> None:
    slurm = {"SLURMD_NODENAME": "node2", "SLURM_LOCALID": "1"}
    ours = {**slurm, "MOE_DIST_NODE_FEATURES": "h100,vision", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert Found.from_environment(ours) == Found("node2", 1, frozenset({"vision", "h100"}), None, ("0", "1"))
    other = Found.from_environment({**slurm, "MOE_DIST_NODE_LABELS": '{"modality": "image"}'})
    assert other.host != "node2", "ranks of the local launcher inherit a job's variables, which say nothing about them"
    assert (other.local_rank, other.labels) == (None, {"modality": "image"})
