import numpy as np
import pytest

from moe_dist.monitor.heatmaps import DIVERGING, NO_VALUE, Axis, colour, draw, ratio_scale
from moe_dist.monitor.pictures import loads, relative_entropy
from moe_dist.monitor.sinks.tensorboard import Window
from moe_dist.placement.placement import ExpertGroup
from tests.unit.monitor.conftest import MakeRecord


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
    """The columns are 4 text experts, 4 image experts, and then 2 null columns of each group. The second layer has no image
    token."""
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


def axis(name: str, count: int) -> Axis:
    return Axis(name, [str(i) for i in range(count)])


def test_colours_of_ratios() -> None:
    """The ratio 1 has the middle colour. A factor and its inverse are equally far from the middle. Factors beyond four have
    the colour of four, and zero has a separate colour."""
    scale = ratio_scale("load")
    rgb = colour(np.array([1.0, 4.0, 0.25, 100.0, 0.01, 0.0, np.nan]), scale)
    middle, top, bottom = DIVERGING[4], DIVERGING[-1], DIVERGING[0]
    assert [tuple(int(x) for x in c) for c in rgb] == [middle, top, bottom, top, bottom, (0, 0, 0), NO_VALUE]
    up, down = scale.to_unit(np.array([2.0, 0.5]))
    assert up - 0.5 == pytest.approx(0.5 - down)


def test_cells_stand_where_their_numbers_stand() -> None:
    """If only the cell in the last row and first column is loaded, the picture's lower left is coloured."""
    values = np.ones((3, 6))
    values[2, 0] = 4.0
    picture = draw(values, axis("layer", 3), axis("expert", 6), scale=ratio_scale("load"), title="t")
    red = (picture == np.array(DIVERGING[-1], np.uint8)).all(-1)
    body = red[:, : picture.shape[1] - 100]  # without the colour bar
    rows, columns = np.nonzero(body)
    assert rows.size > 500
    assert rows.min() > picture.shape[0] / 2
    assert columns.max() < picture.shape[1] / 3
