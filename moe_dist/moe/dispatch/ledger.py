"""Makes the traffic ledger of one rank: the number of rows that dispatch sent, and the numbers of rows that other methods
would have sent for the same choices. Rows and pairs are counted in forward only, bytes in forward and backward.

`rows_remote`, `pairs`, `pairs_remote` and `rows_padding` are measured (`SentCounts`; `hierarchical` counts the rows of both
hops). Padding rows, which only `static` sends, are not in `rows_remote`, but their bytes are in `payload_bytes`. The
following row counts are computed from this rank's choices. All of them except `rows_per_pair` and `rows_bound` assume that
choices are spread evenly over the n experts of a group. If `own` of the n experts are on this rank, the fraction 1 - own/n
of the choices then leaves the rank:

    rows_per_pair       one row for each pair with an expert on another rank, without deduplication
    rows_topk           one row for each choice, if tokens chose k true experts and no null experts
    rows_same_active    one row for each choice, if the taken true experts were spread evenly
    rows_null_remapped  rows_per_pair, plus one row for each null choice, as if a true expert took it
    rows_bound          the largest possible number if a token sends at most one row to a rank: per token top_k, or the
                        number of ranks of the node groups that it may use (`ExpertPlacement.most_rows`, no replicas)

CommStats counts bytes when a collective is called. `payload_bytes` are the bytes of rows, and `inter_node_bytes` those of
rows that leave the node (0 if the dispatcher does not distinguish nodes). `metadata_bytes` are all other bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.collectives import CommStats, pack, unpack
from moe_dist.moe.routing.counts import RoutingCounts, SentCounts
from moe_dist.placement.placement import ExpertPlacement


class ModuleTraffic(CommStats):
    """Counts the traffic of one module of experts in a model that another trainer trains, for that trainer's ledger.

    It counts no seconds: on CUDA the events of each wait would stay in memory until somebody reads them.

    Attributes:
        slots: The experts of each EP rank. `ep_rank` is this rank's position.
        training: Nothing is counted while it is False, as in an evaluation.
    """

    def __init__(self, slots: tuple[tuple[int, ...], ...], ep_rank: int) -> None:
        super().__init__()
        self.slots, self.ep_rank, self.training = slots, ep_rank, True
        self._counts = [0] * 5

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        yield

    def count(self, name: str, num_bytes: int, *, payload: bool, between_nodes: bool = False) -> None:
        """Counts bytes, also those that a recomputed forward sends again."""
        if self.training:
            super().count(name, num_bytes, payload=payload, between_nodes=between_nodes)

    def add(self, sent: SentCounts, tokens: int, choices: int) -> None:
        """Adds a forward, unless backward recomputes it. `choices` counts absent choices as well."""
        if self.training and not in_backward():
            new = (sent.rows_remote, sent.pairs, sent.pairs_remote, tokens, choices)
            self._counts = [total + each for total, each in zip(self._counts, new, strict=True)]

    def take_counts(self) -> tuple[int, ...]:
        """Returns the numbers since the last call: rows and pairs as in `SentCounts`, tokens, choices, and bytes of payload
        and of metadata."""
        counts, self._counts = self._counts, [0] * 5
        return (*counts, *self.take()[:2])


def in_backward() -> bool:
    """Returns whether backward runs in this thread. A forward then is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def compare(
    placement: ExpertPlacement,
    ep_rank: int,
    sent: SentCounts,
    *,
    true_choices_G: Sequence[int],
    null_choices_G: Sequence[int],
    tokens_G: Sequence[int],
) -> Mapping[str, float]:
    """Returns the numbers of rows and pairs of one rank's ledger, from sums over layers and micro-batches.

    Args:
        sent: Sums of the layers' `LayerReport.sent`.
        true_choices_G: Number of true (not null) choices of this rank's tokens of each group, without dropped choices.
        null_choices_G: Number of null choices of this rank's tokens of each group.
        tokens_G: Number of this rank's routed tokens of each group.
    """
    topk = same_active = nulls = bound = 0.0
    by_group = zip(placement.groups, true_choices_G, null_choices_G, tokens_G, strict=True)
    for group, taken, null, tokens in by_group:
        remote_share = 1.0 - len(placement.local_experts(ep_rank, group)) / group.num_experts
        topk += remote_share * min(group.top_k, group.num_experts) * tokens
        same_active += remote_share * taken
        nulls += remote_share * null
        bound += placement.most_rows(ep_rank, group) * tokens
    return {
        "rows_remote": sent.rows_remote,
        "pairs": sent.pairs,
        "pairs_remote": sent.pairs_remote,
        "rows_per_pair": sent.pairs_remote,
        "rows_topk": topk,
        "rows_same_active": same_active,
        "rows_null_remapped": sent.pairs_remote + nulls,
        "rows_bound": bound,
        "rows_padding": sent.rows_padding,
    }


def count_ledger(
    own: RoutingCounts[Tensor], sent: SentCounts | Tensor, placement: ExpertPlacement, ep_rank: int
) -> tuple[SentCounts, Mapping[str, float]]:
    """Returns the numbers of rows and pairs that this rank sent in a step, and the rank's ledger without its bytes.

    Args:
        own: Routing counts of this rank.
        sent: The numbers of rows and pairs; a tensor if the dispatcher counts on the device.
    """
    groups = placement.groups
    experts, nulls = [group.num_experts for group in groups], [group.num_null for group in groups]
    counted = (own.choices_LC, own.dropped_LE, own.tokens_LG, sent if isinstance(sent, Tensor) else None)
    # One host sync. The host adds the counts: kernels would take longer than copying 16 bytes per layer and expert.
    choices_LC, dropped_LE, tokens_LG, sent_5 = unpack(pack(counted).cpu().numpy(), counted)
    true_E, null_C = np.split(choices_LC.sum(0)[: sum(experts) + sum(nulls)], [sum(experts)])
    true_G = [part.sum() for part in np.split(true_E - dropped_LE.sum(0), np.cumsum(experts)[:-1])]
    null_G = [part.sum() for part in np.split(null_C, np.cumsum(nulls)[:-1])]
    found = sent if isinstance(sent, SentCounts) else SentCounts(*sent_5)
    # num_ranks is 1 with LoRA experts
    sums = {"true_choices_G": true_G, "null_choices_G": null_G, "tokens_G": tokens_LG.sum(0)}
    return found, compare(placement, ep_rank % placement.num_ranks, found, **sums)
