"""Held-out evaluation during a run: loss by modality, loss without the experts' output, and balance efficiency."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.formats.manifest import Manifest
from moe_dist.moe.routers.selection import choice_of_training
from moe_dist.monitor.metrics import busiest_over_mean, reduce_known, rows_by_rank, weighted_rows
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.evaluation.balance import BalanceEfficiency, balance_efficiency
from moe_dist.train.evaluation.calibration import calibrate
from moe_dist.train.evaluation.compute_map import Mapper
from moe_dist.train.evaluation.heldout import Heldout, heldout_losses
from moe_dist.train.objective.loss import depth_statistics

TIMED_BATCHES = 4


class Evaluator:
    """Evaluates the current model of a training run. Uses the held-out documents of every source.

    Args:
        group_of_modality: int64 [M] on the model's device, index of the expert group of each modality.

    Attributes:
        placement: The current placement of the experts.
        mapper: Makes the compute map (numbers of true experts of single tokens); None without `monitor.compute_map`.
        calibration: Number of training micro-batches that calibrate thresholds before an evaluation; 0 without thresholds.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        parallel: ParallelModel,
        placement: ExpertPlacement,
        group_of_modality: Tensor,
    ) -> None:
        self.model, self.mesh, self.placement = parallel.model, parallel.mesh, placement
        self.group_of_modality = group_of_modality
        self._config, self._manifest, self._parallel = config, manifest, parallel
        section, depths, router = config.monitor.compute_map, config.model.mixture_of_depths, config.model.moe.router
        folder = Path(config.data.path)
        self.mapper = None if section is None else Mapper(folder, manifest, placement.groups, **section.model_dump())
        causal = (getattr(router, "causal", None), None if depths is None else depths.causal)
        self.calibration = config.evaluation.calibration if "threshold" in causal else 0
        self._cached: dict[int, list[Batch]] = {}  # results of `_batches`, keyed by its argument

    def __call__(self, step: int, *, final: bool = False, trained: Sequence[Batch] = ()) -> EvaluationResult:
        """Evaluates the model after step `step`. Collective. Calibrates the routers' thresholds first. Does not change
        gradients, random generators or the loader.

        Args:
            final: True for the last evaluation. It uses `evaluation.final_sequences`, and also measures the loss without
                experts. If experts choose tokens in training, it also measures the loss when they choose as in training.
            trained: This rank's last `calibration` training micro-batches; fewer at the start of the run.
        """
        mesh, groups, section = self.mesh, self.group_of_modality, self._config.evaluation
        world, moe = self._parallel.layer_ranks, self._config.model.moe
        with mesh.tracker.among("calibration"):
            calibrate(self.model, trained, group_of_modality=groups, world=world, tracker=mesh.tracker, steps=step)
        batches = self._batches(section.final_sequences if final else section.sequences)
        heldout = self._losses(batches)
        ablated = noncausal = Heldout({}, {}, None)
        if final and section.ablate_experts:
            ablated = self._losses(batches, experts_off=True)
        if final and moe.router.experts_choose:
            # Experts choose tokens as in training: which tokens an expert chooses also depends on later tokens.
            with choice_of_training([layer.router for layer in self.model.moe_modules()], step):
                noncausal = self._losses(batches)
        balance = BalanceEfficiency(None, "switched off")
        if section.balance_efficiency and not moe.experts.replicated:
            some = batches[:: max(1, len(batches) // TIMED_BATCHES)][:TIMED_BATCHES]  # batches of every source
            balance = balance_efficiency(self.model, some, group_of_modality=groups, placement=self.placement, mesh=mesh)
        compute_map = None
        if self.mapper is not None:
            with mesh.tracker.among("compute map"):
                mapped = self._batches(self.mapper.sequences)
                compute_map = self.mapper(self.model, mapped, group_of_modality=groups, mesh=mesh)
        depth = None if heldout.counts is None else heldout.counts.depth
        return EvaluationResult(
            step=step,
            loss=heldout.loss,
            tokens=heldout.tokens,
            ablated_loss=ablated.loss,
            choice_loss=noncausal.loss,
            experts_per_token=self._experts_per_token(heldout),
            choice_experts_per_token=self._experts_per_token(noncausal),
            balance_efficiency=balance.timed,
            balance_efficiency_by_count=self._by_count(heldout),
            balance_note=balance.note,
            mixture_of_depths=None if depth is None else depth_statistics(self.model, self.placement, depth),
            compute_map=compute_map,
        )

    def _losses(self, batches: Sequence[Batch], *, experts_off: bool = False) -> Heldout:
        with self.mesh.tracker.among("evaluation"):
            return heldout_losses(
                self.model,
                batches,
                modalities=tuple(self._manifest.modalities),
                group_of_modality=self.group_of_modality,
                world=self.mesh.world,
                tracker=self.mesh.tracker,
                experts_off=experts_off,
                counts_tokens=self._parallel.counts_tokens,
            )

    def _experts_per_token(self, heldout: Heldout) -> dict[str, float]:
        """Returns the mean number of true (not null) experts per token and layer of each group that has tokens."""
        if heldout.counts is None:
            return {}
        tokens_G = heldout.counts.tokens_LG.sum(0)
        return {
            group.name: float(heldout.counts.choices_LC[:, group.experts].sum() / tokens_G[index])
            for index, group in enumerate(self.placement.groups)
            if tokens_G[index]
        }

    def _by_count(self, heldout: Heldout) -> float | None:
        """Returns the mean over ranks of (number of (token, expert) pairs x FFN width), divided by the maximum over ranks.
        Each rank's number of pairs is computed from the expert choices in this evaluation."""
        if heldout.counts is None:
            return None
        choices_LC = heldout.counts.choices_LC
        rows_LR = rows_by_rank(choices_LC, self.placement)
        imbalance = reduce_known(busiest_over_mean(weighted_rows(choices_LC, rows_LR, self.placement)))
        return 1.0 / imbalance if imbalance else None

    def _batches(self, sequences: int) -> list[Batch]:
        """Returns this rank's held-out batches from all sources. The batches are on the host."""
        if sequences not in self._cached:
            config, (rank, readers) = self._config, self._parallel.reader
            share = {"micro_batch": config.train.micro_batch, "rank": rank, "world_size": readers}
            options: dict[str, Any] = {"seq_len": config.data.seq_len, "sequences": sequences, **share}
            self._cached[sequences] = [
                batch
                for source in self._manifest.sources
                for batch in heldout_batches(config.data.path, self._manifest, source=source, **options)
            ]
        return self._cached[sequences]
