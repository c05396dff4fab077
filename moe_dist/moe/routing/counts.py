"""Defines the record of counts: MoE layers fill it, the training step sums it, controllers and the monitor read it.

Shape letters: L MoE layers, P mixture-of-depths layers, G expert groups, C choice columns (all true experts by logical id,
then the groups' null, identity and constant experts), E true experts.
"""

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:  # a login node has no torch
    from torch import Tensor

Array = TypeVar("Array")


class DepthCounts(NamedTuple, Generic[Array]):
    """Counts of mixture-of-depths layers (`moe_dist.model.mixture_of_depths`), without gradient.

    Attributes:
        tokens_P: Number of tokens, without padding, among which a layer selects.
        taken_P: Number of tokens that a layer computes.
        agreed_P: Number of tokens for which the causal rule of evaluation decides the same as the selection of training.
        kth_score_P: Lowest score that a layer selects in its selection scope, times the number of tokens.
        weight_P: Sum of the weights of the computed tokens.
        tokens_PG, taken_PG: `tokens_P` and `taken_P` by expert group, which the transformer adds.
    """

    tokens_P: Array
    taken_P: Array
    agreed_P: Array
    kth_score_P: Array
    weight_P: Array
    tokens_PG: Array | None = None
    taken_PG: Array | None = None


class RoutingCounts(NamedTuple, Generic[Array]):
    """Counts of routing, without gradient. Layers, training step and monitor use this same record:

    - a layer counts this rank's tokens of a micro-batch: L = 1, and P = 1 in a mixture-of-depths layer;
    - `joined` joins the layers of a model, one all-reduce sums the ranks, `added` sums micro-batches: float64 tensors;
    - the host reads the sums once per step: numpy arrays, int64 but for the fields in `FRACTIONAL`.

    Attributes:
        choices_LC: Number of choices of each column, including choices that a capacity drops.
        tokens_LG: Number of routed tokens.
        entropy_LG: Entropy (nats) of the router's probabilities, summed over tokens.
        dropped_LE: Number of choices of each true expert that a capacity dropped.
        kth_score_LE: k-th largest score of each expert that takes k tokens, times the number of tokens of its group. None,
            like above_LE and unrouted_LG, in token choice.
        above_LE: Number of tokens whose score is above each expert's threshold.
        unrouted_LG: Number of tokens that no expert took.
        depth: None without mixture of depths.
    """

    choices_LC: Array
    tokens_LG: Array
    entropy_LG: Array
    dropped_LE: Array
    kth_score_LE: Array | None = None
    above_LE: Array | None = None
    unrouted_LG: Array | None = None
    depth: DepthCounts[Array] | None = None


FRACTIONAL = frozenset(("entropy_LG", "kth_score_LE", "kth_score_P", "weight_P"))  # all other fields are whole numbers


class AuxSums(NamedTuple):
    """Sums over this rank's tokens of a micro-batch, with gradient, for the auxiliary losses. A layer has L = P = 1.

    Attributes:
        prob_LC: Sum over tokens of each column's probability. In expert choice `prob_LC` sums scores, without gradient.
        log_z_squared_LG: Sum over tokens of the squared log-sum-exp of the group's logits.
        auxiliary_LG: Cross entropy of expert choice's auxiliary routers, summed over tokens and experts; None if not
            trained.
        depth_auxiliary_P: Cross entropy of mixture-of-depths' auxiliary routers, summed over tokens; None if not trained.
    """

    prob_LC: "Tensor"
    log_z_squared_LG: "Tensor"
    auxiliary_LG: "Tensor | None" = None
    depth_auxiliary_P: "Tensor | None" = None


class SentCounts(NamedTuple):
    """Counts of the rows that one rank sends, and of the (token, expert) pairs of the rank's tokens, in forward.

    Attributes:
        rows_remote: Rows sent to other ranks, one for each distinct (token, other rank).
        pairs: (token, expert) pairs of this rank's tokens, without absent pairs.
        pairs_remote: Pairs whose expert is on another rank.
        rows_padding: Padding rows sent to other ranks; only exchanges of fixed sizes have such rows.
        overflow: Rows and pairs beyond the fixed sizes.
    """

    rows_remote: int
    pairs: int
    pairs_remote: int
    rows_padding: int = 0
    overflow: int = 0
