"""Makes hints, which are warnings during a run. A hint says which number is unusual, what was expected, where to look, and
which configuration key to change.

Most hints consider a window of steps, because a single unusual batch proves nothing.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import median

import numpy as np

from moe_dist.monitor.metrics import Record, slowest_rank
from moe_dist.monitor.picture_hints import heavy_pictures, untrained_encoder
from moe_dist.monitor.routing_hints import Hint, WindowSums, routing_hints
from moe_dist.monitor.setup_hints import Settings, evaluation_hints, setup_hints
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.training_hints import (
    EVERY,
    Evaluated,
    exploding,
    first_bad_layer,
    loss_spikes,
    loss_trend,
    odd_rank,
    odd_scale,
    odd_source,
    odd_words,
    overfit,
    pays,
    repeated_data,
    same_choices,
)
from moe_dist.monitor.weight_hints import matrix_ratio, weight_hints
from moe_dist.placement.placement import ExpertGroup

BUSY_RANK = 1.5  # warns if, summed over layers, the busiest rank's work is at least this many times a rank's mean work
SLOW_RANK = 1.5  # a rank is slow if its seconds are at least this many times the median of the other ranks
SLOW_SECONDS = 0.005  # a rank is slow only if its seconds exceed the other ranks' median by at least this number
SPEED_DROP = 0.6  # the speed has dropped if it is below this many times the median of the earlier steps
RECENT = 10  # the current speed is the median of this many last steps


class HintWatch:
    """Keeps the records of the last `window` steps, and returns the hints that these records give.

    Args:
        groups: Expert groups in the order of the columns of `Record.arrays`.
        quiet: Number of steps after a hint in which hints of the same kind are not repeated.
        said: Last step of each kind of hint that earlier attempts of the run have given.
        words: Rewrites the text of each hint.
        settings: Values of the configuration that rules need.
    """

    def __init__(
        self,
        groups: Sequence[ExpertGroup],
        moe_layers: Sequence[int],
        *,
        window: int = 50,
        quiet: int = 200,
        said: Mapping[str, int] | None = None,
        words: Callable[[str], str] = str,
        settings: Settings = Settings(),
    ) -> None:
        self._groups, self._moe_layers = tuple(groups), tuple(moe_layers)
        self._window, self._quiet, self._settings = window, quiet, settings
        self._records: deque[Record] = deque(maxlen=window)  # each has the arrays of its step
        self._losses: deque[float] = deque(maxlen=2 * window)
        self._evaluations: list[Evaluated] = []
        self._broken: tuple[Hint, ...] = ()  # hints of `same_choices`
        self._speeds: deque[float] = deque(maxlen=window)
        self._measured: tuple[Record, ...] = ()  # the last two records with weights
        self._first_losses: tuple[float, ...] = ()  # of the run's first window
        self._first_sources: dict[str, list[float]] = defaultdict(list)  # losses in the run's first steps
        self._said, self._words = dict(said or {}), words  # kind of hint -> last step with such a hint

    def update(self, record: Record) -> list[Hint]:
        """Adds the record of the next step. Returns the hints of this step, except repeats within `quiet` steps."""
        self._records.append(record)
        loss, speed = record.scalars["loss/total"], record.scalars["perf/tokens_per_second"]
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if speed is not None:
            self._speeds.append(speed)
        return self._due(self._judge(record), record.step)

    def evaluate(self, result: EvaluationResult) -> list[Hint]:
        """Adds an evaluation, which follows the record of its step. Returns its hints, except repeats."""
        self._evaluations.append(Evaluated.of(result, tuple(self._records)))
        epochs = self._records[-1].epochs if self._records else {}
        stopped = bool(self._records) and self._records[-1].scalars.get("optim/lr") == 0  # another hint says so
        found = chain(overfit(self._evaluations, epochs), pays(self._evaluations))
        return self._due(found if stopped else chain(found, evaluation_hints(self._evaluations)), result.step)

    def _due(self, hints: Iterator[Hint], step: int) -> list[Hint]:
        due = [hint for hint in hints if step - self._said.get(hint.kind, -math.inf) >= self._quiet]
        self._said.update({hint.kind: step for hint in due})
        return [Hint(hint.kind, self._words(hint.text)) for hint in due]

    def _judge(self, record: Record) -> Iterator[Hint]:
        for name, loss in record.source_losses.items() if record.step <= RECENT else ():
            self._first_sources[name].append(loss)
        yield from skipped_step(record, first_bad_layer(record, self._moe_layers) if record.skipped else None)
        yield from (Hint(*problem) for problem in record.problems)
        if record.step % EVERY == 0:
            records = tuple(self._records)
            yield from setup_hints(records, self._settings)
            self._broken = tuple(same_choices(records, self._groups, self._moe_layers))
            yield from self._broken
            yield from exploding(records)
            yield from repeated_data(records)
            yield from odd_scale(records)
            if not self._settings.dealt:
                yield from odd_rank(records)
                yield from odd_words(records)
            yield from odd_source(records, {name: median(losses) for name, losses in self._first_sources.items()})
            yield from loss_spikes(records)
        if record.weights is not None:
            self._measured = (*self._measured[-1:], record)
            yield from weight_hints(self._measured, self._groups, self._moe_layers)
            yield from untrained_encoder(self._measured, tuple(self._records))
        yield from slower(tuple(self._speeds))
        yield from full_memory([past.memory_W3 for past in self._records if past.memory_W3.size])
        if len(self._records) < self._window:
            return
        # Only the whole run's first window counts, because a resumed run's loss is low from the start and falls slowly.
        if not self._first_losses and len(self._losses) >= self._window and record.step <= 2 * self._window:
            self._first_losses = tuple(self._losses)[: self._window]
        if record.step % EVERY:
            return
        ratio = matrix_ratio(self._measured[-1].weights if self._measured else None)
        trained = self._settings.trained
        yield from loss_trend(tuple(self._losses), self._first_losses, self._window, ratio, trained=trained)
        names = ("choices_LC", "tokens_LG", "dropped_LG")
        arrays = {name: np.sum([past.arrays[name] for past in self._records], axis=0) for name in names}
        sums = WindowSums(**arrays, steps=self._window, balance_coefficient=record.balance_coefficient)
        groups = [hint.kind.partition("/")[2] for hint in self._broken]
        caused = {f"{kind}/{group}" for group in groups for kind in ("busy", "dead")}  # the router is named as the cause
        yield from (each for each in routing_hints(sums, self._groups, self._moe_layers) if each.kind not in caused)
        yield from unread_modality(tuple(self._records))
        yield from heavy_pictures(tuple(self._records), self._settings.most_picture_loss)
        yield from slow_rank([past.busy_seconds_W for past in self._records])
        yield from busy_rank(np.sum([past.arrays["weighted_rows_LR"] for past in self._records], axis=0))


def unread_modality(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a modality of which no data were read although data of another modality were read."""
    first, last = records[0].epochs, records[-1].epochs
    stopped = [name for name, epochs in last.items() if epochs == first[name] and not any(r.labels[name] for r in records)]
    if len(records) < 2 or len(stopped) == len(last):
        return
    for name in stopped:
        yield Hint(
            f"unread/{name}",
            f"no {name} data were read in the last {len(records)} steps; see data/epochs in TensorBoard; if {name} shall "
            "be trained, look at the mix in data",
        )


