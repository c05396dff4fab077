"""Draws pictures and their captions in one PNG."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _LINE, _LINES = 96, 12, 13, 3  # pixels, except _LINES: most lines of a caption
_WIDTH = 16  # characters in a caption's line per picture of the entry


def make_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], *, columns: int) -> bytes:
    """Returns a PNG of entries, `columns` in a row. An entry shows its pictures side by side, and its caption below them.

    Args:
        rows: Caption and pictures of each entry. All entries have equally many pictures. The font has only Latin letters.
    """
    each = len(rows[0][1])
    width, height = each * _SIDE + (each - 1) * 2 + _GAP, _SIDE + _LINES * _LINE + _GAP
    lines = -(-len(rows) // columns)
    canvas = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for number, (caption, pictures) in enumerate(rows):
        row, column = divmod(number, columns)
        x, y = _GAP + column * width, _GAP + row * height
        for place, picture in enumerate(pictures):
            enlarged = picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x + place * (_SIDE + 2), y))
        wrapped = textwrap.wrap(caption, _WIDTH * each, max_lines=_LINES, placeholder=" ...")
        pen.text((x, y + _SIDE + 2), "\n".join(wrapped), fill="black", font=font, spacing=1)
    buffer = io.BytesIO()
    # 256 colours make the file small, without a visible difference.
    canvas.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
