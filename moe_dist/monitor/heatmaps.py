"""Draws arrays of numbers as heat maps, uint8 [height, width, 3]. Uses only numpy and Pillow.

A heat map with more cells has smaller cells: from 44 pixels, with the number written in the cell, down to 7 pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, GREY, PAPER = (32, 33, 36), (110, 113, 119), (255, 255, 255)
NO_VALUE = (222, 222, 222)
CANVAS, MARGIN, BAR_WIDTH = 1100, 16, 18
MIN_CELL, MAX_CELL = 7, 44  # sizes in pixels
TEXT_WIDTH, TEXT_HEIGHT = 34, 20  # in pixels; a smaller cell shows no number

Colour = tuple[int, int, int]

# ColorBrewer's RdBu, reversed, and matplotlib's viridis. In both, lightness changes in even steps, and colour-blind readers
# can tell the colours apart.
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
    """Describes how a heat map shows numbers as colours.

    Attributes:
        colours: Colours of evenly spaced numbers from 0 to 1. For a number in between, the two next colours are mixed.
        caption: A line under the title that explains the numbers.
        zero: Colour of numbers that are exactly 0; None if they have no special colour.
    """

    colours: tuple[Colour, ...]
    to_unit: Callable[[np.ndarray], np.ndarray]
    ticks: tuple[float, ...]
    write: Callable[[float], str]
    caption: str
    zero: Colour | None = None


@dataclass(frozen=True)
class Axis:
    """Name and labels of a heat map's rows or columns. Optional sublabels are drawn below the labels."""

    name: str
    labels: Sequence[str]
    sublabels: Sequence[str] = ()


def ratio_scale(caption: str) -> Scale:
    """Returns the scale for load / mean load. 1 is white, 4 or more full red, 1/4 or less full blue, exactly 0 black."""

    def to_unit(values: np.ndarray) -> np.ndarray:
        return np.clip(np.log2(np.maximum(values, 2.0**-9)) / 4 + 0.5, 0.0, 1.0)

    return Scale(DIVERGING, to_unit, (0.25, 0.5, 1.0, 2.0, 4.0), _short, f"{caption}; black: none at all", zero=(0, 0, 0))


def linear_scale(caption: str, top: float) -> Scale:
    """Returns the scale for numbers from 0 to `top`."""
    top = top if top > 0 else 1.0
    return Scale(SEQUENTIAL, lambda values: np.clip(values / top, 0.0, 1.0), tuple(np.linspace(0, top, 5)), _short, caption)


