"""Draws curves over steps with their targets as pictures. Uses only numpy and Pillow.

TensorBoard draws scalars itself; these curves are for numbers that do not fit among its 40 scalars.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from moe_dist.monitor.heatmaps import GREY, INK, MARGIN, PAPER, Colour, font

WIDTH, HEIGHT, TOP, LEFT, FOOT = 900, 360, 74, 62, 46
COLOURS: tuple[Colour, ...] = ((33, 102, 172), (178, 24, 43), (35, 139, 69), (106, 81, 163), (217, 95, 14), (99, 99, 99))


def draw_against_targets(
    steps: Sequence[int], values: Mapping[str, Sequence[float]], targets: Mapping[str, float], *, title: str, caption: str
) -> np.ndarray:
    """uint8 [height, width, 3]: for each name its values over `steps` (nan leaves a gap), and its target as a dashed line.

    Args:
        steps: One or more, rising.
        values: For each name of `targets` one value for each step.
    """
    image = Image.new("RGB", (WIDTH, TOP + HEIGHT + FOOT), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, 12), title, fill=INK, font=font(19))
    canvas.text((MARGIN, 40), caption, fill=GREY, font=font(14))
    known = np.array([*targets.values(), *(v for each in values.values() for v in each)], dtype=np.float64)
    known = known[~np.isnan(known)]
    low, high = float(known.min()), float(known.max())
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 170)
        return x, TOP + (high - value) / (high - low) * HEIGHT

    for tick in np.linspace(low + margin, high - margin, 5):
        y = at(first, float(tick))[1]
        canvas.line((LEFT - 5, y, LEFT, y), fill=GREY)
        canvas.text((LEFT - 9, y), f"{tick:.3g}", fill=INK, font=font(13), anchor="rm")
    canvas.line((LEFT, TOP, LEFT, TOP + HEIGHT, WIDTH - 170, TOP + HEIGHT), fill=GREY)
    for step in dict.fromkeys((first, steps[-1])):
        canvas.text((at(step, low)[0], TOP + HEIGHT + 8), f"step {step}", fill=INK, font=font(13), anchor="ma")
    for index, (name, target) in enumerate(targets.items()):
        colour = COLOURS[index % len(COLOURS)]
        for x in range(LEFT, WIDTH - 170, 12):
            canvas.line((x, at(first, target)[1], x + 6, at(first, target)[1]), fill=colour)
        points = [None if np.isnan(v) else at(s, v) for s, v in zip(steps, values[name], strict=True)]
        for here, there in zip(points, [*points[1:], None], strict=True):
            if here is not None:
                end = here if there is None else there
                canvas.line((*here, *end), fill=colour, width=2)
                canvas.ellipse((here[0] - 1, here[1] - 1, here[0] + 1, here[1] + 1), fill=colour)
        label = f"{name}, target {target:g}"
        canvas.text((WIDTH - 160, TOP + 20 * index), label, fill=colour, font=font(13))
    return np.asarray(image)
