from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moe_dist.monitor import pictures
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject, heat_maps, loads, relative_entropy
from moe_dist.monitor.sinks.tensorboard import Window
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica

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


def test_loads_by_hand(groups: tuple[ExpertGroup, ...]) -> None:
    """Columns: text has 4 experts, image 4, then 2 null columns each. The second layer has no image token."""
    choices_LC = np.array([[4, 0, 2, 2, 1, 1, 1, 5, 9, 9, 9, 9], [1, 1, 1, 1, 0, 0, 0, 0, 9, 9, 0, 0]])
    by_name = {group.name: load_Ln for group, load_Ln in loads(choices_LC, groups)}
    assert by_name["text"].tolist() == [[2, 0, 1, 1], [1, 1, 1, 1]]
    assert by_name["image"][0].tolist() == [0.5, 0.5, 0.5, 2.5]
    assert np.isnan(by_name["image"][1]).all()


def test_a_change_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first expert has half of the load. Its replica on rank 2 takes half of that, since each slot serves two of four
    ranks."""
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(pictures, "draw", lambda values, *_, **__: drawn.append(values))
    after = PlacementWithReplicas(subject.groups, subject.placement.slots, ((Replica(0, 2),),))
    width_E = np.array(subject.placement.width_of_expert)
    load_E = np.array([[12, 0, 4, 0, 4, 0, 4, 0]]) * width_E.max()
    pictures.change_map(load_E / width_E, replace(subject, moe_layers=(1,)), after, "")
    np.testing.assert_allclose(drawn[0], [[2, 2 / 3, 2 / 3, 2 / 3, 1, 2 / 3, 5 / 3, 2 / 3]])


def test_relative_entropy_is_one_for_an_even_choice(groups: tuple[ExpertGroup, ...]) -> None:
    tokens_LG = np.array([[10, 0]])
    entropy_LG = relative_entropy(tokens_LG * np.log(6), tokens_LG, groups)
    assert entropy_LG[0, 0] == pytest.approx(1.0)
    assert np.isnan(entropy_LG[0, 1])


def test_the_load_over_its_target_by_hand(
    groups: tuple[ExpertGroup, ...], subject: Subject, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of layers x groups, only where a controller holds a group: the target falls from 2.0 to 1.25."""
    earlier, record = make_record(2, active_target={"image": 2.0}), make_record(3, active_target={"image": 1.25})
    window = Window()
    window.add(earlier)
    window.add(record)
    sums, words = window.take()
    drawn: dict[str, np.ndarray] = {}
    monkeypatch.setattr(pictures, "draw", lambda values, *_, title, **__: drawn.update({title: values}))
    assert "moe/load_over_target" in dict(heat_maps(sums, subject, words))
    (true_L, tokens_L), (more_L, others_L) = (
        (each.arrays["choices_LC"][:, 4:8].sum(1), each.arrays["tokens_LG"][:, 1]) for each in (earlier, record)
    )
    np.testing.assert_allclose(
        drawn["Load over its target"][:, 1], (true_L + more_L) / (2.0 * tokens_L + 1.25 * others_L), rtol=1e-12
    )
    assert np.isnan(drawn["Load over its target"][:, 0]).all(), "no controller holds the text group"
    true_L = record.arrays["choices_LC"][:, 4:8].sum(1) / record.arrays["tokens_LG"][:, 1]
    assert record.load == {
        "image": {"target": 1.25, "achieved": true_L.mean(), "lowest": true_L.min(), "highest": true_L.max()}
    }
    window.add(make_record(4))
    sums, words = window.take()
    assert "moe/load_over_target" not in dict(heat_maps(sums, subject, words))
    assert make_record(4).load == {}
