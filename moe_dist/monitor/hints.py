"""Warns during a run in words: the number, its expected value, where to look, what to try.

Hints are judged over windows of steps, so a single odd batch causes none; each kind appears at most once in `quiet` steps.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from moe_dist.monitor.metrics import Record, group_choices, slowest_rank
from moe_dist.placement.placement import ExpertGroup

BUSY_EXPERT = 3.0  # times the even share
BUSY_RANK = 1.5  # times the mean rank
NULL_EDGE = 0.02  # distance from 0 or 1
LOSS_RISE = 1.05  # times the mean of the window before
LOSS_FALL = 0.99  # times the mean of the first window
SLOW_RANK = 1.5  # times the median of the others
SLOW_SECONDS = 0.005  # minimum difference; smaller ones are noise
SPEED_DROP = 0.6  # times the median of the window before
RECENT = 10  # steps whose median speed is compared
NAMED = 4  # number of dead experts listed by name


@dataclass(frozen=True)
class Hint:
    """One warning; repeats are recognised by `kind`."""

    kind: str
    text: str


class HintWatch:
    """Keeps windows of records and returns hints about them.

    Args:
        groups: Groups in the order of the arrays' columns.
        moe_layers: Index in the model of each MoE layer.
        window: Steps in a window.
        quiet: Steps in which a kind of hint is not repeated.
    """

    def __init__(
        self, groups: Sequence[ExpertGroup], moe_layers: Sequence[int], *, window: int = 50, quiet: int = 200
    ) -> None:
        self._groups, self._moe_layers = tuple(groups), tuple(moe_layers)
        self._window, self._quiet = window, quiet
        self._records: deque[Record] = deque(maxlen=window)
        self._losses: deque[float] = deque(maxlen=2 * window)
        self._speeds: deque[float] = deque(maxlen=window)
        self._first_loss: float | None = None
        self._said: dict[str, int] = {}

    def update(self, record: Record) -> list[Hint]:
        """Takes the record of a step and returns the hints that are due."""
        self._records.append(record)
        loss, speed = record.scalars["loss/total"], record.scalars["perf/tokens_per_second"]
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if speed is not None:
            self._speeds.append(speed)
        due = [hint for hint in self._judge(record) if self._is_due(hint.kind, record.step)]
        self._said.update({hint.kind: record.step for hint in due})
        return due

    def _is_due(self, kind: str, step: int) -> bool:
        return kind not in self._said or step - self._said[kind] >= self._quiet

    def _judge(self, record: Record) -> Iterator[Hint]:
        yield from skipped_step(record)
        yield from slower(tuple(self._speeds))
        if len(self._records) < self._window:
            return
        # The first window of the run, not of the attempt: late in training the loss is expected to fall slowly.
        if self._first_loss is None and len(self._losses) >= self._window and record.step <= 2 * self._window:
            self._first_loss = fmean(tuple(self._losses)[: self._window])
        yield from loss_trend(tuple(self._losses), self._first_loss, self._window)
        choices_LC = np.sum([past.arrays["choices_LC"] for past in self._records], axis=0)
        yield from busy_expert(choices_LC, self._groups, self._moe_layers, record.balance_coefficient)
        yield from dead_experts(choices_LC, self._groups, self._moe_layers, self._window)
        yield from null_collapse(choices_LC, self._groups)
        yield from slow_rank([past.busy_seconds_W for past in self._records])
        yield from busy_rank(np.sum([past.arrays["weighted_rows_LR"] for past in self._records], axis=0))


def busy_expert(
    choices_LC: np.ndarray, groups: Sequence[ExpertGroup], moe_layers: Sequence[int], coefficient: float
) -> Iterator[Hint]:
    """For each group its busiest expert of any layer, if its share is several times the even one."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        share_Ln = true_Ln / np.maximum(true_Ln.sum(1, keepdims=True), 1)
        layer, expert = divmod(int(share_Ln.argmax()), group.num_experts)
        share, even = float(share_Ln[layer, expert]), 1 / group.num_experts
        # With two or three experts a share cannot reach three times the even one, hence the 0.9.
        if group.num_experts > 1 and share >= min(BUSY_EXPERT * even, 0.9):
            yield Hint(
                f"busy/{group.name}",
                f"{group.name} expert {expert} takes {share:.0%} of its group's true choices in layer {moe_layers[layer]} "
                f"(even: {even:.1%}); see moe/load/{group.name} in TensorBoard; try a larger coefficient in "
                f"loss.balance.schedule (now {coefficient:g})",
            )


