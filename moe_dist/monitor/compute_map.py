"""Shows a `ComputeMap` as a picture (uint8 [height, width, 3]) and as text for the console."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw
from rich.text import Text

from moe_dist.monitor.heatmaps import (
    BAR_WIDTH,
    CANVAS,
    GREY,
    INK,
    MARGIN,
    NO_VALUE,
    Colour,
    Scale,
    colour,
    colour_bar,
    font,
    ink_on,
    linear_scale,
    page,
)
from moe_dist.monitor.statistics import ComputeMap, MappedPicture

HEAD, LABEL, GAP = 74, 22, 14  # heights in pixels: title, line of words, gap between pictures
SIDE = 112  # largest length in pixels of the longer side of a picture
LINE = 22  # pixels from one line of text to the next
SHADES = " .:-=+*#%@"  # console characters for numbers of experts, from 0 to the largest possible number
SHOWN, SHOWN_LINES = 3, 3  # largest numbers of pictures and of lines of text on a console


def loads_text(found: ComputeMap) -> str:
    """Returns a text with the mean number of true experts for each kind of token: 'text 1.9, drawn cells 1.8, ...'."""
    return ", ".join(f"{kind} {mean:.1f}" for kind, mean in found.mean.items()) + " true experts a token"


def draw_map(found: ComputeMap, *, title: str) -> np.ndarray:
    """Draws pictures, each above the map of its cells. Below, draws text on background colours for each token's experts."""
    caption = f"held-out, mean over layers: {loads_text(found)}"
    scale = linear_scale("", float(found.most))
    across = max(1, (CANVAS - 2 * MARGIN) // (SIDE + GAP))
    rows = [found.pictures[at : at + across] for at in range(0, len(found.pictures), across)]
    row_height = 2 * (SIDE + LABEL) + GAP
    body = max(len(rows) * row_height + LINE * (len(found.lines) + 1) * bool(found.lines), 200)  # the colour bar needs 200
    text_width = max((sum(font(14).getlength(text) for text, _ in line) for line in found.lines), default=0)
    width = round(max(CANVAS, text_width + 2 * MARGIN)) + BAR_WIDTH + 90
    image, canvas = page(width, HEAD + body + MARGIN, title, caption)
    y = HEAD
    for row in rows:
        x = MARGIN
        for picture in row:
            _picture(image, canvas, (x, y), picture, scale)
            x += SIDE + GAP
        y += row_height
    if found.lines:
        canvas.text((MARGIN, y), "text; the colour of a token shows its true experts", fill=GREY, font=font(13))
    for line in found.lines:
        y += LINE
        _line(canvas, (MARGIN, y), line, scale)
    bar, height = width - BAR_WIDTH - 70, min(body - MARGIN, 320)
    colour_bar(canvas, (bar, HEAD), height, scale)
    canvas.text((bar, HEAD + height + 8), "true experts", fill=GREY, font=font(13))
    return np.asarray(image)


def _picture(
    image: Image.Image, canvas: ImageDraw.ImageDraw, at: tuple[int, int], picture: MappedPicture, scale: Scale
) -> None:
    """Draws, from top to bottom: a picture, the mean number of experts per cell, and the map of experts. If the picture has
    no pixels, its drawn cells are grey."""
    x, y = at
    factor = SIDE / max(picture.experts.shape)
    height, width = (max(1, round(cells * factor)) for cells in picture.experts.shape)
    drawn = np.where(picture.empty[..., None], NO_VALUE, GREY).astype(np.uint8)
    for pixels, top in (
        (drawn if picture.pixels is None else picture.pixels, y),
        (colour(picture.experts, scale), y + SIDE + LABEL),
    ):
        image.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, top))
    words = f"{picture.experts.mean():.2f} experts a cell"
    canvas.text((x + width // 2, y + SIDE + 4), words, fill=INK, font=font(12), anchor="ma")


def _line(canvas: ImageDraw.ImageDraw, at: tuple[float, int], line: Sequence[tuple[str, float]], scale: Scale) -> None:
    x, y = at
    for text, load in line:
        width, fill = font(14).getlength(text), _colour_of(load, scale)
        canvas.rectangle((x, y, x + width - 1, y + LINE - 3), fill=fill)
        canvas.text((x, y + 2), text, fill=ink_on(fill), font=font(14))
        x += width


def console_text(found: ComputeMap, width: int) -> list[Text]:
    """Returns the rows of as many pictures as fit into `width` columns, each row beside the same row of the map. Lines of
    text follow, with the number of experts below each token. Lines that are too long are cut.

    Characters with more ink mean more experts, so that the map is visible even in a log without colours.
    """
    scale = linear_scale("", float(found.most))
    texts = [Text(f"Compute map of held-out tokens: {loads_text(found)}", style="bold")]
    of_one = 4 * found.pictures[0].experts.shape[1] + 4 if found.pictures else 1  # columns of a picture and its map
    some = found.pictures[: min(SHOWN, max(1, (width - 2) // of_one))]
    if some:
        shades = f"'{SHADES[0]}' 0 to '{SHADES[-1]}' {found.most}"
        texts.append(
            Text(f"pictures ([] is a drawn cell), each beside the true experts of its cells, mean over layers ({shades}):")
        )
    for row in range(len(some[0].experts) if some else 0):  # all pictures of a data set have the same grid
        texts.append(Text.assemble("  ", *(part for picture in some for part in _row(picture, row, found.most, scale))))
    if found.lines:
        texts.append(Text("text, and below the first letter of each token its true experts, mean over layers:"))
    for line in found.lines[:SHOWN_LINES]:
        texts.append(Text("  ").append_text(Text.assemble(*((t, _style(_colour_of(n, scale))) for t, n in line))))
        texts.append(Text("  " + "".join(f"{load:.0f}".ljust(len(text))[: len(text)] for text, load in line), style="dim"))
    for text in texts:
        if text.plain.startswith("  "):  # a wrapped row of cells would break the columns; sentences may wrap
            text.truncate(width)
    return texts


def _row(picture: MappedPicture, row: int, most: int, scale: Scale) -> Iterator[tuple[str, str]]:
    """Yields text and style for each cell in one row of a picture, then for each cell in the same row of its map."""
    for column, is_empty in enumerate(picture.empty[row]):
        fill = _cell_colour(picture.pixels, picture.experts.shape, row, column)
        yield "  " if is_empty else "[]", _style(fill)
    yield " ", ""
    for load in picture.experts[row]:
        yield 2 * SHADES[round(load / most * (len(SHADES) - 1))], _style(_colour_of(load, scale))
    yield "   ", ""


def _cell_colour(pixels: np.ndarray | None, shape: tuple[int, ...], row: int, column: int) -> Colour:
    if pixels is None:
        return NO_VALUE
    height, width = pixels.shape[0] // shape[0], pixels.shape[1] // shape[1]
    cell = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
    red, green, blue = cell.reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


def _colour_of(load: float, scale: Scale) -> Colour:
    red, green, blue = colour(np.array(load), scale).tolist()
    return red, green, blue


def _style(fill: Colour) -> str:
    """Returns a rich style that has this colour as background, and readable characters."""
    return f"{'black' if ink_on(fill) == INK else 'white'} on rgb({fill[0]},{fill[1]},{fill[2]})"
