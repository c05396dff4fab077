"""The routing counts of a step over all ranks: one record from the layers' reports to controllers and monitoring.

Shape letters: L MoE layers, P those of them that compute a share of the tokens (mixture of depths), G groups, C choice
columns (all true experts by logical id, then the groups' null, identity and constant ones), E true experts.
"""

from typing import Generic, NamedTuple, TypeVar

Array = TypeVar("Array")


class StepCounts(NamedTuple, Generic[Array]):
    """Sums over all ranks, of a micro-batch or of a whole step: float64 tensors on the device while the step runs, numpy
    arrays for the monitor. They are added up field by field.

    Attributes:
        choices_LC: How often each column was chosen, before any capacity.
        tokens_LG: Tokens routed in each group.
        entropy_LG: Sum over tokens of the entropy (nats) of the router's softmax.
        dropped_LE: Choices of each true expert that a capacity dropped.
        kth_score_LE: Where experts choose their tokens: the k-th largest score of each expert, times the tokens of its
            group. Without columns where tokens choose, as the next two.
        above_LE: There: tokens above each expert's threshold.
        unrouted_LG: There: tokens that no expert took.
        depth_tokens_P: Tokens that a layer with a mixture of depths chooses from.
        depth_agreed_P: Tokens on which the causal decision of evaluation is the choice of training.
        depth_kth_score_P: Score of the last token taken, times the tokens.
        depth_weight_P: Sum of the weights of the tokens taken.
        depth_tokens_PG, depth_taken_PG: Tokens of each group, and those of them that the layer computes.
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


FRACTIONAL = frozenset(
    ("entropy_LG", "kth_score_LE", "depth_kth_score_P", "depth_weight_P")
)  # the others are whole numbers
