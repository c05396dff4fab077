"""One optimizer step over all ranks: forward, backward, one vote, update. The loop around it is in `trainer.py`.

Collectives of a step, besides those of the layers: the label counts before the first forward, the routing counts of each
micro-batch, the gradients, and one packed vector that is norm, vote and statistics at once. Every rank issues the same.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from moe_dist.comm.collectives import CommStats, sum_over
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.dispatch.ledger import LEDGER_KEYS, compare
from moe_dist.moe.losses import ColumnTables
from moe_dist.moe.routers.thresholds import ThresholdUpdater
from moe_dist.moe.routing import LayerReport
from moe_dist.monitor.statistics import DepthStatistics
from moe_dist.optim.adamw import clip_by_norm, local_norm_squared, set_lr
from moe_dist.parallel.global_batch_info import batch_info_of, count_members
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.evaluation.heldout import forward
from moe_dist.train.loss import AuxSettings, DepthCounts, GlobalCounts, MicroLoss, micro_loss
from moe_dist.train.router_tuning.tuning import RouterTuning


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks and micro-batches of one step; plain numbers.

    Attributes:
        nll_M, labels_M: Token losses (nats) and scored labels by the label's modality.
        balance, z: The balance terms as they entered the loss.
        auxiliary: The term of auxiliary routers, or of router tuning, as it entered the loss; 0 without either.
        grad_norm: Global norm before clipping, not finite where the step was skipped.
        skipped: No rank took the step, since the loss or a gradient was not finite.
        tokens: Input tokens without padding.
        choices_LC, tokens_LG, entropy_LG: Routing counts, see `moe_dist.monitor.statistics`.
        dropped_LE: int64, choices of each true expert that a capacity dropped.
        above_LE, unrouted_LG: int64, where experts choose: tokens above each expert's threshold, and tokens that none took.
            Else without columns.
        ledger: Sums of the dispatch ledger, by `moe_dist.moe.dispatch.ledger.LEDGER_KEYS`.
        comm_seconds: Mean over ranks of the time inside the exchanges.
        stop_requested: At least one rank was asked to stop.
        mixture_of_depths: Of the layers that compute a share of the tokens alone; None without any.
        busy_seconds_W: For each rank, how long it computed and read data in the step before, waiting for peers left out;
            empty in the first step.
    """

    nll_M: np.ndarray
    labels_M: np.ndarray
    balance: float
    z: float
    auxiliary: float
    grad_norm: float
    skipped: bool
    tokens: int
    choices_LC: np.ndarray
    tokens_LG: np.ndarray
    entropy_LG: np.ndarray
    dropped_LE: np.ndarray
    above_LE: np.ndarray
    unrouted_LG: np.ndarray
    ledger: Mapping[str, int]
    comm_seconds: float
    stop_requested: bool
    mixture_of_depths: DepthStatistics | None = None
    busy_seconds_W: np.ndarray = field(default_factory=lambda: np.zeros(0))


