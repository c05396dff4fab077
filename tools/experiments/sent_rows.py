"""Counts the rows that an evaluation would send if its tokens were spread over the ranks of an EP group.

The evaluation has one rank and sends nothing, but the number of rows depends only on the choices. Sequences go to the ranks
in turn, as in the loader. Rows are counted in forward, per token and layer. `moe_dist.moe.dispatch.ledger` counts the rows
that other methods would send for the same choices.
"""

from collections.abc import Mapping

import numpy as np
import torch

from moe_dist.config.parallel_schema import InterleavedSection
from moe_dist.moe.dispatch.ledger import compare
from moe_dist.moe.routing import Routing
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import make_placement

ROWS = ("rows_remote", "rows_per_pair", "rows_topk", "rows_same_active", "rows_null_remapped")


def spread(placement: ExpertPlacement, ep: int) -> ExpertPlacement:
    """Places the experts of a run on `ep` ranks."""
    return make_placement(InterleavedSection(), placement.groups, num_ranks=ep, token_mix={})


class SentRows:
    """Sums the rows that each rank of the placement's EP group would send."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._placement = placement
        self._rank_of_expert = torch.tensor(placement.rank_of_expert)
        self._sums = dict.fromkeys(ROWS, 0.0)
        self._tokens = 0

    def add(self, routing: Routing, rank_T: np.ndarray) -> None:
        """Adds one layer's routing of T tokens; token t is on rank rank_T[t]. Takes O(T x ranks) memory."""
        pairs, num_tokens = routing.assignments.taken(), len(rank_T)
        ranks, own_T = self._placement.num_ranks, torch.from_numpy(rank_T)
        goes_TR = torch.zeros(num_tokens, ranks, dtype=torch.bool)
        goes_TR[pairs.token_N, self._rank_of_expert[pairs.expert_N]] = True
        goes_TR[torch.arange(num_tokens), own_T] = False  # a row for an expert on the token's own rank is not sent
        remote_N = self._rank_of_expert[pairs.expert_N] != own_T[pairs.token_N]
        # The routing does not store which token made a null choice, so each rank gets a share of the null choices, and of
        # each group's tokens, in proportion to the rank's tokens.
        sums, groups = routing.sums, self._placement.groups
        experts = [group.num_experts for group in groups]
        nulls = [group.num_null for group in groups]
        null_G = [float(part.sum()) for part in sums.choices_C[sum(experts) :][: sum(nulls)].split(nulls)]
        group_of_expert = torch.tensor([i for i, group in enumerate(groups) for _ in group.experts])
        for rank in range(ranks):
            mine_T = own_T == rank
            share = float(mine_T.float().mean())
            mine_N = mine_T[pairs.token_N]
            true_G = torch.bincount(group_of_expert[pairs.expert_N[mine_N]], minlength=len(groups)).tolist()
            ledger = compare(
                self._placement,
                rank,
                true_choices_G=true_G,
                null_choices_G=[round(share * each) for each in null_G],
                tokens_G=[round(share * each) for each in sums.tokens_G.tolist()],
                rows_remote=int(goes_TR[mine_T].sum()),
                pairs=int(mine_N.sum()),
                pairs_remote=int((remote_N & mine_N).sum()),
            )
            for key in ROWS:
                self._sums[key] += ledger[key]
        self._tokens += int(sums.tokens_G.sum())

    def per_token(self) -> Mapping[str, float]:
        """Returns the rows per token and layer."""
        return {key: value / max(1, self._tokens) for key, value in self._sums.items()}


def rank_of_tokens(num_sequences: int, seq_len: int, ranks: int) -> np.ndarray:
    """Returns the rank of each token of a batch [T]; ranks take sequences in turn."""
    return np.repeat(np.arange(num_sequences) % ranks, seq_len)
