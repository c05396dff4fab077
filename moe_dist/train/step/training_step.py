"""One optimizer step over all ranks: forward, backward, a check for nan and inf, update. `trainer.py` has the loop.

Besides the collectives of the layers, a step sums four things over the ranks: the label counts before the first forward,
the routing counts of each micro-batch, the gradients, and one vector with squared gradient norm, losses, stop requests and
statistics. Every rank issues the same collectives in the same order.
"""

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from moe_dist.comm.collectives import CommStats, from_host, sum_over
from moe_dist.comm.names import LABEL_COUNTS, STEP_SUMS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import Batch
from moe_dist.errors import ResourceError
from moe_dist.moe.balance.step_load import StepLoad
from moe_dist.moe.dispatch.ledger import LEDGER_KEYS, compare
from moe_dist.moe.dispatch.static import OVERFLOW
from moe_dist.moe.losses import ColumnTables
from moe_dist.moe.routing.counts import StepCounts
from moe_dist.moe.routing.types import GlobalBatchInfo, LayerReport, RoutingRequest
from moe_dist.monitor.statistics import StepResult
from moe_dist.optim.optimizer import clip_by_norm, local_norm_squared, set_lr
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.objective.distillation import Distillation
from moe_dist.train.objective.loss import (
    AuxSettings,
    MicroLoss,
    counts_from,
    depth_statistics,
    forward,
    global_counts,
    labels_by_modality,
    micro_loss,
    step_counts,
)
from moe_dist.train.router_tuning.tuning import RouterTuning, Targets
from moe_dist.train.step.tracing import StepWatcher


class AfterStep(Protocol):
    """A controller that changes biases or thresholds of routers after the optimizer's step, equally on all ranks."""

    def after_step(self, counts: StepCounts[Tensor]) -> None:
        """Is called after each step that was not skipped, with the step's counts over all ranks. Must issue no collective
        and no host sync."""
        ...


class Weights(NamedTuple):
    """Divisor and weights of the terms of a step's loss, from counts over all ranks."""

    labels_in_step: Tensor  # number of labels over all ranks, at least 1
    share_I: Tensor  # weight of each micro-batch's auxiliary terms
    share_IG: Tensor | None  # weights of auxiliary terms by micro-batch and group; None to use `share_I`
    batch_info: Sequence[GlobalBatchInfo | None]


