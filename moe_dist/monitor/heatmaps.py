"""Draws heat maps: an array of numbers in, uint8 [height, width, 3] out. Uses only numpy and Pillow.

Cells shrink as the table grows: from 44 pixels with the value written inside, to 7 for the largest models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PAPER = (32, 33, 36), (110, 113, 119), (255, 255, 255)
NO_VALUE = (222, 222, 222)
CANVAS, MARGIN, BAR_WIDTH = 1100, 16, 18
MIN_CELL, MAX_CELL, TEXT_CELL = 7, 44, 34

Colour = tuple[int, int, int]

# ColorBrewer RdBu, reversed, and matplotlib's viridis: even steps in lightness, safe for colour-blind eyes.
DIVERGING: tuple[Colour, ...] = (
    (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (247, 247, 247),
    (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43),
)  # fmt: skip
SEQUENTIAL: tuple[Colour, ...] = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Maps numbers to colours.

    Attributes:
        colours: Colours at even distances from 0 to 1.
        to_unit: Maps numbers to [0, 1].
        ticks: Numbers marked on the colour bar.
        write: A number as a short text.
        caption: Name of the number; stands under the title.
        zero: Colour of exact zeros, if they have a meaning of their own.
    """

    colours: tuple[Colour, ...]
    to_unit: Callable[[np.ndarray], np.ndarray]
    ticks: tuple[float, ...]
    write: Callable[[float], str]
    caption: str
    zero: Colour | None = None


@dataclass(frozen=True)
class Axis:
    """One side of the table: its name and a label for each row or column, optionally with a smaller one below."""

    name: str
    labels: Sequence[str]
    sublabels: Sequence[str] = ()


def ratio_scale(caption: str) -> Scale:
    """For loads over their mean: white is even, full red four times the mean, full blue a quarter, black none."""

    def to_unit(values: np.ndarray) -> np.ndarray:
        return np.clip(np.log2(np.maximum(values, 2.0**-9)) / 4 + 0.5, 0.0, 1.0)

    return Scale(DIVERGING, to_unit, (0.25, 0.5, 1.0, 2.0, 4.0), _short, caption, zero=(0, 0, 0))


def linear_scale(caption: str, top: float) -> Scale:
    """For numbers from 0 to `top`."""
    top = top if top > 0 else 1.0
    return Scale(SEQUENTIAL, lambda values: np.clip(values / top, 0.0, 1.0), tuple(np.linspace(0, top, 5)), _short, caption)


