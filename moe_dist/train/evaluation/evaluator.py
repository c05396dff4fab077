"""Held-out evaluation during a run: losses by modality, ablation, and balance efficiency."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from moe_dist.config.manifest import Manifest
from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import ChoosingRouter, choice_of_training
from moe_dist.monitor.metrics import busiest_over_mean, reduce_known, rows_by_rank, weighted_rows
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.evaluation.balance import BalanceEfficiency, balance_efficiency
from moe_dist.train.evaluation.calibration import by_threshold, calibrate
from moe_dist.train.evaluation.heldout import Heldout, experts_ablated, heldout_losses

TIMED_BATCHES = 4


class Evaluator:
    """Evaluates one model on the held-out side of every source.

    Args:
        folder, manifest: The data set.
        sequences, final_sequences: Held-out sequences of each source during the run and at its end.
        micro_batch: Sequences in one batch of a rank.
        group_of_modality: int64 [M] on the model's device.
        calibration: Number of training micro-batches on which thresholds, if any, are calibrated before each evaluation.
        measure_balance, ablate: Whether to time the balance efficiency, and to measure the final loss without experts.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        placement: ExpertPlacement,
        *,
        folder: str | Path,
        manifest: Manifest,
        seq_len: int,
        sequences: int,
        final_sequences: int,
        micro_batch: int,
        group_of_modality: Tensor,
        measure_balance: bool,
        ablate: bool,
        calibration: int = 0,
    ) -> None:
        self._model, self._mesh, self._placement = model, mesh, placement
        self._folder, self._manifest = folder, manifest
        self._seq_len, self._micro_batch = seq_len, micro_batch
        self._sequences, self._final_sequences = sequences, final_sequences
        self._group_of_modality = group_of_modality
        self._measure_balance, self._ablate = measure_balance, ablate
        self.calibration = calibration if by_threshold(model) else 0
        self._cached: tuple[int, list[Batch]] = (0, [])

    def __call__(self, step: int, *, final: bool = False, trained: Sequence[Batch] = ()) -> EvaluationResult:
        """Evaluates after `step`. Collective; leaves gradients, random state, loader and routers unchanged, except the
        thresholds that it calibrates.

        Args:
            final: Use `final_sequences`; also measure the loss without experts, and with expert choice the loss under the
                selection of training.
            trained: This rank's last `calibration` training micro-batches, or fewer at the start.
        """
        with self._mesh.tracker.among("calibration"):
            calibrate(
                self._model,
                trained,
                group_of_modality=self._group_of_modality,
                world=self._mesh.world,
                tracker=self._mesh.tracker,
            )
        batches = self._batches(self._final_sequences if final else self._sequences)
        heldout = self._losses(batches)
        experts_off: Mapping[str, float] = {}
        if final and self._ablate:
            with experts_ablated(self._model):
                experts_off = self._losses(batches).loss
        seen = Heldout({}, {}, None)
        if final and any(isinstance(layer.router, ChoosingRouter) for layer in self._model.moe_modules()):
            with choice_of_training([layer.router for layer in self._model.moe_modules()]):
                seen = self._losses(batches)
        balance = BalanceEfficiency(None, "switched off")
        if self._measure_balance:
            balance = balance_efficiency(
                self._model,
                batches[:: max(1, len(batches) // TIMED_BATCHES)][:TIMED_BATCHES],  # some of every source
                group_of_modality=self._group_of_modality,
                placement=self._placement,
                mesh=self._mesh,
            )
        return EvaluationResult(
            step=step,
            loss=heldout.loss,
            tokens=heldout.tokens,
            ablated_loss=experts_off,
            choice_loss=seen.loss,
            experts_per_token=self._experts_per_token(heldout),
            choice_experts_per_token=self._experts_per_token(seen),
            balance_efficiency=balance.timed,
            balance_efficiency_by_count=self._by_count(heldout.choices_LC),
            balance_note=balance.note,
            mixture_of_depths=self._depths(heldout),
        )

    def _losses(self, batches: Sequence[Batch]) -> Heldout:
        with self._mesh.tracker.among("evaluation"):
            return heldout_losses(
                self._model,
                batches,
                modalities=tuple(self._manifest.modalities),
                group_of_modality=self._group_of_modality,
                world=self._mesh.world,
                tracker=self._mesh.tracker,
            )

    def _experts_per_token(self, heldout: Heldout) -> dict[str, float]:
        """True experts per token by group, mean over the layers; groups without tokens are left out."""
        if heldout.choices_LC is None or heldout.tokens_LG is None:
            return {}
        tokens_G = heldout.tokens_LG.sum(0)
        return {
            group.name: float(heldout.choices_LC[:, group.experts].sum() / tokens_G[index])
            for index, group in enumerate(self._placement.groups)
            if tokens_G[index]
        }

    def _depths(self, heldout: Heldout) -> DepthStatistics | None:
        """Tokens that mixture-of-depths layers computed by their causal decision."""
        if heldout.depth_2LG is None:
            return None
        tokens_LG, taken_LG = heldout.depth_2LG
        return DepthStatistics(
            layers=self._model.args.depth_layers,
            capacity=self._model.depth_routers()[0].capacity,
            groups=tuple(group.name for group in self._placement.groups),
            tokens_LG=tokens_LG,
            taken_LG=taken_LG,
        )

    def _by_count(self, choices_LC: np.ndarray | None) -> float | None:
        """Mean over max of the ranks' rows x FFN width, from the choices of this evaluation."""
        if choices_LC is None:
            return None
        rows_LR = rows_by_rank(choices_LC, self._placement)
        imbalance = reduce_known(busiest_over_mean(weighted_rows(choices_LC, rows_LR, self._placement)))
        return 1.0 / imbalance if imbalance else None

    def _batches(self, sequences: int) -> list[Batch]:
        """This rank's batches of all sources; those of the last requested size are cached."""
        if self._cached[0] != sequences:
            batches = [
                batch
                for source in self._manifest.sources
                for batch in heldout_batches(
                    self._folder,
                    self._manifest,
                    source=source,
                    seq_len=self._seq_len,
                    sequences=sequences,
                    micro_batch=self._micro_batch,
                    rank=self._mesh.rank,
                    world_size=self._mesh.world_size,
                )
            ]
            self._cached = (sequences, batches)
        return self._cached[1]
