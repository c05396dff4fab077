"""Schedules as pure functions of the step: the factor of the learning rate, and coefficients.

The arguments have the names of the schema's fields, so that a section's `model_dump()` can be passed.
"""

import math
from collections.abc import Sequence
from typing import Literal


def lr_factor(
    step: int,
    *,
    total_steps: int,
    kind: Literal["constant", "cosine", "wsd"],
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_steps: int = 0,
) -> float:
    """Ratio of the learning rate to its peak for optimizer step `step` (0-based) of `total_steps`.

    The warm-up is linear, from 1 / warmup_steps in the first step to 1 in the last warm-up step. `cosine` then follows half
    a cosine; `wsd` stays at 1 and decays linearly over the last `decay_steps`. Both reach `min_ratio` in the last step and
    keep it afterwards. If warm-up and decay overlap, the smaller factor applies.
    """
    done = min(step + 1, total_steps)  # step + 1, so that the first step already has a rate above 0
    rise = min(1.0, done / warmup_steps) if warmup_steps else 1.0
    if kind == "constant":
        return rise
    if kind == "cosine":
        progress = max(0, done - warmup_steps) / max(1, total_steps - warmup_steps)
        return min(rise, min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "wsd":
        progress = max(0, done - (total_steps - decay_steps)) / max(1, decay_steps)
        return min(rise, 1.0 - (1.0 - min_ratio) * progress)
    raise ValueError(f"schedule kind={kind!r} must be constant, cosine or wsd")


def coefficient_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """Value at `step` of a piecewise constant schedule of (first step, value) pairs, with increasing steps from 0."""
    return next(value for first, value in reversed(schedule) if first <= step)
