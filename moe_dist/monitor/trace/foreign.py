"""Defines what the trace of another trainer's model has instead of token ids and groups of experts (see `attach`)."""

from moe_dist.placement.placement import ExpertGroup

NO_ID = -1  # id of a token that is not known


def routed_group(num_experts: int, top_k: int) -> ExpertGroup:
    """Returns all experts of another system's model as one group with one modality. The unknown FFN width is set to 1."""
    return ExpertGroup("routed", num_experts, 0, top_k, 1, 0, ("tokens",))
