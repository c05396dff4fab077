"""Rows that dispatch sent, and rows that other methods would have sent for the same choices. Counts of one rank, forward.

Measured from the plans: `rows_remote`, `pairs`, `pairs_remote`. The others are closed forms of this rank's own counts, with
a choice spread evenly over its group's experts, so that a share 1 - own/n of them leaves the rank:

    rows_per_pair       one row for each (token, expert) taken on another rank: no deduplication
    rows_topk           top-k of the same k over true experts alone, one row a choice
    rows_same_active    top-k with as many true experts a token as were really taken, one row a choice
    rows_null_remapped  the taken pairs, and each null choice sent to some true expert with weight 0

Bytes are counted at the call of each collective: `payload_bytes` of rows, of which `inter_node_bytes` between nodes where
the dispatcher knows nodes (else 0), and `metadata_bytes` of all else. A dispatcher of two hops counts the rows of both in
`rows_remote`.
"""

from collections.abc import Mapping, Sequence
from math import comb

from moe_dist.placement.placement import ExpertPlacement

LEDGER_KEYS = (
    "rows_remote",
    "pairs",
    "pairs_remote",
    "rows_per_pair",
    "rows_topk",
    "rows_same_active",
    "rows_null_remapped",
    "payload_bytes",
    "inter_node_bytes",
    "metadata_bytes",
)


def compare(
    placement: ExpertPlacement,
    ep_rank: int,
    *,
    true_choices_G: Sequence[int],
    null_choices_G: Sequence[int],
    tokens_G: Sequence[int],
    rows_remote: int,
    pairs: int,
    pairs_remote: int,
) -> Mapping[str, float]:
    """The ledger of one rank without its byte counts, from its local sums over layers and micro-batches.

    Args:
        true_choices_G: True experts taken by this rank's tokens, by group; without choices that a capacity dropped.
        null_choices_G: Their null choices, by group.
        tokens_G: This rank's routed tokens, by group.
        rows_remote, pairs, pairs_remote: Sums of the layers' reports.
    """
    topk = same_active = nulls = 0.0
    by_group = zip(placement.groups, true_choices_G, null_choices_G, tokens_G, strict=True)
    for group, taken, null, tokens in by_group:
        remote_share = 1.0 - len(placement.local_experts(ep_rank, group)) / group.num_experts
        topk += remote_share * min(group.top_k, group.num_experts) * tokens
        same_active += remote_share * taken
        nulls += remote_share * null
    return {
        "rows_remote": rows_remote,
        "pairs": pairs,
        "pairs_remote": pairs_remote,
        "rows_per_pair": pairs_remote,
        "rows_topk": topk,
        "rows_same_active": same_active,
        "rows_null_remapped": pairs_remote + nulls,
    }


def expected_copies(num_experts: int, top_k: int, parts: int, *, num_null: int = 0) -> float:
    """Expected number of distinct parts (ranks or nodes, each with as many experts) that a token's true choices fall into.

    Under uniform routing over n + m columns without replacement a part of n / P experts is missed with probability
    C(n + m - n / P, k) / C(n + m, k), so P (1 - that). With m = 0 it is the hypergeometric form that HierMoE-style
    deduplication is measured by: the saving of one row for each rank or node over one row for each expert, before locality.
    """
    columns = num_experts + num_null
    return parts * (1.0 - comb(columns - num_experts // parts, top_k) / comb(columns, top_k))