class TrainingStep:
    """Takes training steps with one model and optimizer. A step with tensor or pipeline parallelism
    (`PipelineStep`) overrides `_losses`, `_norm_squared`, `_apply` and `_clear`.

    Args:
        parallel: The model on its device mesh.
        placement: Experts of each EP rank. From the placement the ledger computes the token rows that other dispatchers
            would send.
        group_of_modality: Index of the expert group of each modality, in the order of the manifest.
        clip_norm: Largest norm of the gradient of all parameters; a larger gradient is scaled down. None not to limit the
            norm.
        comm_stats: Counts bytes and seconds of the model's exchanges.
        controllers: Controllers, called in this order after each step that was not skipped.
        needs_global_batch_info: True if a router or dropout needs the token counts of all ranks. The token counts cost a
            host sync at the beginning of the step.
        tuning: Adds the manifold term of router tuning to the loss; each batch is then a `SampleBatch`.
        distillation: Replaces cross entropy, wholly or in part, by the KL divergence from a teacher.
        load: Expert loads for the balance loss, one of `controllers`. With `load`, auxiliary terms are means over the
            tokens of the step; without `load`, means over a micro-batch, weighted by the micro-batch's fraction of the
            step's labels.
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
        self.comm_stats, self.controllers, self.tuning = comm_stats, tuple(controllers), tuning
        self.needs_global_batch_info, self.distillation, self.load = needs_global_batch_info, distillation, load
        # Readings of the last step, flattened from [W ranks, 4 + G]: this rank's row has the rank's busy seconds,
        # `largest_memory` and `OwnCounts.busiest`; the other rows are 0 until the ranks' tensors are summed. Empty before
        # the first step.
        self._readings = torch.zeros(0, dtype=torch.float64, device=device)
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
    ) -> StepResult:
        """Takes one step with this rank's micro-batches.

        Besides the dispatchers' syncs, the host syncs with the device only at the end (on CUDA for the seconds of
        exchanges, for this rank's counts in the ledger, for all sums over the ranks), and at the start with
        `needs_global_batch_info`.

        Args:
            began: Value of time.perf_counter at which the rank began the step; None to take the time of the call.
            number: Number of the step (0-based), which is part of the seed of random draws.
            watchers: Objects that get the expert choices of every token of the step.
        """
        mesh, num_modalities = self.parallel.mesh, len(self.group_of_modality)
        clock = _BusyClock(mesh.tracker, time.perf_counter() if began is None else began)
        tokens = sum(batch.num_tokens for batch in batches) if self.parallel.counts_tokens else 0
        targets = None if self.tuning is None else self.tuning.begin(batches, number, mesh.device)
        batches = [batch.to(mesh.device) for batch in batches]
        labels_M = torch.stack(  # [micro-batches, M]: number of labels on this rank
            [labels_by_modality(each.labels_BS, each.label_modality_BS, num_modalities) for each in batches]
        )
        if not self.parallel.counts_tokens:
            labels_M.zero_()
        num_groups, needed = len(self.placement.groups), self.needs_global_batch_info
        members = self._count_members(batches if needed else [], num_groups)
        weighed = batches if self.load is not None else []
        tokens_IG = _group_tokens(weighed, self.group_of_modality, num_groups, mesh.device)
        # The same all-reduce gathers the ranks' readings of the previous step. Sums of counts are exact in any order.
        parts = [labels_M.sum(1), self._readings, members.flatten(), tokens_IG.flatten()]
        counts = sum_over(torch.cat(parts), mesh.world, name=LABEL_COUNTS, tracker=mesh.tracker)
        micro_labels, readings, flat, summed = counts.split([len(part) for part in parts])
        tokens_IG = summed.view_as(tokens_IG)
        labels_in_step = micro_labels.sum().clamp_min(1.0)
        batch_info = self._batch_infos(batches, flat.view_as(members), number)
        self.comm_stats.take()  # discards bytes counted in evaluations since the last step

        share_I, share_IG = micro_labels / labels_in_step, None
        if self.load is not None:
            share_I = tokens_IG.sum(1) / tokens_IG.sum().clamp_min(1.0)
            share_IG = tokens_IG / tokens_IG.sum(0).clamp_min(1.0)
        weights = Weights(labels_in_step, share_I, share_IG, batch_info)
        own = OwnCounts(self.placement)
        losses = self._losses(batches, aux, weights, own, targets=targets, watchers=watchers)
        inter_node = self.comm_stats.inter_node_bytes  # read before `take` sets this counter to 0
        payload, metadata, seconds = self.comm_stats.take()  # host sync, which the seconds on CUDA need
        readings_WX = np.zeros((mesh.world_size, 4 + num_groups))
        readings_WX[mesh.rank, :4] = (clock.seconds(seconds), *largest_memory(mesh.device))
        table = from_host(readings_WX.flatten(), torch.float64, mesh.device).view(readings_WX.shape)
        if (busiest_G := own.busiest()) is not None:
            table[mesh.rank, 4:] = busiest_G
        self._readings = table.flatten()
        traffic = {"payload_bytes": payload, "inter_node_bytes": inter_node, "metadata_bytes": metadata}
        host = [seconds, float(tokens), float(stop_requested)]
        local = self._pack(losses, labels_M.sum(0), own, traffic, host)
        summed = sum_over(local, mesh.world, name=STEP_SUMS, tracker=mesh.tracker)
        result = self._update(summed, losses, lr, readings)
        for watcher in watchers:
            watcher.finish(number)
        return result

    def _count_members(self, batches: Sequence[Batch], num_groups: int) -> Tensor:
        """Returns token counts, float64 [R, I, G] by reader (rank, or ranks with the same sequences), micro-batch and
        group. This rank's entry has the counts, the other entries are 0, so that the sum over the ranks has all counts."""
        reader, readers = self.parallel.reader
        tokens_IG = _group_tokens(batches, self.group_of_modality, num_groups, self.parallel.mesh.device)
        members_RIG = tokens_IG.new_zeros((readers, *tokens_IG.shape))
        if self.parallel.counts_tokens:
            members_RIG[reader] = tokens_IG
        return members_RIG

    def _batch_infos(self, batches: Sequence[Batch], members_RIG: Tensor, step: int) -> list[GlobalBatchInfo | None]:
        """Returns each micro-batch's `GlobalBatchInfo` from the token counts of all readers; None if `members_RIG` is
        empty.

        The i-th micro-batch must have the same shape on every rank.
        """
        if not members_RIG.numel():
            return [None] * len(batches)
        # Device-to-host sync. From the copied counts the exchanges know their split sizes without further syncs.
        flat = self.comm_stats.to_host("tokens of each rank and group", members_RIG.to(torch.int64).flatten())
        counts_RIG, batch_info, first = np.array(flat).reshape(members_RIG.shape), [], 0
        reader, readers = self.parallel.reader
        for i, batch in enumerate(batches):
            length = batch.tokens_BS.numel()
            batch_info.append(
                GlobalBatchInfo(
                    step=step,
                    first_token=first,
                    rank=reader,
                    tokens_W=(length,) * readers,
                    members_WG=tuple(tuple(row) for row in counts_RIG[:, i].tolist()),
                )
            )
            first += length * readers
        return batch_info

    def _losses(
        self,
        batches: Sequence[Batch],
        aux: AuxSettings,
        weights: Weights,
        own: "OwnCounts",
        *,
        targets: Sequence[Targets] | None,
        watchers: Sequence[StepWatcher],
    ) -> list[MicroLoss]:
        """Runs forward and backward of all micro-batches, and sums the gradients over the ranks. Adds the counts in this
        rank's reports to `own`. Returns losses whose sum is this rank's share of the step's loss."""
        losses: list[MicroLoss] = []
        for i, batch in enumerate(batches):
            with self.parallel.micro_batch(last=i + 1 == len(batches)):
                probe_tokens_A = None if targets is None else targets[i].probe_tokens_B
                started: list[Callable[[], StepCounts[Tensor]]] = []
                start = partial(self._start_counts, started)
                request = RoutingRequest(
                    weights.batch_info[i], probe_tokens_A, keep_choices=bool(watchers), on_reports=start
                )
                teacher = None if self.distillation is None else self.distillation.outputs(batch)
                with record_function("forward"):  # all four profiler ranges of a step cost microseconds
                    found, reports = forward(
                        self.parallel, batch, self.group_of_modality, request, losses=True, teacher=teacher
                    )
                losses_BS, kl_BS = (found, None) if teacher is None else found.unbind()
                loss = micro_loss(
                    losses_BS,
                    reports,
                    batch.labels_BS,
                    batch.label_modality_BS,
                    num_modalities=len(self.group_of_modality),
                    tables=self._tables,
                    aux=aux,
                    labels_in_step=weights.labels_in_step,
                    share=weights.share_I[i],
                    counts=started[0](),
                    share_G=None if weights.share_IG is None else weights.share_IG[i],
                    load=self.load,
                )
                for watcher in watchers:
                    watcher.add(batch, reports)
                if self.distillation is not None and kl_BS is not None:
                    loss = self.distillation.add(loss, losses_BS, kl_BS, weights.labels_in_step)
                del found, losses_BS, kl_BS, teacher  # without `del` the autograd graph would outlive backward
                if self.tuning is not None and targets is not None:
                    loss = self.tuning.add(loss, reports, targets[i])
                with record_function("backward"):
                    loss.total.backward()
            # Frees the autograd graph, whose nodes hold the dispatch plans even after backward.
            losses.append(loss._replace(total=loss.total.detach()))
            del loss
            own.add(reports)
        with record_function("reduce gradients"):
            self.parallel.reduce_gradients()
        return losses

    def _start_counts(self, started: list[Callable[[], StepCounts[Tensor]]], reports: Sequence[LayerReport]) -> None:
        """Starts the sum of routing counts, and appends the function that waits for the sum to `started`. While the ranks
        sum, this rank computes output layer and cross entropy."""
        started.append(global_counts(reports, self.parallel.mesh.world, self.parallel.mesh.tracker))

    def _pack(
        self,
        losses: Sequence[MicroLoss],
        labels_M: Tensor,
        own: "OwnCounts",
        traffic: dict[str, int],
        host: list[float],
    ) -> Tensor:
        """Returns a float64 vector with this rank's shares of the squared gradient norm, the losses, the stop requests and
        the statistics, so that one all-reduce sums all of these numbers."""
        device = self.parallel.mesh.device
        squared = self._norm_squared()
        true_choices_G, null_choices_G, tokens_G, sent = own.totals()
        rows_remote, pairs, pairs_remote, rows_padding, overflow = sent
        ledger = compare(
            self.placement,
            self.parallel.mesh.ep_rank % self.placement.num_ranks,  # num_ranks is 1 with LoRA experts
            true_choices_G=true_choices_G,
            null_choices_G=null_choices_G,
            tokens_G=tokens_G,
            rows_remote=rows_remote,
            pairs=pairs,
            pairs_remote=pairs_remote,
            rows_padding=rows_padding,
        )
        numbers = {**ledger, **traffic}
        host = [*(float(numbers[key]) for key in LEDGER_KEYS), *host, float(overflow)]
        terms = [term for loss in losses for term in (loss.balance, loss.z, loss.auxiliary)]
        return torch.cat(
            [
                squared.view(1),
                torch.stack(terms).view(-1, 3).sum(0),
                torch.stack([loss.nll_M for loss in losses]).sum(0),
                labels_M,
                from_host(host, torch.float64, device),
            ]
        )

    def _norm_squared(self) -> Tensor:
        """Returns this rank's share of the squared gradient norm, 0-d float64."""
        replicas = ((each.parameter, self.parallel.replicas(each)) for each in self.parallel.parameters)
        return local_norm_squared(replicas, device=self.parallel.mesh.device)

    def _apply(self, norm: Tensor, lr: float) -> None:
        """Clips the gradients, whose norm is `norm`, and updates the weights."""
        if self.clip_norm is not None:
            clip_by_norm((info.parameter for info in self.parallel.parameters), norm, self.clip_norm)
        set_lr(self.optimizer, lr)
        with record_function("optimizer"), self.parallel.mesh.tracker.among("the optimizer's step"):
            self.optimizer.step()

    def _clear(self) -> None:
        """Clears the gradients for the next step."""
        self.parallel.clear_gradients()

    def _update(self, summed: Tensor, losses: Sequence[MicroLoss], lr: float, readings: Tensor) -> StepResult:
        """Updates the weights if the sums over all ranks are finite, else skips the step. Because all ranks have the same
        sums, and a NaN on one rank makes the sum NaN, all ranks decide equally."""
        num_modalities = len(self.group_of_modality)
        counts = step_counts([loss.counts for loss in losses])
        # One device-to-host sync reads all values, before the update, so that the host does not wait for the update.
        read = torch.cat([summed, readings, *(part.flatten() for part in counts)]).cpu().numpy()
        sums, rows, flat = np.split(read, [len(summed), len(summed) + len(readings)])
        busy_seconds_W, *memory_3W = (table := rows.reshape(-1, 4 + len(self.placement.groups)))[:, :4].T
        shown, values = counts_from(flat, counts), sums.tolist()
        squared, balance, z, auxiliary = values[:4]
        nll_M = np.array(values[4 : 4 + num_modalities])
        labels_M = np.array(values[4 + num_modalities : 4 + 2 * num_modalities])
        host = values[4 + 2 * num_modalities :]
        seconds, tokens, stop, overflow = host[len(LEDGER_KEYS) :]
        if overflow:  # all ranks fail, before any weight changes
            raise ResourceError(f"{OVERFLOW} ({overflow:.0f} in this step, on all ranks)")
        finite = bool(np.isfinite([squared, balance, z, auxiliary, *nll_M]).all())
        if finite:
            self._apply(summed[0].sqrt(), lr)
            for controller in self.controllers:
                controller.after_step(counts)
        self._clear()
        return StepResult(
            nll_M=nll_M,
            labels_M=labels_M.astype(np.int64),
            balance=balance,
            z=z,
            auxiliary=auxiliary,
            grad_norm=float(np.sqrt(squared)),
            skipped=not finite,
            tokens=int(tokens),
            counts=shown,
            ledger={key: round(value) for key, value in zip(LEDGER_KEYS, host, strict=False)},
            comm_seconds=seconds / self.parallel.mesh.world_size,
            busy_seconds_W=busy_seconds_W,
            memory_W3=np.stack(memory_3W, axis=1),
            busiest_G=table[:, 4:].max(0) if len(table) else np.zeros(0),
            stop_requested=stop > 0,
            mixture_of_depths=depth_statistics(
                self.parallel.model,
                self.placement,
                shown.depth_tokens_PG,
                shown.depth_taken_PG,
                agreed_L=shown.depth_agreed_P,
                weight_L=shown.depth_weight_P,
            )
            if shown.depth_tokens_P.size
            else None,
        )


