"""Warns during a run in words. A hint names the number, its expected value, the place to look and the key to try.

Most hints are judged over a window of steps, because a single odd batch proves nothing.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from moe_dist.monitor.metrics import Record, group_choices, slowest_rank
from moe_dist.placement.placement import ExpertGroup

BUSY_EXPERT = 3.0  # times the even share of true choices from which an expert counts as busy
BUSY_RANK = 1.5  # times the mean rank's work from which a rank counts as busy
NULL_EDGE = 0.02  # distance of the null fraction from 0 or 1 below which a hint warns
LOSS_RISE = 1.05  # times the previous window's mean loss, above which the loss has risen
LOSS_FALL = 0.99  # times the first window's mean loss, below which the loss has fallen
SLOW_RANK = 1.5  # times the median seconds of the other ranks from which a rank counts as slow
SLOW_SECONDS = 0.005  # least difference in seconds; smaller ones are noise
SPEED_DROP = 0.6  # times the median speed of the previous steps, below which the speed has dropped
RECENT = 10  # steps in the median of the current speed
NAMED = 4  # largest number of dead experts that a hint names


@dataclass(frozen=True)
class Hint:
    """One warning. Two hints of the same `kind` are repeats."""

    kind: str
    text: str


class HintWatch:
    """Keeps the records of the last `window` steps and returns the hints that follow from them.

    Args:
        groups: Expert groups in the order of the columns of `Record.arrays`.
        moe_layers: Layer index of each MoE layer.
        window: Steps in a window.
        quiet: Number of steps before a hint of the same kind may come again.
    """

    def __init__(
        self, groups: Sequence[ExpertGroup], moe_layers: Sequence[int], *, window: int = 50, quiet: int = 200
    ) -> None:
        self._groups, self._moe_layers = tuple(groups), tuple(moe_layers)
        self._window, self._quiet = window, quiet
        self._records: deque[Record] = deque(maxlen=window)  # includes the arrays of each step
        self._losses: deque[float] = deque(maxlen=2 * window)
        self._speeds: deque[float] = deque(maxlen=window)
        self._first_loss: float | None = None
        self._said: dict[str, int] = {}  # kind -> step of its last hint

    def update(self, record: Record) -> list[Hint]:
        """Takes the record of the next step; returns its hints, except repeats within `quiet` steps."""
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
        # Only the run's first window is used, because in a later attempt the loss falls slowly anyway.
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
    """Warns if one expert takes several times the even share of its group's choices in a layer."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        share_Ln = true_Ln / np.maximum(true_Ln.sum(1, keepdims=True), 1)
        layer, expert = divmod(int(share_Ln.argmax()), group.num_experts)
        share, even = float(share_Ln[layer, expert]), 1 / group.num_experts
        # In a group of two or three experts no share can exceed three times the even share, hence the limit 0.9.
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
    """Warns about the experts that no token chose during the whole window."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        # A layer in which no true expert was chosen is skipped: the group had no tokens, or null_collapse warns.
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
    """Warns if nearly all or nearly none of a group's choices are null."""
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
    """Warns about an EP rank with much more work than the mean rank, because all other ranks wait for it."""
    load_R = weighted_rows_LR.sum(0)
    if load_R.size < 2 or not load_R.mean():  # one rank, or no rows
        return
    ratio = float(load_R.max() / load_R.mean())
    if ratio >= BUSY_RANK:
        yield Hint(
            "rank",
            f"rank {int(load_R.argmax())} of the EP group computes {ratio:.1f} x the mean rank's rows, and the others "
            "wait; see moe/rank_load in TensorBoard; try placement.policy=interleaved, or other ranks for the groups",
        )


def slow_rank(busy_seconds: Sequence[np.ndarray]) -> Iterator[Hint]:
    """Warns about a rank that works much longer than the other ranks. Time spent waiting for peers is not counted."""
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
    """Warns if the loss rose over the last two windows, or never fell. `first` is the mean loss in the run's first
    window."""
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
    """Warns that a loss or gradient was not finite."""
    if record.skipped:
        so_far = int(record.scalars["optim/skipped_steps"] or 0)
        yield Hint(
            "skipped",
            f"step {record.step} was skipped on all ranks: its loss or gradient was not finite ({so_far} so far); see "
            "optim/grad_norm; try a lower optimizer.lr or optimizer.clip_norm",
        )


def slower(speeds: Sequence[float]) -> Iterator[Hint]:
    """Warns if tokens per second fell."""
    if len(speeds) < 3 * RECENT:
        return
    before, now = median(speeds[:-RECENT]), median(speeds[-RECENT:])
    if now < SPEED_DROP * before:
        yield Hint(
            "speed",
            f"tokens a second fell from {before:,.0f} to {now:,.0f}; see perf/step_seconds, comm/seconds and device/: "
            "look for another job on the machine, a slow rank, or a shift in moe/rank_imbalance",
        )
