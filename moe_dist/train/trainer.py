"""The training loop: step, record, evaluate, save, until the last step, a stop request, or divergence."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.data.batch import Batch
from moe_dist.data.loader import TrainLoader
from moe_dist.errors import DivergedError, StoppedError
from moe_dist.monitor.devices import DeviceMonitor
from moe_dist.monitor.metrics import build_record, evaluation_scalars
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult, StepResult, StepStatistics
from moe_dist.placement.counts import StepCounts
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.runtime.signals import StopRequest
from moe_dist.train.build import TrainingPlan
from moe_dist.train.evaluation.acceptance import Check, run_checks
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.loss import AuxSettings
from moe_dist.train.resume import Progress, Resumable
from moe_dist.train.router_tuning.loader import SampleLoader
from moe_dist.train.step import TrainingStep

WINDOW = 100  # steps over which the final checks count routing
Loader = TrainLoader | SampleLoader


@dataclass(frozen=True)
class Finished:
    """A run that reached its last step; `took_steps` tells whether this attempt took any."""

    took_steps: bool
    evaluation: EvaluationResult
    checks: list[Check]


class Trainer:
    """Runs the loop on one rank. Every rank runs the same loop; only rank 0 has sinks.

    Args:
        step: Takes one optimizer step.
        loader: This rank's batches by position.
        evaluator: Held-out losses.
        saver: Saves the state; called identically on all ranks.
        stop: Whether this process was asked to stop; the ranks vote inside each step.
        progress: The starting point.
        modalities: Of the data, in order.
        baselines: Held-out losses of count models, for the summary.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        step: TrainingStep,
        loader: Loader,
        evaluator: Evaluator,
        *,
        placement: ExpertPlacement,
        sinks: Sequence[Sink],
        devices: DeviceMonitor | None,
        saver: Resumable,
        stop: StopRequest,
        progress: Progress,
        modalities: Sequence[str],
        baselines: dict[str, float],
    ) -> None:
        self._plan, self._take_step, self._loader, self._evaluator = plan, step, loader, evaluator
        self._placement, self._sinks, self._devices = placement, sinks, devices
        self._saver, self._stop = saver, stop
        self.progress = progress
        self._modalities, self._baselines = tuple(modalities), baselines
        self._recent: deque[StepResult] = deque(maxlen=WINDOW)

    def fit(self) -> Finished:
        """Trains to the last step.

        Raises:
            StoppedError: a rank was asked to stop; the state is saved.
            DivergedError: too many steps in a row were not finite; the last checkpoint stays.
        """
        plan, progress = self._plan, self.progress
        evaluation: EvaluationResult | None = None
        if self._owes_evaluation() and progress.step < plan.steps:
            evaluation = self._evaluate(final=False)
        while progress.step < plan.steps:
            result = self._step()
            self._saver.poll()
            last = progress.step == plan.steps
            stop = result.stop_requested and not last
            if last or (self._owes_evaluation() and not stop):  # on a stop, save first: the grace period may be short
                evaluation = self._evaluate(final=last)
            if progress.skipped_in_a_row >= plan.max_skipped_in_a_row:
                self._saver.wait()  # the last good state may still be being written
                raise DivergedError(self._divergence())
            if last or stop or progress.step % plan.save_every == 0:
                self._save(must=last or stop)
            if stop:
                raise StoppedError(f"stopped on request after step {progress.step}; the state is saved, start me again")
        if evaluation is None:  # resumed after the last step
            evaluation = self._evaluate(final=True)
        return Finished(bool(self._recent), evaluation, self._checks(evaluation))

    def _owes_evaluation(self) -> bool:
        return self.progress.owes_evaluation(self._plan.evaluate_every, self._plan.steps)

    def _step(self) -> StepResult:
        begin = time.perf_counter()
        plan, progress = self._plan, self.progress
        lr, aux = plan.lr(progress.step), plan.aux(progress.step)
        batches = self._loader.batches(progress.position)
        result = self._take_step(
            batches, lr=lr, aux=aux, stop_requested=self._stop.requested, began=begin, number=progress.step
        )
        progress.step += 1
        progress.position += plan.global_batch
        progress.tokens += result.tokens
        progress.skipped_steps += result.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
        self._recent.append(result)
        if self._sinks:
            self._show(self._statistics(result, lr, aux, time.perf_counter() - begin))
        return result

    def _statistics(self, result: StepResult, lr: float, aux: AuxSettings, seconds: float) -> StepStatistics:
        return StepStatistics(
            result,
            step=self.progress.step,
            balance_coefficient=aux.balance,
            lr=lr,
            skipped_steps=self.progress.skipped_steps,
            tokens=self.progress.tokens,
            step_seconds=seconds,
            epochs=self._loader.epochs(self.progress.position),
            flops_per_token=self._flops_per_token(result.counts) if self._plan.peak_flops is not None else None,
            active_target=self._plan.active_target,
        )

    def _flops_per_token(self, counts: StepCounts[np.ndarray]) -> float:
        """FLOPs per token, at the step's true experts per token and token share of each group."""
        taken_E = (counts.choices_LC[:, : self._placement.num_experts] - counts.dropped_LE).sum(0)
        experts, share = {}, {}
        for group, tokens in zip(self._placement.groups, counts.tokens_LG.sum(0), strict=True):
            experts[group.name] = float(taken_E[group.experts].sum() / max(1, tokens))
            share[group.name] = float(tokens / max(1, counts.tokens_LG.sum()))
        return self._plan.flops_per_token(experts, share)

    def _show(self, stats: StepStatistics) -> None:
        record = build_record(
            stats,
            groups=self._placement.groups,
            placement=self._placement,
            modalities=self._modalities,
            readings=self._devices.latest if self._devices else None,
            peak_flops=self._plan.peak_flops,
        )
        for sink in self._sinks:
            sink.step(record)

    def _evaluate(self, *, final: bool) -> EvaluationResult:
        result = self._evaluator(self.progress.step, final=final, trained=self._last_batches(self._evaluator.calibration))
        if self.progress.evaluated < self.progress.step:  # else an earlier attempt evaluated it and ended right after
            scalars = evaluation_scalars(result, self._modalities, len(self._placement.groups))
            for sink in self._sinks:
                sink.evaluation(result, scalars)
        self.progress.evaluated = self.progress.step
        return result

    def _last_batches(self, count: int) -> list[Batch]:
        """This rank's last training micro-batches: at most `count`, the newest first."""
        position, batches = self.progress.position - self._plan.global_batch, []
        while len(batches) < count and position >= self.progress.first_position:
            batches += self._loader.batches(position)
            position -= self._plan.global_batch
        return batches[:count]

    def _save(self, *, must: bool) -> None:
        """Saves; unless `must`, the save may be written in the background during the next steps."""
        for sink in self._sinks:
            sink.flush()  # records up to the checkpoint's step are not written again on resume
        self._saver.save(self.progress, durable=must)

    def _checks(self, evaluation: EvaluationResult) -> list[Check]:
        counts = [result.counts for result in self._recent]  # none if this attempt resumed at the very end
        groups = self._placement.groups
        no_choices_LC = np.zeros((1, sum(group.num_columns for group in groups)), np.int64)
        return run_checks(
            self._plan.checks,
            evaluation,
            self._baselines,
            choices_LC=np.sum([each.choices_LC for each in counts], axis=0) if counts else no_choices_LC,
            tokens_LG=np.sum([each.tokens_LG for each in counts], axis=0) if counts else no_choices_LC[:, : len(groups)],
            groups=groups,
            skipped_steps=self.progress.skipped_steps,
            window=len(counts),
            even_active=self._plan.even_active,
        )

    def _divergence(self) -> str:
        """Describes the non-finite steps."""
        last = [f"{float(r.nll_M.sum() / max(1, r.labels_M.sum())):.4g}/{r.grad_norm:.4g}" for r in self._recent]
        return (
            f"loss or gradient not finite in {self.progress.skipped_in_a_row} steps in a row, up to step "
            f"{self.progress.step} (train.max_skipped_in_a_row={self._plan.max_skipped_in_a_row}); loss/norm of the last "
            f"steps: {', '.join(last[-self.progress.skipped_in_a_row - 3 :])}; the last checkpoint is untouched: lower "
            "optimizer.lr, lengthen its warm-up, or lower optimizer.clip_norm (docs/monitoring.md)"
        )