def draw(values: np.ndarray, rows: Axis, columns: Axis, *, scale: Scale, title: str) -> np.ndarray:
    """A heat map of `values` [rows, columns]; nan is a grey cell.

    Returns:
        uint8 [height, width, 3].
    """
    num_rows, num_columns = values.shape
    row_gutter = MARGIN + max(30, _widest(rows.labels, 13) + 16)
    bar_space = BAR_WIDTH + 74
    width_cell = _cell_size(CANVAS - row_gutter - bar_space, num_columns)
    label_width = max(_widest(columns.labels, 13), _widest(columns.sublabels, 11)) + 8
    if num_columns * label_width <= CANVAS // 2:  # few columns with long names: room for all of them
        width_cell = max(width_cell, label_width)
    height_cell = _cell_size(CANVAS, num_rows, top=min(MAX_CELL, max(width_cell, 22)))
    head = 88
    foot = 58 if columns.sublabels else 44
    header_width = max(font(19).getlength(title), font(14).getlength(_caption(scale))) + 2 * MARGIN
    # Minimum height, so that the numbers of the colour bar fit.
    body = max(num_rows * height_cell, 120)
    width = int(max(row_gutter + num_columns * width_cell + bar_space, header_width))
    image = Image.new("RGB", (width, head + body + foot), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, 12), title, fill=INK, font=font(19))
    canvas.text((MARGIN, 40), _caption(scale), fill=GREY, font=font(14))
    canvas.text((MARGIN, head - 22), rows.name, fill=GREY, font=font(13))

    left, bottom = row_gutter, head + num_rows * height_cell
    rgb = colour(values, scale)
    for r in range(num_rows):
        for c in range(num_columns):
            box = (left + c * width_cell, head + r * height_cell)
            _cell(canvas, box, (width_cell, height_cell), values[r, c], tuple(int(x) for x in rgb[r, c]), scale)
    for r in _labelled(num_rows, height_cell, 18):
        at = (left - 8, head + r * height_cell + height_cell // 2)
        canvas.text(at, rows.labels[r], fill=INK, font=font(13), anchor="rm")
    _column_labels(canvas, columns, (left, bottom), width_cell, label_width)
    middle = left + num_columns * width_cell // 2
    canvas.text((middle, bottom + foot - 24), columns.name, fill=GREY, font=font(13), anchor="ma")
    _colour_bar(canvas, (left + num_columns * width_cell + 22, head), min(body, 320), scale)
    return np.asarray(image)


def colour(values: np.ndarray, scale: Scale) -> np.ndarray:
    """uint8 [..., 3]: interpolates linearly between the scale's colours; grey for nan, `scale.zero` for exact zeros."""
    known = ~np.isnan(values)
    unit = scale.to_unit(np.where(known, values, 0.0))
    stops = np.linspace(0.0, 1.0, len(scale.colours))
    table = np.asarray(scale.colours, dtype=np.float64)
    rgb = np.stack([np.interp(unit, stops, table[:, channel]) for channel in range(3)], axis=-1)
    if scale.zero is not None:
        rgb[values == 0] = scale.zero
    rgb[~known] = NO_VALUE
    return np.rint(rgb).astype(np.uint8)


def _cell(
    canvas: ImageDraw.ImageDraw,
    at: tuple[int, int],
    size: tuple[int, int],
    value: float,
    fill: tuple[int, ...],
    scale: Scale,
) -> None:
    gap = 1 if min(size) >= 12 else 0
    (x, y), (width, height) = at, size
    canvas.rectangle((x, y, x + width - 1 - gap, y + height - 1 - gap), fill=fill)
    if width >= TEXT_CELL and height >= 20 and not np.isnan(value):
        bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
        centre = (x + width // 2, y + height // 2)
        canvas.text(centre, scale.write(float(value)), fill=INK if bright else PAPER, font=font(13), anchor="mm")


def _column_labels(canvas: ImageDraw.ImageDraw, columns: Axis, at: tuple[int, int], cell: int, needed: int) -> None:
    left, bottom = at
    for c in _labelled(len(columns.labels), cell, needed):
        x = left + c * cell + cell // 2
        canvas.text((x, bottom + 4), columns.labels[c], fill=INK, font=font(13), anchor="ma")
        if columns.sublabels:
            canvas.text((x, bottom + 20), columns.sublabels[c], fill=GREY, font=font(11), anchor="ma")


def _colour_bar(canvas: ImageDraw.ImageDraw, at: tuple[int, int], height: int, scale: Scale) -> None:
    x, y = at
    low, high = scale.ticks[0], scale.ticks[-1]
    unit_low, unit_high = scale.to_unit(np.array([low, high]))
    stops = np.linspace(0.0, 1.0, len(scale.colours))
    for i in range(height):
        unit = unit_high - (unit_high - unit_low) * i / max(height - 1, 1)
        fill = tuple(int(np.interp(unit, stops, [c[k] for c in scale.colours])) for k in range(3))
        canvas.line((x, y + i, x + BAR_WIDTH, y + i), fill=fill)
    for tick in scale.ticks:
        unit = float(scale.to_unit(np.array([tick]))[0])
        tick_y = y + (unit_high - unit) / (unit_high - unit_low) * (height - 1)
        canvas.line((x + BAR_WIDTH, tick_y, x + BAR_WIDTH + 4, tick_y), fill=INK)
        canvas.text((x + BAR_WIDTH + 8, tick_y), scale.write(float(tick)), fill=INK, font=font(12), anchor="lm")


def _cell_size(space: int, count: int, top: int = MAX_CELL) -> int:
    return max(MIN_CELL, min(top, space // count))


def _labelled(count: int, cell: int, needed: int) -> range:
    """The rows or columns that get a label: all, or every 2nd, 4th, 8th ... if space is short."""
    stride = 1
    while stride * cell < needed:
        stride *= 2
    return range(0, count, stride)


def _widest(labels: Sequence[str], size: int) -> int:
    return max((round(font(size).getlength(label)) for label in labels), default=0)


def _caption(scale: Scale) -> str:
    return scale.caption + ("; black: none at all" if scale.zero is not None else "")


def _short(value: float) -> str:
    """The number with two significant digits: 0.07, 0.5, 1.3, 12."""
    if value == 0:
        return "0"
    text = f"{value:.2f}" if abs(value) < 1 else f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)  # comes with Pillow: no font files of the system