class _BusyClock:
    """Measures the busy time of a rank in a step: the step's time minus the waits for other ranks.

    On a CPU the clock subtracts the host's time in collectives. On CUDA the host does not wait in collectives, and the
    clock subtracts the device's time in the exchanges, which `CommStats.seconds` contains only after `CommStats.drain`.
    """

    def __init__(self, tracker: CollectiveTracker | None, began: float) -> None:
        self._watch, self._began = tracker, began
        self._waited = tracker.waited if tracker is not None else 0.0

    def seconds(self, in_exchanges: float) -> float:
        waited = self._watch.waited - self._waited if self._watch is not None else 0.0
        return max(0.0, time.perf_counter() - self._began - max(waited, in_exchanges))


def largest_memory(device: torch.device) -> tuple[float, float, float]:
    """Returns the largest MiB that torch's allocator has allocated and reserved on the GPU since the process began, and how
    often the allocator found no free memory, emptied the allocator's cache and tried again. On a CPU both sizes are the
    process's largest resident memory. Costs no sync."""
    if device.type != "cuda":
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB
        return resident, resident, 0.0
    stats = torch.cuda.memory_stats(device)
    sizes = (stats.get(f"{kind}_bytes.all.peak", 0) / (1 << 20) for kind in ("allocated", "reserved"))
    return *sizes, float(stats.get("num_alloc_retries", 0))