def draw(values: np.ndarray, rows: Axis, columns: Axis, *, scale: Scale, title: str) -> np.ndarray:
    """Draws `values` [rows, columns] as a heat map. The cell of a nan is grey."""
    num_rows, num_columns = values.shape
    row_gutter = MARGIN + max(30, _widest(rows.labels, 13) + 16)
    bar_space = BAR_WIDTH + 74
    width_cell = _cell_size(CANVAS - row_gutter - bar_space, num_columns)
    label_width = max(_widest(columns.labels, 13), _widest(columns.sublabels, 11)) + 8
    if num_columns * label_width <= CANVAS // 2:  # with few columns there is space for long names
        width_cell = max(width_cell, label_width)
    height_cell = _cell_size(CANVAS, num_rows, top=min(MAX_CELL, max(width_cell, 22)))
    head = 88
    foot = 58 if columns.sublabels else 44
    small = width_cell < TEXT_WIDTH or height_cell < TEXT_HEIGHT
    words = f"; {extremes(values, rows, columns, scale)}" if small and not np.isnan(values).all() else ""
    caption = f"{scale.caption}{words}"
    header_width = max(font(19).getlength(title), font(14).getlength(caption)) + 2 * MARGIN
    body = max(num_rows * height_cell, 120)  # the numbers beside the colour bar need 120 pixels
    width = int(max(row_gutter + num_columns * width_cell + bar_space, header_width))
    image, canvas = page(width, head + body + foot, title, caption)
    canvas.text((MARGIN, head - 22), rows.name, fill=GREY, font=font(13))

    left, bottom = row_gutter, head + num_rows * height_cell
    rgb = colour(values, scale)
    for r in range(num_rows):
        for c in range(num_columns):
            box = (left + c * width_cell, head + r * height_cell)
            _cell(canvas, box, (width_cell, height_cell), values[r, c], tuple(rgb[r, c].tolist()), scale)
    for r in labelled(num_rows, height_cell, 18):
        at = (left - 8, head + r * height_cell + height_cell // 2)
        canvas.text(at, rows.labels[r], fill=INK, font=font(13), anchor="rm")
    _column_labels(canvas, columns, (left, bottom), width_cell, label_width)
    middle = left + num_columns * width_cell // 2
    canvas.text((middle, bottom + foot - 24), columns.name, fill=GREY, font=font(13), anchor="ma")
    colour_bar(canvas, (left + num_columns * width_cell + 22, head), min(body, 320), scale)
    return np.asarray(image)


def extremes(values: np.ndarray, rows: Axis, columns: Axis, scale: Scale) -> str:
    """Returns a text with the largest value and its cell. If the scale marks zeros, the text also has the number of cells
    that are exactly 0. It is for heat maps whose cells show no numbers. Not all `values` may be nan."""
    row, column = divmod(int(np.nanargmax(values)), values.shape[1])
    row_name, column_name = (axis.name.split(",")[0] for axis in (rows, columns))
    largest = f"largest {scale.write(float(values[row, column]))}: {row_name} {rows.labels[row]}, "
    zeros = int((values == 0).sum()) if scale.zero is not None else 0
    return largest + f"{column_name} {columns.labels[column]}".lstrip() + (f"; black cells: {zeros}" if zeros else "")


def colour(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Returns the colour of each value, uint8 [..., 3], interpolated linearly. nan is grey, an exact zero `scale.zero`."""
    known = ~np.isnan(values)
    unit = scale.to_unit(np.where(known, values, 0.0))
    stops = np.linspace(0.0, 1.0, len(scale.colours))
    table = np.asarray(scale.colours, dtype=np.float64)
    rgb = np.stack([np.interp(unit, stops, table[:, channel]) for channel in range(3)], axis=-1)
    if scale.zero is not None:
        rgb[values == 0] = scale.zero
    rgb[~known] = NO_VALUE
    return np.rint(rgb).astype(np.uint8)


def ink_on(fill: Colour) -> Colour:
    """Returns a text colour that is readable on the background `fill`."""
    return INK if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140 else PAPER


def _cell(
    canvas: ImageDraw.ImageDraw, at: tuple[int, int], size: tuple[int, int], value: float, fill: Colour, scale: Scale
) -> None:
    gap = 1 if min(size) >= 12 else 0
    (x, y), (width, height) = at, size
    canvas.rectangle((x, y, x + width - 1 - gap, y + height - 1 - gap), fill=fill)
    if width >= TEXT_WIDTH and height >= TEXT_HEIGHT and not np.isnan(value):
        centre = (x + width // 2, y + height // 2)
        canvas.text(centre, scale.write(float(value)), fill=ink_on(fill), font=font(13), anchor="mm")


def _column_labels(canvas: ImageDraw.ImageDraw, columns: Axis, at: tuple[int, int], cell: int, needed: int) -> None:
    left, bottom = at
    for c in labelled(len(columns.labels), cell, needed):
        x = left + c * cell + cell // 2
        canvas.text((x, bottom + 4), columns.labels[c], fill=INK, font=font(13), anchor="ma")
        if columns.sublabels:
            canvas.text((x, bottom + 20), columns.sublabels[c], fill=GREY, font=font(11), anchor="ma")


def colour_bar(canvas: ImageDraw.ImageDraw, at: tuple[int, int], height: int, scale: Scale) -> None:
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


def labelled(count: int, cell: int, needed: int) -> range:
    """Returns the indices of the rows or columns that get labels: all, or every 2nd, 4th, 8th ... if space is short."""
    stride = 1
    while stride * cell < needed:
        stride *= 2
    return range(0, count, stride)


def _widest(labels: Sequence[str], size: int) -> int:
    return max((round(font(size).getlength(label)) for label in labels), default=0)


def _short(value: float) -> str:
    """Formats a number with about two significant digits: 0.07, 0.5, 1.3, 12."""
    if value == 0:
        return "0"
    text = f"{value:.2f}" if abs(value) < 1 else f"{value:.1f}" if abs(value) < 10 else f"{value:.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@lru_cache(maxsize=8)  # a picture has thousands of labels, but in few sizes
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own font needs no font file of the system


def page(width: int, height: int, title: str, caption: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, 12), title, fill=INK, font=font(19))
    canvas.text((MARGIN, 40), caption, fill=GREY, font=font(14))
    return image, canvas
