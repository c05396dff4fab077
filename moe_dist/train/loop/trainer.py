"""Runs the training loop: step, record, evaluate, save. It ends at the last step, a stop request, or divergence."""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from moe_dist.data.batch import Batch, whole_documents
from moe_dist.data.loader import ReadAhead, TrainLoader
from moe_dist.errors import DivergedError, StoppedError
from moe_dist.monitor.costs import CostTable, cost_table
from moe_dist.monitor.devices import DeviceMonitor
from moe_dist.monitor.metrics import evaluation_scalars
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult, LeverDecision
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.runtime.signals import StopRequest
from moe_dist.train.build.training import LoopSettings
from moe_dist.train.evaluation.acceptance import Check, run_checks
from moe_dist.train.evaluation.balance import ranks_outnumber_cores
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.loop.garbage import COLLECT_EVERY
from moe_dist.train.loop.record import build_record
from moe_dist.train.loop.self_checks import (
    Problem,
    batch_problems,
    contaminated,
    dropout,
    empty_moments,
    frozen_weights,
    kept_gradients,
    random_states,
)
from moe_dist.train.rank_balance.levers import Lever
from moe_dist.train.rank_balance.placement_rows import PlacementRows
from moe_dist.train.router_tuning.loader import SampleLoader
from moe_dist.train.start.resume import Progress, Resumable
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.tracing import StepWatcher
from moe_dist.train.step.training_step import TrainingStep
from moe_dist.train.step.weight_watch import WeightWatch

logger = logging.getLogger(__name__)

CHECK_EVERY = 25  # steps between two measurements of the weights, and between two checks by rank 0
WINDOW = 100  # the checks at the end of a run use the routing counts of this many last steps
Loader = TrainLoader | SampleLoader


@dataclass(frozen=True)
class Finished:
    """The results of a run that reached its last step."""

    took_steps: bool  # False if an earlier attempt took the run's last step
    evaluation: EvaluationResult
    checks: list[Check]
    costs: CostTable | None = None  # traffic; None without `monitor.cost_table` or without steps in this attempt