def busy_rank(weighted_rows_LR: np.ndarray) -> Iterator[Hint]:
    """Warns if each layer's busiest EP rank has much more work than a rank on average, because all ranks wait for it."""
    if weighted_rows_LR.shape[1] < 2 or not weighted_rows_LR.any():  # one rank, or no rows
        return
    ratio = float(weighted_rows_LR.max(1).sum() / weighted_rows_LR.mean(1).sum())
    if ratio >= BUSY_RANK:
        yield Hint(
            "rank",
            f"rank {int(weighted_rows_LR.sum(0).argmax())} of the EP group computes most rows, and the busiest rank of "
            f"a layer computes {ratio:.1f} x the mean rank's rows (at most {weighted_rows_LR.shape[1]} x is possible), and "
            "the others wait; see moe/rank_load in TensorBoard; try placement.policy=interleaved, or other ranks for the "
            "groups",
        )


def slow_rank(busy_seconds: Sequence[np.ndarray]) -> Iterator[Hint]:
    """Warns about a rank that computes much longer than the other ranks. Time spent waiting does not count."""
    known = [each for each in busy_seconds if each.size > 1]
    if len(known) < RECENT:
        return
    found = slowest_rank(np.median(known, axis=0))  # a median, so that one unusual step changes nothing
    slow, others = found["slowest_rank_seconds"], found["other_ranks_seconds"]
    if slow >= SLOW_RANK * others and slow - others >= SLOW_SECONDS:
        yield Hint(
            "slow",
            f"rank {int(found['slowest_rank'])} computes and reads data for {slow:.3f} s a step, the others for "
            f"{others:.3f} s ({slow / max(others, 1e-9):.1f} x), and they wait for it; unless moe/rank_load shows that "
            "it has more to compute, look at its machine: clock and temperature, other jobs, the disk its data come from",
        )


def full_memory(memory: Sequence[np.ndarray]) -> Iterator[Hint]:
    """Warns about a rank whose allocator, since the first record, found no free memory and therefore emptied its cache."""
    more_W = memory[-1][:, 2] - memory[0][:, 2] if memory else np.zeros(1)
    rank = int(more_W.argmax())
    if more_W[rank] > 0:
        allocated, reserved, _ = memory[-1][rank]
        yield Hint(
            "memory",
            f"rank {rank} found no free GPU memory {int(more_W[rank])} times in the last {len(memory) - 1} steps; each "
            f"time it waited for the GPU and emptied its cache; it had at most {allocated:,.0f} MiB in use and "
            f"{reserved:,.0f} MiB reserved; see device/rank_memory in TensorBoard; a smaller train.micro_batch needs less",
        )


def skipped_step(record: Record, layer: int | None = None) -> Iterator[Hint]:
    """Warns if a step was skipped because its loss or gradient was not finite. `layer` is the first layer whose router had
    scores that were not finite."""
    if record.skipped:
        so_far = int(record.scalars["optim/skipped_steps"] or 0)
        yield Hint(
            "skipped",
            f"step {record.step} was skipped on all ranks: its loss or gradient was not finite ({so_far} so far)"
            + (
                "; see optim/grad_norm; try a lower optimizer.lr or optimizer.clip_norm"
                if layer is None
                else f": the router of layer {layer} is the first with scores that are not finite; look at the weights of "
                "this router, and of this layer's attention"
            ),
        )


def slower(speeds: Sequence[float]) -> Iterator[Hint]:
    """Warns if the number of tokens per second has fallen."""
    if len(speeds) < 3 * RECENT:
        return
    before, now = median(speeds[:-RECENT]), median(speeds[-RECENT:])
    if now < SPEED_DROP * before:
        yield Hint(
            "speed",
            f"tokens a second fell from {before:,.0f} to {now:,.0f}; see perf/step_seconds, comm/seconds and device/: "
            "look for another job on the machine, a slow rank, or a shift in moe/rank_imbalance",
        )
