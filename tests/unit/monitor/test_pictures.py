from collections.abc import Callable

import numpy as np
import pytest

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject, Window, heat_maps, loads, relative_entropy
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

MakeRecord = Callable[..., Record]


def test_a_window_sums_steps_and_starts_again(make_record: MakeRecord) -> None:
    window, records = Window(), [make_record(step) for step in (4, 5, 6)]
    for record in records:
        window.add(record)
    sums, words = window.take()
    assert words == "steps 4 to 6"
    for name in ("choices_LC", "tokens_LG", "weighted_rows_LR"):
        assert np.array_equal(sums[name], sum(record.arrays[name] for record in records))
    assert np.allclose(sums["entropy_sum_LG"], 0.7 * sums["tokens_LG"])
    assert not window
    window.add(records[0])
    again, words = window.take()
    assert words == "step 4"
    assert np.array_equal(again["choices_LC"], records[0].arrays["choices_LC"])


def test_a_step_without_tokens_does_not_spoil_the_window(make_record: MakeRecord) -> None:
    window = Window()
    window.add(make_record(1))
    window.add(make_record(2, tokens_LG=np.zeros((3, 2), np.int64), entropy_sum_LG=np.zeros((3, 2))))
    assert np.isfinite(window.take()[0]["entropy_sum_LG"]).all()


def test_loads_by_hand(groups: tuple[ExpertGroup, ...]) -> None:
    """text: 4 experts, image: 4, then 2 null columns each; the second layer saw no image token."""
    choices_LC = np.array([[4, 0, 2, 2, 1, 1, 1, 5, 9, 9, 9, 9], [1, 1, 1, 1, 0, 0, 0, 0, 9, 9, 0, 0]])
    by_name = {group.name: load_Ln for group, load_Ln in loads(choices_LC, groups)}
    assert by_name["text"].tolist() == [[2, 0, 1, 1], [1, 1, 1, 1]]
    assert by_name["image"][0].tolist() == [0.5, 0.5, 0.5, 2.5]
    assert np.isnan(by_name["image"][1]).all()


def test_relative_entropy_is_one_for_an_even_choice(groups: tuple[ExpertGroup, ...]) -> None:
    tokens_LG = np.array([[10, 0]])
    entropy_LG = relative_entropy(tokens_LG * np.log(6), tokens_LG, groups)
    assert entropy_LG[0, 0] == pytest.approx(1.0)
    assert np.isnan(entropy_LG[0, 1])


def test_which_maps_there_are(make_record: MakeRecord, subject: Subject) -> None:
    window = Window()
    window.add(make_record(1))
    sums, words = window.take()
    tags = [tag for tag, _ in heat_maps(sums, subject, words)]
    assert tags == ["moe/load/text", "moe/load/image", "moe/rank_load", "moe/null_fraction", "moe/relative_entropy"]


def test_maps_without_a_subject_are_left_out(make_record: MakeRecord, groups: tuple[ExpertGroup, ...]) -> None:
    """One rank has no load to compare; groups without null experts no null fraction."""
    no_null = tuple(ExpertGroup(g.name, g.num_experts, 0, g.top_k, g.ffn_dim, g.first_expert, g.modalities) for g in groups)
    alone = Subject(no_null, ExpertPlacement(no_null, (tuple(range(8)),)), (1, 3, 5), 2)
    record = make_record(1)
    sums = {
        "choices_LC": record.arrays["choices_LC"][:, :8],
        "tokens_LG": record.arrays["tokens_LG"],
        "dropped_LG": record.arrays["dropped_LG"],
        "entropy_sum_LG": record.arrays["tokens_LG"] * 0.5,
        "weighted_rows_LR": record.arrays["weighted_rows_LR"][:, :1],
    }
    tags = [tag for tag, _ in heat_maps(sums, alone, "step 1")]
    assert tags == ["moe/load/text", "moe/load/image", "moe/relative_entropy"]


def test_the_expert_axis_names_the_rank(subject: Subject) -> None:
    assert list(subject.expert_axis(subject.groups[1]).sublabels) == ["rank 2", "rank 2", "rank 3", "rank 3"]
    assert list(subject.layer_axis.labels) == ["1", "3", "5"]
