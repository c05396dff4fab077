"""The routing counts of a step over all ranks: the record that layers' reports pass to controllers and monitoring.

Shape letters: L MoE layers, P mixture-of-depths layers, G groups, C choice columns (all true experts by logical id, then
the groups' null, identity and constant ones), E true experts.
"""

from typing import Generic, NamedTuple, TypeVar

Array = TypeVar("Array")


class StepCounts(NamedTuple, Generic[Array]):
    """Sums over all ranks, of a micro-batch or of a whole step: float64 tensors on the device during the step, numpy arrays
    for the monitor. They are added field by field.

    Attributes:
        choices_LC: How often each column was chosen, before any capacity.
        tokens_LG: Tokens routed in each group.
        entropy_LG: Sum over tokens of the entropy (nats) of the router's softmax.
        dropped_LE: Choices of each true expert that a capacity dropped.
        kth_score_LE: Expert choice: the k-th largest score of each expert, times the tokens of its group. Like the next
            two, it has no columns if tokens choose.
        above_LE: Expert choice: tokens above each expert's threshold.
        unrouted_LG: Expert choice: tokens that no expert took.
        depth_tokens_P: Tokens from which a mixture-of-depths layer selects.
        depth_agreed_P: Tokens whose causal decision equals the selection of training.
        depth_kth_score_P: Lowest selected score, times the tokens.
        depth_weight_P: Sum of the weights of the selected tokens.
        depth_tokens_PG, depth_taken_PG: Tokens of each group, and those that the layer computes.
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


FRACTIONAL = frozenset(("entropy_LG", "kth_score_LE", "depth_kth_score_P", "depth_weight_P"))  # the others are integers
