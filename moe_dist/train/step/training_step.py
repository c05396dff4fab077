"""Takes one optimizer step over all ranks: forward, backward, check for nan and inf, update. `trainer.py` has the loop.

Besides the collectives of the layers, a step sums four things over the ranks: label counts (before the first forward pass),
routing counts of each micro-batch, gradients, and a vector with the squared gradient norm, losses, stop requests and
statistics. All ranks issue the same collectives in the same order.

Shape letters: I micro-batches of this rank, M modalities, G expert groups, R readers (ranks with different sequences), W
ranks of the world.
"""

import resource
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from moe_dist.comm.collectives import CommStats, added, from_host, joined, pack, sum_over, unpack
from moe_dist.comm.names import LABEL_COUNTS, STEP_SUMS
from moe_dist.comm.tracker import BusyClock
from moe_dist.data.batch import IGNORED, WORDS, Batch, checksum, count_words
from moe_dist.errors import ResourceError
from moe_dist.moe.dispatch.ledger import count_ledger
from moe_dist.moe.dispatch.static import OVERFLOW
from moe_dist.moe.losses import ColumnTables, StepLoad, busiest_load
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.moe.routing.types import GlobalBatchInfo, LayerReport, RoutingRequest
from moe_dist.optim.optimizer import clip_by_norm, local_norm_squared, set_lr
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.objective.distillation import Distillation
from moe_dist.train.objective.loss import (
    AuxSettings,
    depth_statistics,
    forward,
    global_counts,
    labels_by_modality,
    micro_loss,
    tokens_by_group,
    whole_numbers,
)
from moe_dist.train.router_tuning.tuning import RouterTuning, Targets
from moe_dist.train.step.result import Forwarded, Readings, StepResult, StepStart, StepSums, Weights
from moe_dist.train.step.tracing import StepWatcher


class AfterStep(Protocol):
    """A controller that changes routers' biases or thresholds after the optimizer's step, in the same way on all ranks."""

    def after_step(self, counts: RoutingCounts[Tensor]) -> None:
        """Is called after each step that was not skipped, with all ranks' counts. Must issue no collective or sync."""
        ...


