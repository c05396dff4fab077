"""Draws heat maps, curves, bars, tables and sliders as HTML with inline SVG. Uses no script. A slider is a row of radio
buttons, between which the arrow keys move. Text and curves have style classes of `page.py` for light and dark mode.

Shape letters: R rows, C columns of a heat map.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count

import numpy as np
from PIL import Image

from moe_dist.monitor.heatmaps import INK, Axis, Scale, colour, extremes, ink_on, labelled

WIDTH, MARK = 860, 7  # in SVG units: width of all cells of a wide picture, and width of one character
MOST_FRAMES = 12
WRITTEN = 400  # largest number of cells for which numbers are written; each number needs 80 bytes
CURVES = 6  # number of different colours of curves
_numbers = count()


def heat(values_RC: np.ndarray, rows: Axis, columns: Axis, *, scale: Scale, title: str) -> str:
    """Returns a heat map. It is an image with one pixel per cell, so that many cells take few bytes. nan is grey. Large
    cells show their number. A line below the map names the largest number."""
    num_rows, num_columns = values_RC.shape
    width, height = min(46, max(3, WIDTH // num_columns)), min(24, max(3, 480 // num_rows))
    width = max(width, max(len(label) for label in (*columns.labels, *columns.sublabels)) * MARK if num_columns < 9 else 0)
    left, top = MARK * max(len(rows.name), *(len(label) for label in rows.labels)) + 14, 22
    right, bottom = left + num_columns * width, top + num_rows * height
    half = MARK * len(columns.name) // 2  # the name of the column axis may be wider than all cells
    middle = max((left + right) // 2, half)
    legend = max(right, middle + half) + 12
    rgb = colour(values_RC, scale)
    parts = [
        f'<image href="{png(rgb)}" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
        'preserveAspectRatio="none"/>'
    ]
    if width >= 28 and height >= 14 and values_RC.size <= WRITTEN:
        for r, c in np.argwhere(~np.isnan(values_RC)).tolist():
            ink = "#202124" if ink_on(rgb[r, c].tolist()) == INK else "#fff"
            at = f'x="{left + c * width + width // 2}" y="{top + r * height + height / 2 + 4:g}"'
            parts.append(f'<text {at} style="fill:{ink}" class="m">{scale.write(float(values_RC[r, c]))}</text>')
    for r in labelled(num_rows, height, 14):
        parts.append(
            f'<text x="{left - 6}" y="{top + r * height + height / 2 + 4:g}" class="e">{escape(rows.labels[r])}</text>'
        )
    for labels, y in ((columns.labels, bottom + 14), (columns.sublabels, bottom + 28)):
        for c in labelled(len(labels), width, MARK * max(map(len, labels), default=1) + 4):
            parts.append(f'<text x="{left + c * width + width // 2}" y="{y}" class="m">{escape(labels[c])}</text>')
    foot = bottom + (44 if columns.sublabels else 30)
    parts.append(f'<text x="{left - 6}" y="14" class="e">{escape(rows.name)}</text>')
    parts.append(f'<text x="{middle}" y="{foot}" class="m q">{escape(columns.name)}</text>')
    for i, tick in enumerate(scale.ticks):  # the legend is to the right of the cells
        red, green, blue = colour(np.array([tick]), scale)[0]
        parts.append(f'<rect x="{legend}" y="{top + 17 * i}" width="14" height="14" fill="rgb({red},{green},{blue})"/>')
        parts.append(f'<text x="{legend + 19}" y="{top + 17 * i + 12}">{scale.write(tick)}</text>')
    size = (legend + 63, max(foot, top + 17 * len(scale.ticks)) + 6)
    words = "" if np.isnan(values_RC).all() else f"; {extremes(values_RC, rows, columns, scale)}"
    return _figure("".join(parts), size, title, f"{scale.caption}{words}")


def curves(
    lines: Mapping[str, Sequence[float]], at: Sequence[float], *, title: str, x: str, y: str, top: float = 0.0
) -> str:
    """Returns curves over the positions `at`, and a legend that wraps. Their axis goes from 0 to at least `top`. A nan is a
    gap. With a single position, returns bars instead."""
    width, height, left, head = 620, 220, 66, 14  # on a phone the characters are larger (page.py)
    known = [value for line in lines.values() for value in line if np.isfinite(value)]
    if len(at) == 1 and known:
        return bars({name: (line[0], "") for name, line in lines.items() if np.isfinite(line[0])}, title=title, caption=y)
    top, low, high = max([top, *known]) or 1.0, min(at), max(at)

    def place(a: float, b: float) -> tuple[float, float]:
        return left + (a - low) / ((high - low) or 1) * width, head + height * (1 - b / top)

    parts, legend = [], ""
    for tick in np.linspace(0, top, 5):
        parts.append(f'<path class="g" d="M{left} {place(low, tick)[1]:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{place(low, tick)[1] + 4:.1f}" class="e">{short(tick)}</text>')
    half = round((low + high) / 2) if high - low > 2 else (low + high) / 2  # steps are whole numbers
    for value in dict.fromkeys((low, half, high)):
        parts.append(f'<text x="{place(value, 0)[0]:.1f}" y="{head + height + 16}" class="m">{short(value)}</text>')
    for i, (name, line) in enumerate(lines.items()):
        points = [place(a, b) for a, b in zip(at, line, strict=True) if np.isfinite(b)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        dots = "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" class="d{i % CURVES}"/>'
            for a, b in points[: 24 if len(points) < 25 else 0]
        )
        parts.append(f'<path class="l l{i % CURVES}" d="M{path}"/>{dots}' if points else "")
        key = f'<svg width="14" height="14"><rect width="14" height="14" class="d{i % CURVES}"/></svg>'
        legend += f"<span>{key} {escape(name)}</span>"
    parts.append(f'<text x="{left + width // 2}" y="{head + height + 38}" class="m q">{escape(x)}</text>')
    below = f'<div class="k">{legend}</div>'
    return _figure("".join(parts), (left + width + 30, head + height + 46), title, y, kind="c", below=below)


def bars(values: Mapping[str, tuple[float, str]], *, title: str, caption: str) -> str:
    """Returns horizontal bars. `values` maps the name of each bar to its value and to the note at its end."""
    left = MARK * max(map(len, values)) + 14
    top = max(value for value, _ in values.values()) or 1.0
    parts = []
    for i, (name, (value, note)) in enumerate(values.items()):
        parts.append(f'<text x="{left - 6}" y="{22 * i + 15}" class="e">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{22 * i + 3}" width="{380 * value / top:.1f}" height="16" class="d0"/>')
        words = f'{short(value)} <tspan class="q">{escape(note)}</tspan>'
        parts.append(f'<text x="{left + 380 * value / top + 6:.1f}" y="{22 * i + 15}">{words}</text>')
    return _figure("".join(parts), (left + 380 + 220, 22 * len(values) + 4), title, caption)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, raw: bool = False) -> str:
    """Returns a table. Cells that begin with a digit are aligned to the right. `raw` means that cells are HTML."""

    def cell(text: str) -> str:
        number = ' class="e"' if text[:1].isdecimal() else ""
        return f"<td{number}>{text if raw else escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def slider(frames: Sequence[tuple[str, str]], *, legend: str) -> str:
    """Returns a slider over at most `MOST_FRAMES` frames (label, HTML). It shows one frame, at first the last one."""
    if len(frames) == 1:
        return f"<p>{escape(legend)}: {escape(frames[0][0])}</p>{frames[0][1]}"
    name, buttons = f"slider{next(_numbers)}", []
    for i, (label, _) in enumerate(frames):
        checked = " checked" if i == len(frames) - 1 else ""
        words = escape(f"{legend} {label}")
        buttons.append(
            f'<input type="radio" name="{name}" id="{name}-{i}" aria-label="{words}" title="{words}"{checked}>'
            f'<label for="{name}-{i}">{escape(label)}</label>'
        )
    shown = "".join(f"<div>{content}</div>" for _, content in frames)
    inside = f"<legend>{escape(legend)}</legend>{''.join(buttons)}"
    return f'<fieldset class="slider">{inside}<div class="frames">{shown}</div></fieldset>'


def details(summary: str, content: str, *, open_: bool = False) -> str:
    """Returns a part of the page that can be collapsed."""
    return f"<details{' open' if open_ else ''}><summary>{escape(summary)}</summary>{content}</details>"


def png(rgb: np.ndarray) -> str:
    """Returns a uint8 image [height, width, 3] as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def short(value: float) -> str:
    """Formats a number with about three digits."""
    if not np.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _figure(content: str, size: tuple[float, float], title: str, caption: str, *, kind: str = "", below: str = "") -> str:
    width, height = size
    label = escape(f"{title}: {caption}")
    return (
        f'<figure class="{kind}"><svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{label}">{content}</svg>{below}'
        f"<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption></figure>"
    )
