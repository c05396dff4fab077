"""The training step on tensor, pipeline and context-parallel ranks (engine.kind=megatron). It has the interface of
`TrainingStep`. For evaluation, this file also has the model with the interface of `Transformer`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import added, joined, sum_over
from moe_dist.comm.names import TRACED_CHOICES
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.megatron.core_attention import order_of_ranks
from moe_dist.megatron.gpt import Gpt
from moe_dist.megatron.layer_watch import LayerWatch
from moe_dist.megatron.pipeline import MicroBatch, Pipeline
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import AuxSettings
from moe_dist.moe.routing.types import ChosenColumns, LayerReport, RoutingRequest
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.objective.loss import MicroLoss, global_counts, sums_by_modality
from moe_dist.train.router_tuning.tuning import Targets
from moe_dist.train.step.result import Forwarded, Weights
from moe_dist.train.step.tracing import StepWatcher
from moe_dist.train.step.training_step import TrainingStep


class PipelineModel:
    """The model over all pipeline stages. A call takes the arguments of `Transformer`, and returns losses and reports."""

    def __init__(self, gpt: Gpt, pipeline: Pipeline, watch: LayerWatch) -> None:
        self.gpt, self.pipeline, self.watch = gpt, pipeline, watch
        self.training = True

    def __call__(
        self, tokens_BS: Tensor, positions_BS: Tensor, documents_BS: Tensor, group_BS: Tensor, request: RoutingRequest,
        labels_BS: Tensor | None,
    ) -> tuple[Tensor, Sequence[LayerReport]]:  # fmt: skip
        """Returns the cross entropy of each label [B, S], and one report for each MoE layer of this stage. The cross
        entropy is 0 on all stages except the last."""
        one = torch.ones((), device=tokens_BS.device)
        labels_BS = torch.full_like(tokens_BS, IGNORED) if labels_BS is None else labels_BS
        batch = MicroBatch(tokens_BS, documents_BS, positions_BS, group_BS, labels_BS, one, request)
        found = self.pipeline.run([batch], divisor=one, training=False)
        losses_BS = self._whole(found[0]) if found else torch.zeros(tokens_BS.shape, device=tokens_BS.device)
        reports = self.watch.take()[0]
        if request.keep_choices:
            reports = self.with_choices(reports, 0, tokens_BS)
            self.watch.chosen.clear()
        return losses_BS, reports

    def with_choices(self, reports: Sequence[LayerReport], number: int, tokens_BS: Tensor) -> list[LayerReport]:
        """Returns one report for each MoE layer of the model. It has the expert choices of all tokens of a micro-batch,
        which it collects from all TP, CP and PP ranks. Collective over these ranks: sums 12 bytes per token, layer and
        choice."""
        groups, layers = self.gpt.groups, self.gpt.config.model.moe_layers
        choices = self.gpt.config.model.moe.most_columns
        column_TLK = torch.zeros((tokens_BS.numel(), len(layers), choices), dtype=torch.int64, device=tokens_BS.device)
        weight_TLK = torch.zeros(column_TLK.shape, device=tokens_BS.device)
        for layer, (token_T, chosen) in self.watch.chosen[number].items():
            column_TLK[token_T, layers.index(layer)] = chosen.column_TK.to(column_TLK.dtype)
            weight_TLK[token_T, layers.index(layer)] = chosen.weight_TK.to(weight_TLK.dtype)
        for tensor in (column_TLK, weight_TLK):  # the sum is exact, because only one rank adds a value other than 0
            for group in (groups.tp, groups.cp, groups.pp):
                sum_over(tensor, group if group.size() > 1 else None, name=TRACED_CHOICES, tracker=self.watch.tracker)
        parts = zip(column_TLK.to(torch.int16).unbind(1), weight_TLK.to(torch.float16).unbind(1), strict=True)
        return [each._replace(chosen=ChosenColumns(*part)) for each, part in zip(reports, parts, strict=True)]

    def with_own_choices(self, reports: Sequence[LayerReport], number: int) -> list[LayerReport]:
        """Returns one report per MoE layer of the model, with the choices of this rank's tokens in this rank's layers."""
        own, layers = self.watch.chosen[number], self.gpt.config.model.moe_layers
        found = [own[layer][1] if layer in own else None for layer in layers]
        return [each._replace(chosen=chosen) for each, chosen in zip(reports, found, strict=True)]

    def _whole(self, losses_Bs: Tensor) -> Tensor:
        """Gathers the losses [B, S] from all context-parallel ranks. Each of these ranks has some of the positions."""
        group, size = self.gpt.groups.cp, self.pipeline.cp_size
        parts = [torch.empty_like(losses_Bs) for _ in range(size)]
        dist.all_gather(parts, losses_Bs.contiguous(), group=group)
        joined = torch.cat(parts, dim=1)
        return joined[:, order_of_ranks(joined.shape[1], size).to(joined.device)]

    def eval(self) -> "PipelineModel":
        return self.train(False)

    def train(self, mode: bool = True) -> "PipelineModel":
        self.training = mode
        for chunk in self.gpt.chunks:
            chunk.train(mode)
        return self

    def moe_modules(self) -> list[MoELayer]:
        """Returns the MoE modules of this rank's layers."""
        return [module for chunk in self.gpt.chunks for module in chunk.modules() if isinstance(module, MoELayer)]

    def depth_routers(self) -> list[Any]:
        return []