class TrainingStep:
    """Takes training steps with one model and one optimizer. `PipelineStep`, the step with tensor or pipeline parallelism,
    overrides `_losses`, `_norm_squared`, `_apply` and `_clear`.

    Args:
        placement: Experts of each EP rank. The ledger computes the rows of other dispatchers from it.
        group_of_modality: Index of the expert group of each modality, in the manifest's order.
        clip_norm: Largest norm of the whole gradient; a gradient with a larger norm is scaled down. None sets no limit.
        controllers: Are called in this order after each step that was not skipped.
        needs_global_batch_info: True if a router or dropout needs the token counts of all ranks. These counts cost a host
            sync at the beginning of the step.
        tuning: Adds the manifold term of router tuning to the loss. Each batch must then be a `SampleBatch`.
        distillation: Replaces all or a part of the cross entropy by the KL divergence from a teacher.
        load: Expert loads for the balance loss; must also be one of `controllers`. With `load`, auxiliary terms are means
            over the step's tokens. Otherwise they are means over a micro-batch, weighted by its fraction of the labels.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        optimizer: Optimizer,
        *,
        placement: ExpertPlacement,
        group_of_modality: Sequence[int],
        clip_norm: float | None,
        comm_stats: CommStats,
        controllers: Sequence[AfterStep] = (),
        needs_global_batch_info: bool = False,
        tuning: RouterTuning | None = None,
        distillation: Distillation | None = None,
        load: StepLoad | None = None,
    ) -> None:
        device = parallel.mesh.device
        self.parallel, self.optimizer, self.placement, self.clip_norm = parallel, optimizer, placement, clip_norm
        self.group_of_modality = torch.tensor(group_of_modality, device=device)
        self.comm_stats, self.controllers = comm_stats, tuple(controllers)
        self.tuning = tuning if tuning is not None and tuning.weight else None
        self.needs_global_batch_info, self.distillation, self.load = needs_global_batch_info, distillation, load
        # This rank's readings of the last step. The first all-reduce of the next step sums them over the ranks.
        self._readings = Readings(np.zeros(0), np.zeros((0, 3)), np.zeros((0, len(placement.groups))))
        self._tables = ColumnTables.on(placement.groups, device)

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        aux: AuxSettings,
        stop_requested: bool = False,
        began: float | None = None,
        number: int = 0,
        watchers: Sequence[StepWatcher] = (),
        around_update: AbstractContextManager[None] | None = None,
        source_ISB: np.ndarray | None = None,
    ) -> StepResult:
        """Takes one step with this rank's micro-batches.

        Args:
            began: Value of time.perf_counter when this rank began the step; None for the time of the call.
            number: Number of the step (0-based). It is a part of the seed of random draws.
            watchers: Objects that get the expert choices of every token of the step.
            around_update: Is entered before the update, unless the step is skipped, and left after the update.
            source_ISB: `TrainLoader.sources` of this rank's micro-batches; None for no loss by source.
        """
        mesh = self.parallel.mesh
        clock = BusyClock(mesh.tracker, time.perf_counter() if began is None else began)
        tokens = sum(batch.num_tokens for batch in batches) if self.parallel.counts_tokens else 0
        read = (checksum(batches), count_words(batches)) if tokens else (0, np.zeros(WORDS))

        # 1. Divisors of the loss: one all-reduce of a few counts. With `needs_global_batch_info`, the host waits for it.
        targets = None if self.tuning is None else self.tuning.begin(batches, number, mesh.device)
        batches = [batch.to(mesh.device) for batch in batches]
        labels_M, begun = self._begin(batches)
        weights = self._weights(begun, batches, number)
        if source_ISB is not None:
            weights = weights._replace(source_ISB=from_host(source_ISB, torch.float64, mesh.device))
        self.comm_stats.take()  # discards the bytes of evaluations since the last step

        # 2. Forward and backward of each micro-batch, with the dispatcher's collectives and host sync in each layer. The
        # all-reduce of routing counts overlaps with the output layer. Then the gradients are summed over the ranks.
        found = self._losses(batches, aux, weights, targets=targets, watchers=watchers)

        # 3. Sums over the ranks: one all-reduce. On CUDA the host first waits twice: for the seconds of the exchanges, and
        # for this rank's counts for the ledger.
        local = self._share(found, labels_M, tokens, stop_requested, clock, read)
        summed: StepSums[Tensor] = unpack(
            sum_over(pack(local, mesh.device), mesh.world, name=STEP_SUMS, tracker=mesh.tracker), local
        )

        # 4. One host sync reads all results. It comes before the update, so that the host need not wait for the update.
        read = (summed, begun.readings, found.counts)
        sums, readings, counts = unpack(pack(read).cpu().numpy(), read)
        if sums.overflow:  # all ranks fail before any weight changes
            raise ResourceError(f"{OVERFLOW} ({sums.overflow:.0f} in this step, on all ranks)")

        # 5. Update, without a sync. All ranks decide equally: all have the same sums, and NaN on one rank makes a sum NaN.
        finite = bool(np.isfinite([sums.norm_squared, sums.balance, sums.z, sums.auxiliary, *sums.nll_M]).all())
        if finite:
            with around_update or nullcontext():
                self._apply(summed.norm_squared.sqrt(), lr)
            for controller in self.controllers:
                controller.after_step(found.counts)
        self._clear()
        for watcher in watchers:
            watcher.finish(number)
        return self._result(sums, readings, whole_numbers(counts), skipped=not finite)

    def _begin(self, batches: Sequence[Batch]) -> tuple[Tensor, StepStart[Tensor]]:
        """Returns this rank's number of labels of each modality, float64 [M], and the `StepStart` summed over all ranks."""
        parallel, num_modalities = self.parallel, len(self.group_of_modality)
        labels_IM = torch.stack(
            [labels_by_modality(each.labels_BS, each.label_modality_BS, num_modalities) for each in batches]
        )
        if not parallel.counts_tokens:
            labels_IM.zero_()
        local = StepStart(
            labels_I=labels_IM.sum(1),
            readings=self._readings,
            members_RIG=self._count_members(batches if self.needs_global_batch_info else []),
            tokens_IG=self._group_tokens(batches if self.load is not None else []),
        )
        flat = pack(local, parallel.mesh.device)  # counts have exact sums in any order
        return labels_IM.sum(0), unpack(
            sum_over(flat, parallel.mesh.world, name=LABEL_COUNTS, tracker=parallel.mesh.tracker), local
        )

    def _weights(self, begun: StepStart[Tensor], batches: Sequence[Batch], number: int) -> Weights:
        labels_in_step, tokens_IG = begun.labels_I.sum().clamp_min(1.0), begun.tokens_IG
        batch_info = self._batch_infos(batches, begun.members_RIG, number)
        if self.load is None:
            return Weights(labels_in_step, begun.labels_I / labels_in_step, None, batch_info)
        share_I = tokens_IG.sum(1) / tokens_IG.sum().clamp_min(1.0)
        return Weights(labels_in_step, share_I, tokens_IG / tokens_IG.sum(0).clamp_min(1.0), batch_info)

    def _group_tokens(self, batches: Sequence[Batch]) -> Tensor:
        return tokens_by_group(batches, self.group_of_modality, len(self.placement.groups))

    def _count_members(self, batches: Sequence[Batch]) -> Tensor:
        """Returns token counts by reader (a rank, or ranks with the same sequences), micro-batch and group, float64 [R, I,
        G]. Only this rank's reader has counts, the other readers have 0; a sum over the ranks therefore has all counts."""
        reader, readers = self.parallel.reader
        tokens_IG = self._group_tokens(batches)
        members_RIG = tokens_IG.new_zeros((readers, *tokens_IG.shape))
        if self.parallel.counts_tokens:
            members_RIG[reader] = tokens_IG
        return members_RIG

    def _batch_infos(self, batches: Sequence[Batch], members_RIG: Tensor, step: int) -> list[GlobalBatchInfo | None]:
        """Returns the `GlobalBatchInfo` of each micro-batch, made from the token counts of all readers. The entries are
        None if `members_RIG` is empty.

        The i-th micro-batch must have the same shape on all ranks.
        """
        if not members_RIG.numel():
            return [None] * len(batches)
        # This is a device-to-host sync. With these counts the exchanges know their split sizes without more syncs.
        flat = self.comm_stats.to_host("tokens of each rank and group", members_RIG.to(torch.int64).flatten())
        counts_RIG, lengths = np.array(flat).reshape(members_RIG.shape), [each.tokens_BS.numel() for each in batches]
        return [*GlobalBatchInfo.of_step(step, self.parallel.reader[0], lengths, counts_RIG)]

    def _losses(
        self,
        batches: Sequence[Batch],
        aux: AuxSettings,
        weights: Weights,
        *,
        targets: Sequence[Targets] | None,
        watchers: Sequence[StepWatcher],
    ) -> Forwarded:
        """Runs forward and backward of all micro-batches. Then sums the gradients over the ranks."""
        found = []
        for i, batch in enumerate(batches):
            with self.parallel.micro_batch(last=i + 1 == len(batches)):
                found.append(self._micro_batch(i, batch, aux, weights, None if targets is None else targets[i], watchers))
        with record_function("reduce gradients"):
            self.parallel.reduce_gradients()
        of_micro_batches, busiest_G = joined([each.own for each in found]), None
        if not any(group.token_share is not None for group in self.placement.groups):
            busiest_G = busiest_load(of_micro_batches, self.placement.groups)
        return added(found)._replace(busiest_G=busiest_G)

    def _micro_batch(
        self,
        i: int,
        batch: Batch,
        aux: AuxSettings,
        weights: Weights,
        targets: Targets | None,
        watchers: Sequence[StepWatcher],
    ) -> Forwarded:
        """Runs forward and backward of micro-batch `i`. Keeps no autograd node, because nodes keep dispatch plans alive."""
        mesh, running = self.parallel.mesh, []

        def start_counts(reports: Sequence[LayerReport]) -> None:
            """Starts the sum of counts over the ranks, which overlaps with this rank's output layer and cross entropy."""
            own = joined([report.counts for report in reports])
            running.append((own, global_counts(own, mesh.world, mesh.tracker)))

        probe_tokens_A = None if targets is None else targets.probe_tokens_B
        request = RoutingRequest(
            weights.batch_info[i], probe_tokens_A, keep_choices=bool(watchers), on_reports=start_counts
        )
        teacher = None if self.distillation is None else self.distillation.outputs(batch)
        with record_function("forward"):  # each of the step's four profiler ranges costs microseconds
            outputs, reports = forward(self.parallel, batch, self.group_of_modality, request, losses=True, teacher=teacher)
        losses_BS, kl_BS = (outputs, None) if teacher is None else outputs.unbind()
        own, wait = running.pop()
        counts = wait()
        loss = micro_loss(
            losses_BS,
            joined([report.aux for report in reports]),
            batch,
            num_modalities=len(self.group_of_modality),
            tables=self._tables,
            aux=aux,
            labels_in_step=weights.labels_in_step,
            share=weights.share_I[i],
            counts=counts,
            share_G=None if weights.share_IG is None else weights.share_IG[i],
            load=self.load,
        )
        nats_S2 = None
        if weights.source_ISB is not None:
            both = (losses_BS.detach(), batch.labels_BS != IGNORED)
            nats_S2 = weights.source_ISB[i] @ torch.stack([each.sum(1, dtype=torch.float64) for each in both], dim=1)
        for watcher in watchers:
            watcher.add(batch, reports)
        if self.distillation is not None and kl_BS is not None:
            loss = self.distillation.add(loss, losses_BS, kl_BS, weights.labels_in_step)
        del outputs, losses_BS, kl_BS, teacher  # frees the logits' memory before backward
        if self.tuning is not None and targets is not None:
            loss = self.tuning.add(loss, reports, targets)
        with record_function("backward"):
            loss.total.backward()
        sent = added([report.sent for report in reports])
        return Forwarded(loss._replace(total=loss.total.detach()), counts, own, sent, nats_S2=nats_S2)

    def _share(
        self, found: Forwarded, labels_M: Tensor, tokens: int, stop_requested: bool, clock: BusyClock, read: tuple[int, Any]
    ) -> StepSums[Any]:
        """Returns this rank's contribution to the step's sums. Keeps this rank's readings for the next step. `read` has the
        checksum and the counts of this rank's token ids."""
        inter_node = self.comm_stats.inter_node_bytes  # before `take`, which sets this counter to 0
        payload, metadata, seconds = self.comm_stats.take()  # a host sync on CUDA, where it waits for the seconds
        loss, (reader, readers) = found.loss, self.parallel.reader
        digest_D, words_DK, nats_D2 = np.zeros(readers), np.zeros((readers, WORDS)), labels_M.new_zeros((readers, 2))
        (digest_D[reader], words_DK[reader]), total_D = read, labels_M.new_zeros(readers)
        nats_D2[reader] = torch.stack([loss.nll_M.sum().to(labels_M.dtype), labels_M.sum()])
        total_D[reader] = loss.total
        readings = self._read(clock.seconds(seconds), found.busiest_G)
        nats_S2 = np.zeros((0, 2)) if found.nats_S2 is None else found.nats_S2
        self._readings = readings._replace(
            digest_D=digest_D, nats_D2=nats_D2, nats_S2=nats_S2, total_D=total_D, words_DK=words_DK
        )
        traffic = {"payload_bytes": payload, "inter_node_bytes": inter_node, "metadata_bytes": metadata}
        norm_squared = self._norm_squared()
        sent, ledger = count_ledger(found.own, found.sent, self.placement, self.parallel.mesh.ep_rank)
        return StepSums(
            norm_squared=norm_squared,
            balance=loss.balance,
            z=loss.z,
            auxiliary=loss.auxiliary,
            nll_M=loss.nll_M,
            labels_M=labels_M,
            ledger={**ledger, **traffic},
            comm_seconds=seconds,
            tokens=tokens,
            stop_requested=stop_requested,
            overflow=sent.overflow,
        )

    def _read(self, seconds: float, busiest_G: Tensor | None) -> Readings:
        """Returns readings of all ranks in which only this rank's row is filled."""
        mesh, num_groups = self.parallel.mesh, len(self.placement.groups)
        seconds_W, memory_W3 = np.zeros(mesh.world_size), np.zeros((mesh.world_size, 3))
        seconds_W[mesh.rank], memory_W3[mesh.rank] = seconds, largest_memory(mesh.device)
        if busiest_G is None:
            return Readings(seconds_W, memory_W3, np.zeros((mesh.world_size, num_groups)))
        busiest_WG = busiest_G.new_zeros((mesh.world_size, num_groups))
        busiest_WG[mesh.rank] = busiest_G
        return Readings(seconds_W, memory_W3, busiest_WG)

    def _norm_squared(self) -> Tensor:
        """Returns this rank's part of the squared gradient norm, 0-d float64."""
        replicas = ((each.parameter, self.parallel.replicas(each)) for each in self.parallel.parameters)
        return local_norm_squared(replicas, device=self.parallel.mesh.device)

    def _apply(self, norm: Tensor, lr: float) -> None:
        """Clips the gradients, whose total norm is `norm`, and updates the weights."""
        if self.clip_norm is not None:
            clip_by_norm((info.parameter for info in self.parallel.parameters), norm, self.clip_norm)
        set_lr(self.optimizer, lr)
        with record_function("optimizer"), self.parallel.mesh.tracker.among("the optimizer's step"):
            self.optimizer.step()

    def _clear(self) -> None:
        """Clears the gradients for the next step."""
        self.parallel.clear_gradients()

    def _result(
        self, sums: StepSums[np.ndarray], readings: Readings, counts: RoutingCounts[np.ndarray], *, skipped: bool
    ) -> StepResult:
        depth, model = counts.depth, self.parallel.model
        more = {} if depth is None else {"agreed_L": depth.agreed_P, "weight_L": depth.weight_P}
        return StepResult(
            nll_M=sums.nll_M,
            labels_M=sums.labels_M.astype(np.int64),
            balance=float(sums.balance),
            z=float(sums.z),
            auxiliary=float(sums.auxiliary),
            grad_norm=float(np.sqrt(sums.norm_squared)),
            skipped=skipped,
            tokens=int(sums.tokens),
            counts=counts,
            ledger={key: round(float(value)) for key, value in sums.ledger.items()},
            comm_seconds=float(sums.comm_seconds) / self.parallel.mesh.world_size,
            busy_seconds_W=readings.seconds_W,
            memory_W3=readings.memory_W3,
            busiest_G=readings.busiest_WG.max(0) if len(readings.busiest_WG) else np.zeros(0),
            data_D3=np.column_stack([readings.digest_D, readings.nats_D2]),
            total_D=readings.total_D,
            words_DK=readings.words_DK,
            sources_S2=readings.nats_S2,
            stop_requested=bool(sums.stop_requested > 0),
            mixture_of_depths=None if depth is None else depth_statistics(model, self.placement, depth, **more),
        )


def largest_memory(device: torch.device) -> tuple[float, float, float]:
    """Returns three numbers: the most MiB that torch's allocator had allocated on the GPU since the process began, the most
    MiB that it had reserved, and its number of retries (no free memory, so it emptied its cache). On a CPU both sizes are
    the process's largest resident memory. Needs no sync."""
    if device.type != "cuda":
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB
        return resident, resident, 0.0
    stats = torch.cuda.memory_stats(device)
    sizes = (stats.get(f"{kind}_bytes.all.peak", 0) / (1 << 20) for kind in ("allocated", "reserved"))
    return *sizes, float(stats.get("num_alloc_retries", 0))
