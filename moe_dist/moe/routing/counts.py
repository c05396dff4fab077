"""Defines the records of routing counts. Layers fill them, the step sums them, controllers and the monitor read them.

Shape letters: L MoE layers, P mixture-of-depths layers, G expert groups, C choice columns (all true experts by logical id,
then the groups' null, identity and constant experts), E true experts.
"""

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:  # not imported at run time, because login nodes have no torch
    from torch import Tensor

Array = TypeVar("Array")


class DepthCounts(NamedTuple, Generic[Array]):
    """Counts of mixture-of-depths layers (`moe_dist.model.mixture_of_depths`), without gradient.

    Attributes:
        tokens_P: Number of tokens among which a layer selects, without padding.
        taken_P: Number of tokens that a layer computes.
        agreed_P: Number of tokens for which evaluation's causal rule and training's selection make the same decision.
        kth_score_P: Lowest score among the tokens that a layer selects in its scope, times `tokens_P`.
        weight_P: Sum of the weights of the computed tokens.
        tokens_PG, taken_PG: `tokens_P` and `taken_P` for each expert group. The transformer sets these two fields.
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

    - a layer counts this rank's tokens of one micro-batch; then L = 1, and P = 1 in a mixture-of-depths layer;
    - `joined` joins a model's layers, one all-reduce sums over ranks, and `added` sums over micro-batches, all in float64;
    - the host reads the sums once per step as numpy arrays, int64 except for the fields in `FRACTIONAL`.

    Attributes:
        choices_LC: Number of choices of each column, including choices that a capacity drops.
        tokens_LG: Number of routed tokens.
        entropy_LG: Entropy (nats) of the router's probabilities, summed over tokens.
        dropped_LE: Number of choices of each true expert that a capacity dropped.
        kth_score_LE: k-th largest score of each expert that takes k tokens, times the number of tokens of its group. In
            token choice, `kth_score_LE`, `above_LE` and `unrouted_LG` are None.
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
    """Sums over this rank's tokens of a micro-batch, with gradient, for the auxiliary losses. For one layer, L = P = 1.

    Attributes:
        prob_LC: Sum over tokens of each column's probability. In expert choice `prob_LC` sums scores, without gradient.
        log_z_squared_LG: Sum over tokens of the squared log-sum-exp of the group's logits.
        auxiliary_LG: Cross entropy of expert choice's auxiliary routers, summed over tokens and experts. None if these
            routers are not trained.
        depth_auxiliary_P: Cross entropy of mixture-of-depths' auxiliary routers, summed over tokens. None if not trained.
    """

    prob_LC: "Tensor"
    log_z_squared_LG: "Tensor"
    auxiliary_LG: "Tensor | None" = None
    depth_auxiliary_P: "Tensor | None" = None


class SentCounts(NamedTuple):
    """Counts of the rows that one rank sends, and of the (token, expert) pairs of the rank's tokens, in forward.

    Attributes:
        rows_remote: Number of rows sent to other ranks. A token sends one row to each rank that has its experts.
        pairs: Number of (token, expert) pairs of this rank's tokens, without absent pairs.
        pairs_remote: Number of pairs whose expert is on another rank.
        rows_padding: Number of padding rows sent to other ranks. Only exchanges of fixed sizes send padding rows.
        overflow: Number of rows and pairs that did not fit into the fixed sizes.
    """

    rows_remote: int
    pairs: int
    pairs_remote: int
    rows_padding: int = 0
    overflow: int = 0
