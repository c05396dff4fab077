"""Pure functions of the step: the learning rate's factor and the balance coefficient.

They take plain values, named like the fields of the schema's schedule sections, so that a section's `model_dump()` fits.
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
    """Learning rate over its peak for optimizer step `step` (0-based) of `total_steps`.

    The warm-up is a line from 0 (never used: no step is wasted) to 1 at the last warm-up step. `cosine` then falls over
    half a cosine, `wsd` stays at 1 and falls on a line over the last `decay_steps`; both reach `min_ratio` at the last step
    and keep it beyond. Where warm-up and decay overlap, the smaller factor holds.
    """
    done = min(step + 1, total_steps)
    rise = min(1.0, done / warmup_steps) if warmup_steps else 1.0
    if kind == "constant":
        return rise
    if kind == "cosine":
        progress = max(0, done - warmup_steps) / max(1, total_steps - warmup_steps)
        return min(rise, min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "wsd":
        progress = max(0, done - (total_steps - decay_steps)) / max(1, decay_steps)
        return min(rise, 1.0 - (1.0 - min_ratio) * progress)
    raise ValueError(f"schedule kind={kind!r} is none of constant, cosine, wsd")


def coefficient_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """Value at `step` of a staircase of (first step, value) pairs, which starts at step 0 and rises in its first steps."""
    return next(value for first, value in reversed(schedule) if first <= step)
