"""A compute map as picture and as console text: each cell and token has the colour and the shade of its number of
experts."""

import numpy as np
import pytest

from moe_dist.monitor.compute_map import HEAD, LABEL, SIDE, console_text, draw_map
from moe_dist.monitor.heatmaps import GREY, MARGIN, NO_VALUE, SEQUENTIAL, colour, linear_scale
from moe_dist.monitor.statistics import ComputeMap, MappedPicture

EXPERTS = np.array([[0.0, 1.0, 2.0], [4.0, 0.5, 3.0]])
EMPTY = np.array([[True, False, False], [False, True, False]])
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)  # 2 x 2 pixels per cell
LINES = [[("def ", 4.0), ("f", 0.0), ("():", 2.0)]]


def mapped(pixels: np.ndarray | None = PIXELS) -> ComputeMap:
    mean = {"text": 1.94, "drawn cells": 1.81, "background": 0.42}
    return ComputeMap(mean, 4, [MappedPicture(EXPERTS, EMPTY, pixels)], LINES)


@pytest.mark.parametrize("pixels", [PIXELS, None], ids=["codebook", "none"])
def test_cells_have_the_colours_of_their_experts(pixels: np.ndarray | None) -> None:
    picture = draw_map(mapped(pixels), title="Compute map")
    cell = SIDE / 3
    wanted = colour(EXPERTS, linear_scale("", 4.0))
    for row, column in np.ndindex(2, 3):
        x, y = round(MARGIN + (column + 0.25) * cell), round(HEAD + (row + 0.25) * cell)
        assert picture[y + SIDE + LABEL, x].tolist() == wanted[row, column].tolist()
        above = PIXELS[2 * row, 2 * column] if pixels is not None else NO_VALUE if EMPTY[row, column] else GREY
        assert picture[y, x].tolist() == list(above)
    assert (picture == np.array(SEQUENTIAL[-1], np.uint8)).all(-1).sum() > 100, "the token that takes 4 experts"


def test_a_log_shows_drawn_cells_shades_and_numbers() -> None:
    assert [text.plain.rstrip() for text in console_text(mapped(), 110)] == [
        "Compute map of held-out tokens: text 1.9, drawn cells 1.8, background 0.4 true experts a token",
        "pictures ([] is a drawn cell), each beside the true experts of its cells, mean over layers (' ' 0 to '@' 4):",
        "    [][]   ::==",
        "  []  [] @@..##",
        "text, and below the first letter of each token its true experts, mean over layers:",
        "  def f():",
        "  4   02",
    ]
