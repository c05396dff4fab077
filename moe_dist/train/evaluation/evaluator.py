"""Held-out evaluation during a run: loss by modality, loss without the experts' output, and balance efficiency. The
thresholds of routers are calibrated before each evaluation."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import CALIBRATION_COUNTS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.formats.manifest import Manifest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import ChoosingRouter, choice_of_training
from moe_dist.monitor.metrics import busiest_over_mean, reduce_known, rows_by_rank, weighted_rows
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.evaluation.balance import BalanceEfficiency, balance_efficiency
from moe_dist.train.evaluation.compute_map import Mapper
from moe_dist.train.evaluation.heldout import Heldout, heldout_losses
from moe_dist.train.objective.loss import depth_statistics, forward

TIMED_BATCHES = 4
HALVINGS = 30  # 30 halvings of [0, 1] give a width of 1e-9, below the resolution of fp32 scores


class Evaluator:
    """Evaluates the current model of a training run. Uses the held-out documents of every source.

    Args:
        group_of_modality: int64 [M] on the model's device, index of the expert group of each modality.

    Attributes:
        placement: The current placement of the experts.
        mapper: Makes the compute map (numbers of true experts of single tokens); None without `monitor.compute_map`.
        calibration: Number of training micro-batches on which thresholds are calibrated; 0 without thresholds.
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
        self._cached: dict[int, list[Batch]] = {}  # results of `batches`, keyed by its argument

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
        batches = self.batches(section.final_sequences if final else section.sequences)
        heldout = self._losses(batches)
        ablated = noncausal = Heldout({}, {}, None)
        if final and section.ablate_experts:
            ablated = self._losses(batches, experts_off=True)
        if final and moe.router.experts_choose:
            # Here experts choose tokens as in training, so an expert's choice also depends on later tokens.
            with choice_of_training([layer.router for layer in self.model.moe_modules()], step):
                noncausal = self._losses(batches)
        balance = BalanceEfficiency(None, "switched off")
        if section.balance_efficiency and not moe.experts.replicated:
            some = batches[:: max(1, len(batches) // TIMED_BATCHES)][:TIMED_BATCHES]  # batches of every source
            balance = balance_efficiency(self.model, some, group_of_modality=groups, placement=self.placement, mesh=mesh)
        compute_map = None
        if self.mapper is not None:
            with mesh.tracker.among("compute map"):
                mapped = self.batches(self.mapper.sequences)
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

    def batches(self, sequences: int) -> list[Batch]:
        """Returns this rank's held-out batches from all sources. The batches are on the host."""
        if sequences not in self._cached:
            config, (rank, readers) = self._config, self._parallel.reader
            share = {"micro_batch": config.train.micro_batch, "rank": rank, "world_size": readers}
            options: dict[str, Any] = {"seq_len": config.data.seq_len, "sequences": sequences, **share}
            options["most_patches"] = config.data.most_patches
            self._cached[sequences] = [
                batch
                for source in self._manifest.sources
                for batch in heldout_batches(config.data.path, self._manifest, source=source, **options)
            ]
        return self._cached[sequences]


def by_threshold(model: Transformer) -> list[ChoosingRouter]:
    """Returns the routers with thresholds, in layer order: first MoE routers, then mixture-of-depths routers."""
    routers = [*(layer.router for layer in model.moe_modules()), *model.depth_routers()]
    return [each for each in routers if isinstance(each, ChoosingRouter) and each.causal == "threshold"]


@torch.no_grad()
def calibrate(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    group_of_modality: Tensor,
    world: dist.ProcessGroup | None,
    tracker: CollectiveTracker | None = None,
    steps: int,
) -> None:
    """Calibrates the thresholds of routers, so that each expert and each mixture-of-depths layer selects, by its threshold,
    the same fraction of tokens as in training.

    The model runs on training batches in evaluation mode, but each expert or layer selects its tokens without a threshold,
    as in training. Each threshold is then set so that, over all ranks and batches, the number of tokens whose score exceeds
    it equals the number of selected tokens. Bisection finds all thresholds with `HALVINGS` all-reduces of N counts, named
    `calibration counts`. In an evaluation the fraction may still differ, for two reasons: earlier layers with thresholds
    select other tokens than in training, and held-out tokens differ from training tokens.

    Sets the thresholds of all layers in place. `world` is the group of ranks that have this rank's layers. Without
    batches all thresholds stay unchanged. An expert that selected no token keeps its threshold. `steps` is the number of
    training steps so far; the fraction of tokens that a layer selects may depend on it.

    Collective: every rank must pass the same number of batches. Shape letters: N thresholds of all routers, n thresholds of
    one router, T tokens that reach the router (in a mixture-of-depths layer these are only the selected tokens).
    """
    routers = by_threshold(model)
    if not batches:
        return
    scores, taken = _seen(model, routers, batches, group_of_modality, steps)
    if not routers:  # this rank ran the forward passes because other ranks have layers with thresholds
        return
    sizes = [len(taken_n) for taken_n in taken]
    taken_N = sum_over(torch.cat(taken), world, name=CALIBRATION_COUNTS, tracker=tracker)
    low_N, high_N = torch.zeros_like(taken_N), torch.ones_like(taken_N)  # scores are probabilities in [0, 1]
    for _ in range(HALVINGS):
        middle_N = (low_N + high_N) / 2
        above = [(scores_Tn > middle_n).sum(0) for scores_Tn, middle_n in zip(scores, middle_N.split(sizes), strict=True)]
        above_N = sum_over(torch.cat(above).to(torch.float64), world, name=CALIBRATION_COUNTS, tracker=tracker)
        too_many_N = above_N > taken_N
        low_N = torch.where(too_many_N, middle_N, low_N)
        high_N = torch.where(too_many_N, high_N, middle_N)
    thresholds = [gate.running_mean()[0] for router in routers for gate in router.gates()]
    sizes = [len(threshold_n) for threshold_n in thresholds]
    for threshold_n, known_n, high_n in zip(thresholds, (taken_N > 0).split(sizes), high_N.split(sizes), strict=True):
        threshold_n.copy_(torch.where(known_n, high_n.to(threshold_n.dtype), threshold_n))


def _seen(
    model: Transformer,
    routers: Sequence[ChoosingRouter],
    batches: Sequence[Batch],
    group_of_modality: Tensor,
    steps: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns, for each router, the scores of this rank's tokens [T, n], and the number of tokens selected by each expert
    or layer, float64 [n]. All scores are in memory at once: T times the sum of n over the routers."""
    scores: dict[ChoosingRouter, list[Tensor]] = {router: [] for router in routers}
    taken: dict[ChoosingRouter, list[Tensor]] = {router: [] for router in routers}

    def note(router: Any, inputs: Any, chosen: Any) -> None:
        scores[router].append(router.scores(*inputs[:2]))  # recomputes the scores of this forward pass
        taken[router].append(router.num_taken(chosen))

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(choice_of_training(routers, steps))
        for router in routers:
            stack.callback(router.register_forward_hook(note).remove)
        for batch in batches:
            forward(model, batch.to(group_of_modality.device), group_of_modality)
    return (
        [torch.cat(scores[router]) for router in routers],
        [torch.stack(taken[router]).sum(0).to(torch.float64) for router in routers],
    )
