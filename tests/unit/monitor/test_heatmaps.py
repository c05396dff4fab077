import numpy as np
import pytest

from moe_dist.monitor.heatmaps import (
    DIVERGING,
    NO_VALUE,
    SEQUENTIAL,
    Axis,
    Scale,
    colour,
    draw,
    extremes,
    linear_scale,
    ratio_scale,
)


def axis(name: str, count: int) -> Axis:
    return Axis(name, [str(i) for i in range(count)])


def test_colours_of_ratios() -> None:
    """1 has the middle colour. A factor and its inverse are equally far from it. Factors beyond four have the colour of
    four. Zero has its own colour."""
    scale = ratio_scale("load")
    rgb = colour(np.array([1.0, 4.0, 0.25, 100.0, 0.01, 0.0, np.nan]), scale)
    middle, top, bottom = DIVERGING[4], DIVERGING[-1], DIVERGING[0]
    assert [tuple(int(x) for x in c) for c in rgb] == [middle, top, bottom, top, bottom, (0, 0, 0), NO_VALUE]
    up, down = scale.to_unit(np.array([2.0, 0.5]))
    assert up - 0.5 == pytest.approx(0.5 - down)


def test_colours_of_shares() -> None:
    scale = linear_scale("share", 2.0)
    rgb = colour(np.array([[0.0, 2.0, 3.0]]), scale)
    assert [tuple(int(x) for x in c) for c in rgb[0]] == [SEQUENTIAL[0], SEQUENTIAL[-1], SEQUENTIAL[-1]]
    assert linear_scale("nothing yet", 0.0).ticks[-1] == 1.0


def test_cells_stand_where_their_numbers_stand() -> None:
    """One loaded cell in the last row and first column colours the picture's lower left."""
    values = np.ones((3, 6))
    values[2, 0] = 4.0
    picture = draw(values, axis("layer", 3), axis("expert", 6), scale=ratio_scale("load"), title="t")
    red = (picture == np.array(DIVERGING[-1], np.uint8)).all(-1)
    body = red[:, : picture.shape[1] - 100]  # without the colour bar
    rows, columns = np.nonzero(body)
    assert rows.size > 500
    assert rows.min() > picture.shape[0] / 2
    assert columns.max() < picture.shape[1] / 3


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 8), (64, 128), (128, 2), (2, 256)])
def test_every_size_gives_a_picture_one_can_open(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, (rows, columns))
    picture = draw(values, axis("layer", rows), axis("expert", columns), scale=ratio_scale("load"), title="Load")
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert max(picture.shape) <= 2000


@pytest.mark.parametrize(
    ("shape", "largest", "scale", "said"),
    [
        ((48, 256), (16, 128), ratio_scale("load"), "largest 9: layer 16, expert 128; black cells: 2"),
        ((48, 256), (16, 128), linear_scale("share", 1.0), "largest 9: layer 16, expert 128"),
        ((61, 2), (16, 1), linear_scale("share", 9.0), "largest 9: layer 16, expert 1"),
    ],
)
def test_a_map_with_small_or_low_cells_says_where_its_extremes_are(
    shape: tuple[int, int], largest: tuple[int, int], scale: Scale, said: str
) -> None:
    values = np.ones(shape)
    values[5, 0], values[6, 1], values[7, 1] = 0.0, 0.0, np.nan
    values[largest] = 9.0
    layers, experts = axis("layer", shape[0]), axis("expert, and the rank that holds it", shape[1])
    assert extremes(values, layers, experts, scale) == said
    other = values.copy()
    other[largest], other[17, 1] = 1.0, 9.0
    named, moved = (draw(v, layers, experts, scale=scale, title="t")[:60] for v in (values, other))
    assert not np.array_equal(named, moved), "the head of the picture has the words"
