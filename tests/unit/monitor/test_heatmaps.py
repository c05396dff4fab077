import numpy as np
import pytest

from moe_dist.monitor.heatmaps import (
    DIVERGING,
    NO_VALUE,
    Axis,
    colour,
    draw,
    ratio_scale,
)


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
