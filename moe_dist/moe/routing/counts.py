"""Defines the routing counts of a step over all ranks, which the bias controllers and the monitor read.

Shape letters: L MoE layers, P mixture-of-depths layers, G expert groups, C choice columns (all true experts by logical id,
then the groups' null, identity and constant experts), E true experts.
"""

from typing import Generic, NamedTuple, TypeVar

Array = TypeVar("Array")


class StepCounts(NamedTuple, Generic[Array]):
    """Sums over all ranks, of a micro-batch or of a whole step: float64 tensors on the device during the step, numpy arrays
    for the monitor. The step's counts are the sums of its micro-batches' counts.

    Attributes:
        choices_LC: Number of choices of each column, including choices that a capacity drops.
        tokens_LG: Number of routed tokens.
        entropy_LG: Entropy (nats) of the router's probabilities, summed over tokens.
        dropped_LE: Number of choices of each true expert that a capacity dropped.
        kth_score_LE: k-th largest score of each expert that takes k tokens, times the number of tokens of its group. In
            token choice kth_score_LE, above_LE and unrouted_LG have no columns.
        above_LE: Number of tokens whose score is above each expert's threshold.
        unrouted_LG: Number of tokens that no expert took.
        depth_tokens_P: Number of tokens among which each mixture-of-depths layer selects.
        depth_agreed_P: Number of tokens for which evaluation's causal rule and training's selection decide the same.
        depth_kth_score_P: Lowest score that each mixture-of-depths layer selects, times the number of tokens.
        depth_weight_P: Sum of the weights of the tokens that each mixture-of-depths layer selects.
        depth_tokens_PG, depth_taken_PG: Number of tokens of each group, and number of tokens that each mixture-of-depths
            layer computes.
    """

    choices_LC: Array
    tokens_LG: Array
    entropy_LG: Array
    dropped_LE: Array
    kth_score_LE: Array
    above_LE: Array
    unrouted_LG: Array
    depth_tokens_P: Array
    depth_agreed_P: Array
    depth_kth_score_P: Array
    depth_weight_P: Array
    depth_tokens_PG: Array
    depth_taken_PG: Array


FRACTIONAL = frozenset(("entropy_LG", "kth_score_LE", "depth_kth_score_P", "depth_weight_P"))  # other fields are counts
