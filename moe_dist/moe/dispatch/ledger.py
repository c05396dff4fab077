"""Makes the traffic ledger: the rows that dispatch sent, and the rows that other methods would have sent for the same
choices. A ledger is of one rank. Rows and pairs are counted in forward, bytes in forward and backward.

`rows_remote`, `pairs`, `pairs_remote` and `rows_padding` are measured (`SentCounts`; `hierarchical` counts the rows of both
hops). Padding rows, which only `static` sends, are not in `rows_remote`; padding bytes are in `payload_bytes`. All other
row counts of the ledger are computed from this rank's choices. All numbers but `rows_per_pair` and `rows_bound` assume that
choices spread evenly over the n experts of a group. If this rank holds `own` of the n experts, the fraction 1 - own/n of
the choices leaves the rank:

    rows_per_pair       one row per pair with an expert on another rank, without deduplication
    rows_topk           top-k with the same k among true experts alone, one row per choice
    rows_same_active    the true experts that the tokens took, spread evenly, one row per choice
    rows_null_remapped  rows_per_pair, and one row per null choice, as if a true expert took it
    rows_bound          the most that any choices of these tokens send if each token sends one row to a rank: its top_k, or
                        the ranks of the node groups that it may use (`ExpertPlacement.most_rows`, without replicas)

CommStats counts bytes, at the call of each collective: `payload_bytes` of rows, `inter_node_bytes` of the rows that leave
the node (0 if the dispatcher does not distinguish nodes), and `metadata_bytes` of everything else.
"""

from collections.abc import Mapping, Sequence

from moe_dist.moe.routing.counts import SentCounts
from moe_dist.placement.placement import ExpertPlacement


def compare(
    placement: ExpertPlacement,
    ep_rank: int,
    sent: SentCounts,
    *,
    true_choices_G: Sequence[int],
    null_choices_G: Sequence[int],
    tokens_G: Sequence[int],
) -> Mapping[str, float]:
    """Returns the rows and pairs of one rank's ledger, from sums over layers and micro-batches.

    Args:
        sent: Sums over the layers' reports.
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
