import pytest

from moe_dist.monitor.tags import FIXED_SCALARS, GROUP_FAMILIES, MEANING, meaning, reproducible_part, split_tag, tag_plan


@pytest.mark.parametrize(
    ("tag", "parts"),
    [
        ("loss/text", ("loss", "term", "text")),
        ("eval/image_no_filler", ("eval", "part", "image_no_filler")),
        ("data/epochs/text", ("data/epochs", "modality", "text")),
        ("moe/null_fraction/image", ("moe/null_fraction", "group", "image")),
        ("moe/dead_experts", ("moe/dead_experts", None, None)),
        ("perf/mfu", ("perf/mfu", None, None)),
    ],
)
def test_a_tag_splits_into_family_and_label(tag: str, parts: tuple[str, str | None, str | None]) -> None:
    assert split_tag(tag) == parts
    assert meaning(tag)


def test_an_unknown_tag_has_no_meaning() -> None:
    with pytest.raises(KeyError):
        meaning("moe/mood")


def test_fixed_scalars_are_those_without_a_free_label() -> None:
    fixed_losses = 3  # total, balance, z
    assert fixed_losses + sum("{" not in family for family in MEANING) == FIXED_SCALARS


def test_what_is_split_shrinks_with_groups_and_modalities() -> None:
    assert all(vars(tag_plan(2, 2)).values())
    assert tag_plan(1, 4).by_group == GROUP_FAMILIES
    assert not tag_plan(1, 4).epochs_per_modality
    assert tag_plan(3, 3).by_group == ()
    assert tag_plan(3, 3).loss_per_modality
    assert not any(vars(tag_plan(8, 8)).values())


def test_reproducible_part_leaves_times_and_readings_out() -> None:
    line = {
        "step": 3,
        "time": 1.0,
        "host": {"cpu_percent": 3.0},
        "balance_note": "timed over 4 batches",
        "scalars": {"loss/total": 2.0, "perf/mfu": 0.1, "device/power": 90.0, "comm/seconds": 0.1, "comm/bytes_sent": 8.0},
    }
    assert reproducible_part(line) == {"step": 3, "scalars": {"loss/total": 2.0, "comm/bytes_sent": 8.0}}