def dead_experts(
    choices_LC: np.ndarray, groups: Sequence[ExpertGroup], moe_layers: Sequence[int], window: int
) -> Iterator[Hint]:
    """For each group the experts that no token chose during the whole window."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        # Skip layers without true choices: they had no tokens of the group, or only null choices, which null_collapse
        # reports.
        dead = np.argwhere((true_Ln == 0) & (true_Ln.sum(1, keepdims=True) > 0))
        if not len(dead):
            continue
        names = ", ".join(f"{expert} (layer {moe_layers[layer]})" for layer, expert in dead[:NAMED])
        more = f" and {len(dead) - NAMED} more" if len(dead) > NAMED else ""
        yield Hint(
            f"dead/{group.name}",
            f"{group.name} expert{'s' if len(dead) > 1 else ''} {names}{more} took no token in the last {window} steps; "
            f"see moe/load/{group.name} in TensorBoard; try a larger first coefficient in loss.balance.schedule, "
            "or fewer experts",
        )


def null_collapse(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> Iterator[Hint]:
    """For each group with null experts: whether its null fraction is near 0 or 1."""
    for group, choices in zip(groups, group_choices(choices_LC, groups), strict=True):
        total = int(choices.total.sum())
        if not group.num_null or not total:
            continue
        fraction = float(choices.null_Lm.sum()) / total
        even = group.num_null / group.num_columns
        if NULL_EDGE < fraction < 1 - NULL_EDGE:
            continue
        what = "almost all" if fraction > 0.5 else "almost none"
        cost = "hardly any token reaches an expert" if fraction > 0.5 else "null experts save nothing"
        yield Hint(
            f"null/{group.name}",
            f"{what} of the {group.name} group's choices are null ({fraction:.1%}; even: {even:.0%}): {cost}; see "
            "moe/null_fraction in TensorBoard; try a larger coefficient in loss.balance.schedule",
        )


def busy_rank(weighted_rows_LR: np.ndarray) -> Iterator[Hint]:
    """The rank with the most work, for which all others wait."""
    load_R = weighted_rows_LR.sum(0)
    if load_R.size < 2 or not load_R.mean():
        return
    ratio = float(load_R.max() / load_R.mean())
    if ratio >= BUSY_RANK:
        yield Hint(
            "rank",
            f"rank {int(load_R.argmax())} of the EP group computes {ratio:.1f} x the mean rank's rows, and the others "
            "wait; see moe/rank_load in TensorBoard; try placement.policy=interleaved, or other ranks for the groups",
        )


def slow_rank(busy_seconds: Sequence[np.ndarray]) -> Iterator[Hint]:
    """The rank whose own work takes longest over a window of steps; time spent waiting for peers is not counted."""
    known = [each for each in busy_seconds if each.size > 1]
    if len(known) < RECENT:
        return
    found = slowest_rank(np.median(known, axis=0))  # the median ignores one odd step
    slow, others = found["slowest_rank_seconds"], found["other_ranks_seconds"]
    if slow >= SLOW_RANK * others and slow - others >= SLOW_SECONDS:
        yield Hint(
            "slow",
            f"rank {int(found['slowest_rank'])} computes and reads data for {slow:.3f} s a step, the others for "
            f"{others:.3f} s ({slow / max(others, 1e-9):.1f} x), and they wait for it; unless moe/rank_load shows that "
            "it has more to compute, look at its machine: clock and temperature, other jobs, the disk its data come from",
        )


def loss_trend(losses: Sequence[float], first: float | None, window: int) -> Iterator[Hint]:
    """Whether the loss rose over the last two windows, or never fell. `first` is the mean of the first window."""
    if len(losses) < 2 * window or first is None:
        return
    before, now = fmean(losses[:window]), fmean(losses[window:])
    if now > LOSS_RISE * before:
        yield Hint(
            "loss",
            f"the loss rose from {before:.3f} to {now:.3f} (means of {window} steps); see loss/total and optim/grad_norm; "
            "try a lower optimizer.lr or a longer warm-up",
        )
    elif now > LOSS_FALL * first:
        yield Hint(
            "loss",
            f"the loss does not fall: {now:.3f} now, {first:.3f} at first (means of {window} steps); see loss/total and "
            "optim/lr; try another optimizer.lr, and look at the data",
        )


def skipped_step(record: Record) -> Iterator[Hint]:
    """A loss or gradient that was not finite."""
    if record.skipped:
        so_far = int(record.scalars["optim/skipped_steps"] or 0)
        yield Hint(
            "skipped",
            f"step {record.step} was skipped on all ranks: its loss or gradient was not finite ({so_far} so far); see "
            "optim/grad_norm; try a lower optimizer.lr or optimizer.clip_norm",
        )


def slower(speeds: Sequence[float]) -> Iterator[Hint]:
    """Compares tokens per second with the window before."""
    if len(speeds) < 3 * RECENT:
        return
    before, now = median(speeds[:-RECENT]), median(speeds[-RECENT:])
    if now < SPEED_DROP * before:
        yield Hint(
            "speed",
            f"tokens a second fell from {before:,.0f} to {now:,.0f}; see perf/step_seconds, comm/seconds and device/: "
            "look for another job on the machine, a slow rank, or a shift in moe/rank_imbalance",
        )
