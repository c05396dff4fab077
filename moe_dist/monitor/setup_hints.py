"""Makes hints about parts of a run that are set up wrongly: optimizer, labels, order of the data, evaluation, memory.

Such a run may still learn, only worse, so its loss does not give the fault away. All rules are pure functions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.training_hints import RECENT, Evaluated

STEPS = 2 * RECENT  # a rule judges so many last steps
CLIPPED = 1e-3  # a gradient that is always scaled down to less than this fraction gives AdamW elements near its epsilon
DECAY = 0.01  # at this decay in a step, weights lose half of their size in 69 steps
ONE_HOT = 0.1  # a router is saturated at an entropy below this fraction of its even entropy, if it was EVEN before
EVEN = 0.5
LEAK, STEADY = 0.02, 3.0  # growth of the memory in RECENT steps, as a fraction; the largest growth over the smallest
WAIT = 0.3  # fraction of a step that may be a wait for data


class Settings(NamedTuple):
    """The values of the configuration that the rules need. None turns off the rules about it."""

    clip_norm: float | None = None
    weight_decay: float | None = None
    most_picture_loss: float | None = None  # share of the loss that pictures may have
    trained: bool = False  # whether the run began with trained weights
    dealt: bool = False  # whether sequences are dealt by cost, so that ranks may read different mixes of the data


def setup_hints(records: Sequence[Record], settings: Settings) -> Iterator[Hint]:
    """Yields the hints of all rules that need no evaluation. `records` are those of the last steps, each with arrays."""
    recent = records[-STEPS:]
    if len(recent) < STEPS or any(record.skipped for record in recent):
        return
    yield from outweighed(recent)
    yield from clipped_away(recent, settings.clip_norm)
    yield from decayed(recent[-1], settings.weight_decay)
    yield from rate_ended(recent)
    yield from unlabelled(records)
    yield from saturated(records)
    yield from leaking(records)
    yield from waiting(recent)


def outweighed(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns if the balance loss is always larger than the loss of the labels."""
    pairs = [(r.scalars.get("loss/balance") or 0.0, r.scalars.get("loss/total") or math.nan) for r in records]
    if all(balance > total / 2 for balance, total in pairs):
        balance, total = pairs[-1]
        yield Hint(
            "outweighed",
            f"the balance loss is {balance / total:.0%} of the loss, so that it dominates the training; see loss/balance; "
            f"try a lower coefficient in loss.balance.schedule (now {records[-1].balance_coefficient:g}; usual: 0.01)",
        )


def clipped_away(records: Sequence[Record], clip_norm: float | None) -> Iterator[Hint]:
    """Warns if each gradient is clipped to a tiny part of its norm."""
    norms = [norm for r in records if (norm := r.scalars.get("optim/grad_norm")) is not None]
    if clip_norm is not None and norms and min(norms) * CLIPPED > clip_norm:
        yield Hint(
            "clipped",
            f"optimizer.clip_norm={clip_norm:g} scales each gradient down to less than {CLIPPED:g} of its norm, which was "
            f"{np.median(norms):.3g} (median of {len(norms)} steps); see optim/grad_norm; try optimizer.clip_norm=1",
        )


def decayed(record: Record, weight_decay: float | None) -> Iterator[Hint]:
    """Warns if the weight decay shrinks the weights much in a step."""
    rate = record.scalars.get("optim/lr") or 0.0
    if weight_decay is not None and rate * weight_decay >= DECAY:
        yield Hint(
            "decay",
            f"the weight decay shrinks the weights by {rate * weight_decay:.2%} in each step (optimizer.weight_decay="
            f"{weight_decay:g} x learning rate {rate:.2g}), faster than a gradient can restore them; try "
            "optimizer.weight_decay=0.1",
        )


