"""The traffic ledger: rows that dispatch sent, and rows that other methods would have sent for the same choices. All counts
are those of one rank in forward.

`rows_remote`, `pairs` and `pairs_remote` are measured (`SentCounts`; `hierarchical` counts the rows of both hops). The
numbers of rows below are computed from this rank's counts. The formulas assume that choices spread evenly over the n
experts of a group, of which this rank holds `own`, so that a share 1 - own/n of the choices leaves the rank:

    rows_per_pair       one row for each pair with an expert on another rank: no deduplication
    rows_topk           top-k with the same k over true experts alone, one row for each choice
    rows_same_active    top-k with as many true experts as the tokens really took, one row for each choice
    rows_null_remapped  the taken pairs, and each null choice sent to some true expert with weight 0

CommStats counts bytes at the call of each collective: `payload_bytes` of rows, the part `inter_node_bytes` of them that
leaves the node (0 if the dispatcher does not know nodes), and `metadata_bytes` of everything else.
"""

from collections.abc import Mapping, Sequence

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
    """The rows and pairs of one rank's ledger, from sums over its layers and micro-batches. Bytes are not included.

    Args:
        true_choices_G: Choices of true (not null) experts by this rank's tokens of each group, without those that a
            capacity dropped.
        null_choices_G: Null choices of this rank's tokens of each group.
        tokens_G: This rank's routed tokens of each group.
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