@dataclass(frozen=True)
class PipelineParallel:
    """The model on Megatron's ranks. Has the attributes of `ParallelModel` that every engine needs.

    Attributes:
        reader: Two numbers: this rank's index among the ranks that read different sequences, and the number of such ranks.
        counts_tokens: True on exactly one of the ranks that read the same sequences.
        counts_losses: True on the ranks whose losses are summed. Each position is on exactly one of these ranks.
    """

    model: PipelineModel
    mesh: Mesh
    reader: tuple[int, int]
    counts_tokens: bool
    counts_losses: bool
    layer_ranks: dist.ProcessGroup


class PipelineStep(TrainingStep):
    """Takes training steps with Megatron's schedule, gradient sums and optimizer."""

    parallel: PipelineParallel  # pyright: ignore[reportIncompatibleVariableOverride]

    def _losses(
        self,
        batches: Sequence[Batch],
        aux: AuxSettings,
        weights: Weights,
        *,
        targets: Sequence[Targets] | None,
        watchers: Sequence[StepWatcher],
    ) -> Forwarded:
        model, mesh = self.parallel.model, self.parallel.mesh
        watch, pipeline = model.watch, model.pipeline
        watch.coefficients = aux
        micro_batches = [
            MicroBatch(
                each.tokens_BS,
                each.documents_BS,
                each.positions_BS,
                self.group_of_modality[each.modality_BS].masked_fill(each.padding_BS, -1),
                each.labels_BS,
                share,
                RoutingRequest(info, keep_choices=bool(watchers)),
            )
            for each, share, info in zip(batches, weights.share_I, weights.batch_info, strict=True)
        ]
        found = pipeline.run(micro_batches, divisor=weights.labels_in_step, training=True)
        watch.coefficients = None
        reports, (balance, z) = watch.take()
        nll_M = torch.zeros(len(self.group_of_modality), dtype=torch.float64, device=mesh.device)
        if self.parallel.counts_losses:
            columns = pipeline.columns(batches[0].tokens_BS.shape[1])
            for batch, losses_Bs in zip(batches, found, strict=True):
                labels, modality = batch.labels_BS[:, columns], batch.label_modality_BS[:, columns]
                nll_M += sums_by_modality(losses_Bs, labels, modality, len(nll_M))
        for number, batch in enumerate(batches if watchers else ()):
            self._show(number, batch, reports, watchers)
        watch.chosen.clear()
        own = joined([report.counts for report in reports])
        counts = global_counts(own, mesh.world, mesh.tracker)()
        loss = MicroLoss(nll_M.sum(), nll_M, balance, z, torch.zeros_like(z))
        return Forwarded(loss, counts, own, added([report.sent for report in reports]))

    def _show(self, number: int, batch: Batch, reports: Sequence[LayerReport], watchers: Sequence[StepWatcher]) -> None:
        """Passes a micro-batch's expert choices to the watchers. A watcher with `own_tokens` gets this rank's choices. For
        other watchers, one of the ranks with the same sequences passes the choices in all layers, and the others of these
        ranks pass a batch of padding."""
        model = self.parallel.model
        own = [watcher for watcher in watchers if watcher.own_tokens]
        for watcher in own:
            watcher.add(batch, model.with_own_choices(reports, number))
        if len(own) == len(watchers):
            return
        whole = model.with_choices(reports, number, batch.tokens_BS)
        shown = batch if self.parallel.counts_tokens else replace(batch, padding_BS=torch.ones_like(batch.padding_BS))
        for watcher in watchers:
            if not watcher.own_tokens:
                watcher.add(shown, whole)

    def _norm_squared(self) -> Tensor:
        """Returns the squared norm on rank 0, and 0 on all other ranks, because Megatron computes the whole model's norm.

        Costs a pass over all gradients, and two all-reduces with a host sync each (dense parameters, experts). The ranks
        must know before Megatron's `step` whether the norm is finite. `step` then computes the norm again.
        """
        self.optimizer.prepare_grads()  # pyright: ignore[reportAttributeAccessIssue]
        norm = float(self.optimizer.get_grad_norm())  # pyright: ignore[reportAttributeAccessIssue]
        share = norm**2 if self.parallel.mesh.rank == 0 else 0.0
        return torch.tensor(share, dtype=torch.float64, device=self.parallel.mesh.device)

    def _apply(self, norm: Tensor, lr: float) -> None:
        """Clips the gradients and updates the weights. Megatron's optimizer does both."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.parallel.mesh.tracker.among("the optimizer's step"):
            self.optimizer.step()

    def _clear(self) -> None:
        for chunk in self.parallel.model.gpt.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