def rate_ended(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns if the learning rate is 0 although the run goes on."""
    if all(record.scalars.get("optim/lr") == 0 for record in records):
        yield Hint(
            "rate",
            f"the learning rate is 0 since {len(records)} steps or more, so that the run no longer learns; see optim/lr; "
            "let optimizer.schedule end with train.steps",
        )


def unlabelled(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a modality that had labels before, and has none now."""
    before, now = records[:-STEPS], records[-STEPS:]
    for name in now[-1].labels:
        had = sum(record.labels[name] > 0 for record in before) >= RECENT
        if had and not any(r.labels[name] for r in now) and any(any(r.labels.values()) for r in now):
            yield Hint(
                f"unlabelled/{name}",
                f"no {name} token was a label in the last {STEPS} steps, though {name} had labels before; see loss/{name}: "
                f"does a mask of prompts cover all {name}, or are the data sorted by source instead of shuffled?",
            )


def saturated(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about routers whose probabilities became one-hot within the window."""
    before, now = records[0], records[-1]
    entropy_2LG = np.array([record.arrays["entropy_LG"] for record in (before, now)], np.float64)
    even_LG = np.array([each.arrays["entropy_LG"] for each in records]).max(axis=0)
    fell_LG = (now.arrays["tokens_LG"] > 0) & (entropy_2LG[0] > EVEN * even_LG) & (entropy_2LG[1] < ONE_HOT * even_LG)
    if fell_LG.any():
        layers = ", ".join(str(layer) for layer in np.flatnonzero(fell_LG.any(axis=1)).tolist())
        yield Hint(
            "saturated",
            f"the routers of MoE layers {layers} (counted from 0) saturate: the entropy of their probabilities fell below "
            f"{ONE_HOT:g} of its value {len(records)} steps before, so that their logits are too large to learn; see "
            "moe/router_entropy; try loss.z=1e-3, or a lower optimizer.lr",
        )


def leaking(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns if the memory of a rank grows by about the same amount in each of the last parts of the window."""
    known = [value for r in records if (value := r.scalars.get("device/memory")) is not None]
    levels = known[::-1][: 3 * RECENT + 1 : RECENT][::-1]
    growth = np.diff(levels)
    if len(growth) == 3 and growth.min() > LEAK * levels[-1] and growth.max() < STEADY * growth.min():
        yield Hint(
            "leak",
            f"the memory of a rank grows by {growth.sum() / (3 * RECENT):.3g} MiB in each step ({levels[0]:,.0f} to "
            f"{levels[-1]:,.0f} MiB in {3 * RECENT} steps): does the code keep tensors of former steps? see device/memory "
            "(on a CPU in bf16, oneDNN keeps code for each new shape, which is harmless)",
        )


def waiting(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns if a large part of each step is a wait for data."""
    pairs = [(r.host.get("read_seconds"), r.scalars.get("perf/step_seconds")) for r in records]
    known = [(wait, step) for wait, step in pairs if isinstance(wait, float) and step is not None]
    if len(known) < RECENT:
        return
    wait, step = np.median(known, axis=0).tolist()
    if wait > WAIT * step and wait > 0.005:
        yield Hint(
            "reading",
            f"each step waits {wait:.2f} s of its {step:.2f} s for data: reading is slower than training; look at the disk "
            "and at data.path, or at the decoding of pictures",
        )


def evaluation_hints(evaluations: Sequence[Evaluated]) -> Iterator[Hint]:
    """Warns if the last two evaluations gave the same losses to the last bit, though the weights changed between them."""
    if len(evaluations) > 1:
        before, now = evaluations[-2:]
        alike = before.tokens == now.tokens and _finite(now.held_out) and before.held_out == now.held_out
        if alike and before.step < now.step and before.training != now.training:
            yield Hint(
                "evaluation",
                f"the held-out losses of steps {before.step} and {now.step} are identical to the last bit, though the run "
                "trained between them: does the evaluation use old weights, such as an average that is not updated?",
            )


def _finite(losses: Mapping[str, float]) -> bool:
    return bool(losses) and all(math.isfinite(loss) for loss in losses.values())