class TrainingStep:
    """Takes steps with one model and optimizer.

    Args:
        parallel: The model on its mesh.
        optimizer: Over this rank's parameters.
        placement: For the ledger's closed forms.
        group_of_modality: Expert group of each modality, in the data's order of modalities.
        clip_norm: Bound of the global gradient norm, or None.
        comm_stats: Counter of the model's wires.
        balance: Moves the selection biases after each step that was taken; None where nothing does.
        thresholds: Follows each step that was taken, where experts choose their tokens and the router is trained.
        needs_global_batch_info: A router asks for what is known of a micro-batch on all ranks. It rides along with the label counts and
            costs a host sync at the step's beginning.
        mixture_of_depths: Moves the thresholds of depth routers after each step that was taken, where the model has some.
        tuning: Adds the term of router tuning; the batches are of its samples then.
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
        balance: BiasController | None = None,
        thresholds: ThresholdUpdater | None = None,
        needs_global_batch_info: bool = False,
        mixture_of_depths: ThresholdUpdater | None = None,
        tuning: RouterTuning | None = None,
    ) -> None:
        self.parallel = parallel
        self.optimizer = optimizer
        self.placement = placement
        self.group_of_modality = torch.tensor(group_of_modality, device=parallel.mesh.device)
        self.clip_norm = clip_norm
        self.comm_stats = comm_stats
        self.balance = balance
        self.thresholds = thresholds
        self.needs_global_batch_info = needs_global_batch_info
        self.mixture_of_depths = mixture_of_depths
        self.tuning = tuning
        self._no_times = torch.zeros(parallel.mesh.world_size, dtype=torch.float64, device=parallel.mesh.device)
        self._times = self._no_times[:0]
        self._tables = ColumnTables.on(placement.groups, parallel.mesh.device)

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        aux: AuxSettings,
        stop_requested: bool = False,
        began: float | None = None,
        number: int = 0,
    ) -> StepResult:
        """One step over this rank's micro-batches. `began` is when the rank turned to it (time.perf_counter), if earlier;
        `number` is the step's (0-based) and names its random draws.

        Syncs with the host at its end only, besides the dispatchers: for this rank's own counts, which the ledger is made
        of, and for the summed vector and counts.
        """
        mesh = self.parallel.mesh
        clock = _BusyClock(mesh.tracker, time.perf_counter() if began is None else began)
        tokens = sum(batch.num_tokens for batch in batches)
        targets = None if self.tuning is None else self.tuning.begin(batches, number, mesh.device)
        batches = [batch.to(mesh.device) for batch in batches]
        labels_M = self._count_labels(batches)
        # The times of the step before ride along: sums of counts are exact in any order, so they change no bit.
        members = count_members(
            batches, self.group_of_modality, mesh, len(self.placement.groups), asked=self.needs_global_batch_info
        )
        counts = torch.cat([labels_M.sum(1), self._times, members.flatten()])
        counts = sum_over(counts, mesh.world, name="label counts", tracker=mesh.tracker)
        micro_labels, times_W, flat = counts.split([len(batches), len(self._times), members.numel()])
        labels_in_step = micro_labels.sum().clamp_min(1.0)
        batch_info = batch_info_of(batches, flat.view_as(members), mesh, number, self.comm_stats)
        self.comm_stats.take()

        losses, forward_rows = [], torch.zeros(3, dtype=torch.float64)
        own = _OwnCounts(self.placement)
        for i, batch in enumerate(batches):
            with self.parallel.micro_batch(last=i + 1 == len(batches)):
                probe_tokens_A = None if targets is None else targets[i].probe_tokens_B
                logits, reports = forward(self.parallel, batch, self.group_of_modality, batch_info[i], probe_tokens_A)
                loss = micro_loss(
                    logits,
                    reports,
                    batch.labels_BS,
                    batch.label_modality_BS,
                    num_modalities=len(self.group_of_modality),
                    tables=self._tables,
                    aux=aux,
                    labels_in_step=labels_in_step,
                    share=micro_labels[i] / labels_in_step,
                    world=mesh.world,
                    tracker=mesh.tracker,
                )
                del logits
                if self.tuning is not None and targets is not None:
                    loss = self.tuning.add(loss, reports, targets[i])
                loss.total.backward()
            # Let go of the graph: its nodes hold the dispatch plans, which backward does not free.
            losses.append(loss._replace(total=loss.total.detach()))
            del loss
            forward_rows += torch.tensor([[r.rows_remote, r.pairs, r.pairs_remote] for r in reports]).sum(0)
            own.add(reports)
        self.parallel.reduce_gradients()
        self._times = self._no_times.clone()
        self._times[mesh.rank] = clock.seconds(self.comm_stats.seconds)
        local = self._pack(losses, labels_M.sum(0), own, forward_rows, [float(tokens), float(stop_requested)])
        summed = sum_over(local, mesh.world, name="norm, vote and statistics", tracker=mesh.tracker)
        return replace(self._vote_and_update(summed, losses, lr), busy_seconds_W=times_W.cpu().numpy())

    def _count_labels(self, batches: Sequence[Batch]) -> Tensor:
        """Scored labels of each micro-batch and modality on this rank, float64 [micro-batches, M]."""
        modalities = torch.arange(len(self.group_of_modality), device=self.parallel.mesh.device)
        rows = []
        for batch in batches:
            member = batch.label_modality_BS.flatten()[:, None] == modalities
            rows.append((member & (batch.labels_BS != IGNORED).flatten()[:, None]).sum(0))
        return torch.stack(rows).to(torch.float64)

    def _pack(
        self,
        losses: Sequence[MicroLoss],
        labels_M: Tensor,
        own: "_OwnCounts",
        forward_rows: Tensor,
        tokens_and_stop: list[float],
    ) -> Tensor:
        """This rank's part of norm, vote and statistics as one float64 vector, so that they take one all-reduce."""
        device = self.parallel.mesh.device
        squared = local_norm_squared(((info.parameter, info.replicas) for info in self.parallel.parameters), device=device)
        between_nodes = self.comm_stats.inter_node_bytes
        payload, metadata, seconds = self.comm_stats.take()
        rows_remote, pairs, pairs_remote = (int(value) for value in forward_rows)
        true_choices_G, null_choices_G, tokens_G = own.totals()
        ledger = compare(
            self.placement,
            self.parallel.mesh.ep_rank % self.placement.num_ranks,  # that of LoRA experts has one rank, whatever ep is
            true_choices_G=true_choices_G,
            null_choices_G=null_choices_G,
            tokens_G=tokens_G,
            rows_remote=rows_remote,
            pairs=pairs,
            pairs_remote=pairs_remote,
        )
        numbers = {
            **ledger,
            "payload_bytes": payload,
            "inter_node_bytes": between_nodes,
            "metadata_bytes": metadata,
        }
        host = [*(float(numbers[key]) for key in LEDGER_KEYS), seconds, *tokens_and_stop]
        return torch.cat(
            [
                squared.view(1),
                torch.stack([loss.balance for loss in losses]).sum().view(1),
                torch.stack([loss.z for loss in losses]).sum().view(1),
                torch.stack([loss.auxiliary for loss in losses]).sum().view(1),
                torch.stack([loss.nll_M for loss in losses]).sum(0),
                labels_M,
                torch.tensor(host, dtype=torch.float64, device=device),
            ]
        )

    def _vote_and_update(self, summed: Tensor, losses: Sequence[MicroLoss], lr: float) -> StepResult:
        """All ranks see the same sums, so all take the step or none does; a NaN anywhere reaches every rank in them."""
        num_modalities = len(self.group_of_modality)
        values = summed.tolist()  # host sync: norm, vote and statistics
        squared, balance, z, auxiliary = values[:4]
        nll_M = np.array(values[4 : 4 + num_modalities])
        labels_M = np.array(values[4 + num_modalities : 4 + 2 * num_modalities])
        host = values[4 + 2 * num_modalities :]
        finite = bool(np.isfinite([squared, balance, z, auxiliary, *nll_M]).all())
        counts = GlobalCounts(*(torch.stack(part).sum(0) for part in zip(*(loss.counts for loss in losses), strict=True)))
        if finite:
            norm = summed[0].sqrt()
            if self.clip_norm is not None:
                clip_by_norm((info.parameter for info in self.parallel.parameters), norm, self.clip_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            if self.thresholds is not None:
                self.thresholds(counts.kth_score_LE, counts.tokens_LG)
            if self.balance is not None:
                self.balance.update(counts.choices_LC, counts.tokens_LG)
        mixture_of_depths = _sum_depths(losses)
        if finite and self.mixture_of_depths is not None and mixture_of_depths is not None:
            self.mixture_of_depths(mixture_of_depths.kth_score_L, mixture_of_depths.tokens_L)
        # The optimizer knows neither empty nor frozen parameters; all gradients go.
        self.parallel.model.zero_grad(set_to_none=True)
        widths = [part.shape[1] for part in counts]
        shown = np.split(torch.cat(counts, dim=1).cpu().numpy(), np.cumsum(widths)[:-1], axis=1)
        choices_LC, tokens_LG, entropy_LG, dropped_LE, _, above_LE, unrouted_LG = shown
        seconds, tokens, stop = host[len(LEDGER_KEYS) :]
        return StepResult(
            nll_M=nll_M,
            labels_M=labels_M.astype(np.int64),
            balance=balance,
            z=z,
            auxiliary=auxiliary,
            grad_norm=float(np.sqrt(squared)),
            skipped=not finite,
            tokens=int(tokens),
            choices_LC=choices_LC.astype(np.int64),
            tokens_LG=tokens_LG.astype(np.int64),
            entropy_LG=entropy_LG,
            dropped_LE=dropped_LE.astype(np.int64),
            above_LE=above_LE.astype(np.int64),
            unrouted_LG=unrouted_LG.astype(np.int64),
            ledger={key: round(value) for key, value in zip(LEDGER_KEYS, host, strict=False)},
            comm_seconds=seconds / self.parallel.mesh.world_size,
            stop_requested=stop > 0,
            mixture_of_depths=None if mixture_of_depths is None else self._depth_statistics(mixture_of_depths),
        )

    def _depth_statistics(self, mixture_of_depths: DepthCounts) -> DepthStatistics:
        """On the host, in one copy behind that of the counts."""
        columns = [
            mixture_of_depths.agreed_L[:, None],
            mixture_of_depths.weight_L[:, None],
            mixture_of_depths.members_LG,
            mixture_of_depths.taken_LG,
        ]
        table = torch.cat(columns, dim=1).cpu().numpy()
        tokens_LG, taken_LG = np.split(table[:, 2:].astype(np.int64), 2, axis=1)
        model = self.parallel.model
        return DepthStatistics(
            layers=model.args.depth_layers,
            capacity=model.depth_routers()[0].capacity,
            groups=tuple(group.name for group in self.placement.groups),
            tokens_LG=tokens_LG,
            taken_LG=taken_LG,
            agreed_L=table[:, 0].astype(np.int64),
            weight_L=table[:, 1],
        )


def _sum_depths(losses: Sequence[MicroLoss]) -> DepthCounts | None:
    """Over the step's micro-batches."""
    parts = [loss.mixture_of_depths for loss in losses if loss.mixture_of_depths is not None]
    return DepthCounts(*(torch.stack(each).sum(0) for each in zip(*parts, strict=True))) if parts else None


class _BusyClock:
    """Times what a rank does in a step, without what it waits for: the host's time inside collectives, or on CUDA, where
    the host does not wait in them, the device's time inside the exchanges (known only after `CommStats.drain`)."""

    def __init__(self, tracker: CollectiveTracker | None, began: float) -> None:
        self._watch, self._began = tracker, began
        self._waited = tracker.waited if tracker is not None else 0.0

    def seconds(self, in_exchanges: float) -> float:
        waited = self._watch.waited - self._waited if self._watch is not None else 0.0
        return max(0.0, time.perf_counter() - self._began - max(waited, in_exchanges))


class _OwnCounts:
    """This rank's taken true choices, null choices and tokens by group, summed on the device until they are read."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._groups = placement.groups
        self._sums: list[Tensor] = []

    def add(self, reports: Sequence[LayerReport]) -> None:
        experts = [group.num_experts for group in self._groups]
        nulls = [group.num_null for group in self._groups]
        for report in reports:
            true_E = report.sums.choices_C[: sum(experts)] - report.sums.dropped_E
            true_G = torch.stack([part.sum() for part in true_E.split(experts)])
            null_C = report.sums.choices_C[sum(experts) :][: sum(nulls)]
            null_G = torch.stack([part.sum() for part in null_C.split(nulls)])
            self._sums.append(torch.stack([true_G, null_G, report.sums.tokens_G]))

    def totals(self) -> tuple[list[int], list[int], list[int]]:
        """Taken true choices, null choices and tokens of each group. Syncs with the host."""
        true_G, null_G, tokens_G = torch.stack(self._sums).sum(0).tolist()
        return true_G, null_G, tokens_G
