"""Null experts beside trained ones, so that the function stays what it was (AdaMoE's start from a trained MoE).

The null rows of the router copy its true rows in turn: with m = r n every true expert has r twins, and each choice is a tie
that goes to the true expert first (`TopKRouter`). A token's choices are then, in order, its best expert and r nulls, its
second best and r nulls, and so on. Imports no torch.
"""


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """The k_0 of the plain router that one with copied null rows equals: its choices reach into k_0 blocks."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """Why null rows of this number cannot be copies of the true rows; None where they can."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