class OwnCounts:
    """Counts of this rank by layer and micro-batch: choices of true and null experts and tokens by group, and the layers'
    sent token rows and (token, expert) pairs."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._groups = placement.groups
        self._sums: list[tuple[Tensor, ...]] = []
        self._sent_3 = torch.zeros(3, dtype=torch.int64)
        self._by_micro_batch = True

    def add(self, reports: Sequence[LayerReport], *, by_micro_batch: bool = True) -> None:
        """Stores the counts. The counts are summed only in `totals`, because one sum over all layers takes fewer
        launches. `by_micro_batch`: each report is of one micro-batch, not of all micro-batches of the step."""
        self._by_micro_batch &= by_micro_batch
        for each in reports:
            on_device = () if each.sent_5 is None else (each.sent_5,)
            self._sums.append((each.sums.choices_C, each.sums.dropped_E, each.sums.tokens_G, *on_device))
        self._sent_3 += torch.tensor([[r.rows_remote, r.pairs, r.pairs_remote] for r in reports]).sum(0)

    def totals(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Returns, by group, the numbers of choices of true experts that no capacity dropped, of choices of null experts,
        and of tokens; and the sums of `LayerReport.sent_5`."""
        experts = [group.num_experts for group in self._groups]
        nulls = [group.num_null for group in self._groups]
        sizes = [len(each) for each in self._sums[0]]
        summed = torch.cat([part for each in self._sums for part in each]).view(len(self._sums), -1).sum(0)
        choices_C, dropped_E, tokens_G, *sent_5 = summed.split(sizes)
        true_E, null_C = choices_C[: sum(experts)] - dropped_E, choices_C[sum(experts) :][: sum(nulls)]
        true_G = torch.stack([part.sum() for part in true_E.split(experts)])
        null_G = torch.stack([part.sum() for part in null_C.split(nulls)])
        read = torch.cat([true_G, null_G, tokens_G, *sent_5]).tolist()  # device-to-host sync
        true, null, tokens = (read[at * len(experts) : (at + 1) * len(experts)] for at in range(3))
        return true, null, tokens, read[3 * len(experts) :] or [*self._sent_3.tolist(), 0, 0]

    def busiest(self) -> Tensor | None:
        """Returns for each group the largest load of an expert in a layer and micro-batch, over an even share of the
        group's choices: float64 [G], 0 without tokens. A capacity factor of this size drops nothing. Returns None if the
        counts are not those of single micro-batches, or if experts choose tokens. Costs no sync."""
        if not self._by_micro_batch or any(group.token_share is not None for group in self._groups):
            return None
        choices_NC, tokens_NG = (torch.stack([each[at] for each in self._sums]).to(torch.float64) for at in (0, 2))
        most_G = []
        for g, group in enumerate(self._groups):
            even_N = tokens_NG[:, g] * (group.expected_experts_per_token / group.num_experts)
            choices_Nn = choices_NC[:, group.first_expert : group.first_expert + group.num_experts]
            most_G.append((choices_Nn.amax(1) / even_N.clamp_min(1e-9)).amax())
        return torch.stack(most_G)


def _group_tokens(batches: Sequence[Batch], group_of_modality: Tensor, num_groups: int, device: torch.device) -> Tensor:
    """Returns this rank's token counts by micro-batch and group, float64 [I, G]."""
    groups, tokens_IG = torch.arange(num_groups, device=device), []
    for batch in batches:
        group_BS = torch.where(batch.padding_BS, -1, group_of_modality[batch.modality_BS])
        tokens_IG.append((group_BS.flatten()[:, None] == groups).sum(0, dtype=torch.float64))
    return torch.stack(tokens_IG) if tokens_IG else torch.zeros((0, num_groups), dtype=torch.float64, device=device)