@dataclass(eq=False, repr=False)  # a repr would print the whole model
class Trainer:
    """Runs the training loop on one rank. Every rank runs the same loop, but only rank 0 has sinks of records.

    Attributes:
        loader: Returns this rank's batches for the step that begins at a given position of the stream of all ranks.
        devices: Reads the state of this rank's device; None on ranks without sinks.
        saver: Saves the run's state. All ranks call it at the same steps.
        stop: Tells whether this process got a stop signal. In each step all ranks learn of such a signal.
        progress: The counters of the run. They begin with the values of the loaded checkpoint.
        profile: Returns a context manager for a step, given the step's number (the first step is 1).
        watchers: Objects that get all tokens' expert choices in those steps for which their `due` returns True.
        levers: Levers that keep the ranks equally busy, by name (`rank_balance`).
        placement_rows: The watcher that counts token rows for other placements; None without `monitor.cost_table`.
    """

    plan: LoopSettings
    take_step: TrainingStep
    loader: Loader
    evaluator: Evaluator
    _: KW_ONLY
    sinks: Sequence[Sink]
    devices: DeviceMonitor | None
    saver: Resumable
    stop: StopRequest
    progress: Progress
    profile: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    watchers: Sequence[StepWatcher] = ()
    levers: Mapping[str, Lever] = field(default_factory=dict)
    placement_rows: PlacementRows | None = None
    _reader: ReadAhead = field(init=False)
    _weights: WeightWatch | None = field(init=False)
    _held_out: set[int] = field(default_factory=set, init=False)  # hashes of held-out documents
    _read_held_out: set[int] = field(default_factory=set, init=False)  # those of them that training has read
    _recent: deque[StepResult] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)

    def __post_init__(self) -> None:
        self._reader = ReadAhead(self.loader.batches)
        self._weights = self.saver.weight_watch()

    def fit(self) -> Finished:
        """Trains until the last step.

        Raises:
            StoppedError: a rank got a stop signal. The state has been saved, unless the last step was skipped.
            DivergedError: too many consecutive steps were skipped, or the last step was skipped. Or the held-out loss after
                the last step or the state to be saved is not finite. The newest checkpoint is finite.
            IntegrityError: copies of weights on several ranks differ. They were equal when the newest checkpoint was saved.
        """
        config, progress = self.plan.config, self.progress
        compare_every = config.monitor.compare_copies_every
        evaluation: EvaluationResult | None = None
        save_due = False
        if self._owes_evaluation() and progress.step < config.train.steps:
            evaluation = self._evaluate(final=False)
        while progress.step < config.train.steps:
            result = self._step()
            self.saver.writer.poll()
            if compare_every and progress.step % compare_every == 0:
                self.saver.compare_copies(progress)
            last = progress.step == config.train.steps
            stop = result.stop_requested and not last
            if progress.skipped_in_a_row >= (1 if last else config.train.max_skipped_in_a_row):
                raise self._diverged(self._skips())
            if last or (self._owes_evaluation() and not stop):  # after a stop signal there is time only for a save
                evaluation = self._evaluate(final=last)
            save_due |= progress.step % config.checkpoint.every == 0
            # While steps are skipped, the weights may be broken, and a save would delete an older, good checkpoint.
            if (last or stop or save_due) and not result.skipped:
                self._save(must=last or stop)
                save_due = False
            if stop:
                raise StoppedError(self._stopped(saved=not result.skipped))
        if evaluation is None:  # the loaded checkpoint was saved after the last step
            evaluation = self._evaluate(final=True)
        return Finished(bool(self._recent), evaluation, self._checks(evaluation), self._costs())

    def _owes_evaluation(self) -> bool:
        return self.progress.owes_evaluation(self.plan.config.evaluation.every, self.plan.config.train.steps)

    def _step(self) -> StepResult:
        begin = time.perf_counter()
        plan, progress, train = self.plan, self.progress, self.plan.config.train
        following = progress.position + train.global_batch if progress.step + 1 < train.steps else None
        batches = self._reader.batches(progress.position, following=following)
        read_seconds = time.perf_counter() - begin
        checks = (progress.step + 1) % CHECK_EVERY == 0
        watch = self._weights if checks else None
        problems = self._problems(batches, first=not self._recent) if self.sinks else []
        states = random_states() if self.sinks and checks else None
        source_ISB = self.loader.sources(progress.position) if isinstance(self.loader, TrainLoader) else None
        with self.profile(progress.step + 1), nullcontext() if watch is None else watch.around_step():
            result = self.take_step(
                batches,
                lr=plan.lr(progress.step),
                aux=plan.aux(progress.step),
                stop_requested=self.stop.requested,
                began=begin,
                number=progress.step,
                watchers=[each for each in self.watchers if each.due(progress.step)],
                around_update=None if watch is None else watch.around_update(),
                source_ISB=source_ISB,
            )
        if states is not None:
            problems += dropout(states, getattr(self.take_step.parallel.model, "family", None))
        progress.step += 1
        progress.position += train.global_batch
        progress.tokens += result.tokens
        progress.skipped_steps += result.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
        self._recent.append(result)
        decisions = self._pull_levers(result)
        _collect(progress.step)
        if self.sinks:
            weights = None if watch is None else watch.take()
            seconds = time.perf_counter() - begin
            self._show(
                result, weights=weights, levers=decisions, problems=problems, read_seconds=read_seconds, seconds=seconds
            )
        for each in decisions:
            if each.placement is not None:
                self.follow(each.placement)
        return result

    def _problems(self, batches: Sequence[Batch], *, first: bool) -> list[Problem]:
        """Notes held-out documents in the batches. Checks in the first step of the attempt, and in each
        `CHECK_EVERY`-th step, what must hold in each step."""
        step, train, model = self.progress.step, self.plan.config.train, self.take_step.parallel.model
        modules = getattr(getattr(model, "gpt", None), "chunks", [model])  # of a pipeline's stage, or the whole model
        found = list[Problem]()
        if self._held_out:
            self._read_held_out |= self._held_out & whole_documents(batches)
        if first or (step + 1) % CHECK_EVERY == 0:
            found += contaminated(len(self._read_held_out), len(self._held_out))
            found += [*batch_problems(batches), *kept_gradients(chain(*(each.parameters() for each in modules)))]
        if first and step:
            found += empty_moments(self.take_step.optimizer.state.items())  # Megatron's state has no values()
        if first and train.only is None and train.frozen is None and self.plan.config.router_tuning is None:
            found += frozen_weights(modules)
        return found

    def _pull_levers(self, result: StepResult) -> list[LeverDecision]:
        """Calls all levers after a step. Returns their decisions."""
        step, position = self.progress.step, self.progress.position - self.plan.config.train.global_batch
        found = [lever.after_step(result, step=step, position=position) for lever in self.levers.values()]
        decisions = [each for each in found if each is not None]
        for each in decisions:
            logger.info("rank balance: %s", each.text)
        return decisions

    def follow(self, placement: ExpertPlacement) -> None:
        """Uses a new placement, which a lever chose, for records, evaluations, traces and checkpoints."""
        self.plan = replace(self.plan, placement=placement)
        self.evaluator.placement = self.saver.placement = placement
        for watcher in self.watchers:
            watcher.follow(placement, self.progress.step)

    def _show(self, result: StepResult, **options: Any) -> None:
        epochs, readings = self.loader.epochs(self.progress.position), self.devices.latest if self.devices else None
        if isinstance(self.loader, TrainLoader):
            options["sources"] = self.loader.source_names
        record = build_record(result, self.plan, self.progress, epochs=epochs, readings=readings, **options)
        for sink in self.sinks:
            sink.step(record)

    def _evaluate(self, *, final: bool) -> EvaluationResult:
        result = self.evaluator(self.progress.step, final=final, trained=self._last_batches(self.evaluator.calibration))
        if self.sinks and isinstance(self.loader, TrainLoader) and not self._held_out:
            self._held_out = whole_documents(self.evaluator.batches(self.plan.config.evaluation.sequences))
        if self.progress.evaluated < self.progress.step:  # otherwise an earlier attempt has already recorded it
            scalars = evaluation_scalars(result, self.plan.modalities, len(self.plan.placement.groups))
            for sink in self.sinks:
                sink.evaluation(result, scalars)
        self.progress.evaluated = self.progress.step
        if final and not np.isfinite([*result.loss.values()]).all():
            losses = ", ".join(f"{name} {loss:.4g}" for name, loss in result.loss.items())
            raise self._diverged(f"the held-out loss after the last step, {self.progress.step}, is not finite ({losses})")
        return result

    def _last_batches(self, count: int) -> list[Batch]:
        """Returns at most `count` of this rank's last training micro-batches, going backwards from the latest step."""
        self._reader.settle()
        size, batches = self.plan.config.train.global_batch, []
        position = self.progress.position - size
        while len(batches) < count and position >= self.progress.first_position:
            batches += self.loader.batches(position)
            position -= size
        return batches[:count]

    def _save(self, *, must: bool) -> None:
        """Saves the run's state. With `must`, the files are written when the method returns. Otherwise a thread may write
        them during the next steps."""
        every = self.plan.config.monitor.compare_copies_every
        if every and self.progress.step % every:  # otherwise `fit` compared the copies after this step
            self.saver.compare_copies(self.progress)
        for sink in self.sinks:
            sink.flush()  # before the save, because a run that resumes from it does not repeat these records
        for watcher in self.watchers:
            watcher.flush()
        self.saver.save(self.progress, durable=must)

    def _checks(self, evaluation: EvaluationResult) -> list[Check]:
        counts = [result.counts for result in self._recent]  # empty if this attempt took no step
        groups = self.plan.placement.groups
        no_choices_LC = np.zeros((1, sum(group.num_columns for group in groups)), np.int64)
        return run_checks(
            self.plan.config.evaluation.checks,
            evaluation,
            self.plan.baselines,
            choices_LC=np.sum([each.choices_LC for each in counts], axis=0) if counts else no_choices_LC,
            tokens_LG=np.sum([each.tokens_LG for each in counts], axis=0) if counts else no_choices_LC[:, : len(groups)],
            dropped_L=np.sum([each.dropped_LE.sum(1) for each in counts], axis=0) if counts else no_choices_LC[:, 0],
            groups=groups,
            skipped_steps=self.progress.skipped_steps,
            window=len(counts),
            even_active=self.plan.config.even_active,
        )

    def _costs(self) -> CostTable | None:
        """Returns the traffic of the last steps, and the traffic that other methods would cause with the same expert
        choices. Collective."""
        if self.placement_rows is None or not self._recent:
            return None
        mesh, plan = self.evaluator.mesh, self.plan
        rows = self.placement_rows.total(mesh.world, mesh.tracker)
        steps, untimed = len(self._recent), ranks_outnumber_cores(mesh)
        return cost_table(
            [each.ledger for each in self._recent],
            plan.placement,
            plan.config.placement.policy,
            rows,
            tokens=sum(each.tokens for each in self._recent) / steps,
            seconds="not timed" if untimed else f"{sum(each.comm_seconds for each in self._recent) / steps:.3f}",
            untimed=untimed,
        )

    def _diverged(self, what: str) -> DivergedError:
        self.saver.writer.wait()  # a thread may still be writing the last checkpoint
        return DivergedError(f"{what}; {self.saver.ways_on(self.progress)}")

    def _skips(self) -> str:
        """Returns a text about the last skipped steps of a diverged run."""
        train = self.plan.config.train
        last = [f"{float(r.nll_M.sum() / max(1, r.labels_M.sum())):.4g}/{r.grad_norm:.4g}" for r in self._recent]
        return (
            f"loss or gradient not finite in {self.progress.skipped_in_a_row} steps in a row, up to step "
            f"{self.progress.step} (train.steps={train.steps}, train.max_skipped_in_a_row="
            f"{train.max_skipped_in_a_row}); loss/norm of the last steps: "
            f"{', '.join(last[-self.progress.skipped_in_a_row - 3 :])}"
        )

    def _stopped(self, *, saved: bool) -> str:
        done = "the state is saved"
        if not saved:
            self.saver.writer.wait()
            done = f"the last step was skipped, so that it is not saved; the newest checkpoint is {self.saver.newest}"
        return f"stopped on request after step {self.progress.step}; {done}, start me again"


def _collect(step: int) -> None:
    """Collects garbage after every COLLECT_EVERY-th step if automatic collections are off (see `garbage.py`)."""
    if step % COLLECT_EVERY == 0 and not gc.isenabled():
        gc.collect()
