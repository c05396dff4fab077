"""Null experts beside trained ones, so that the function stays what it was (AdaMoE's start from a trained MoE).

The null rows of the router copy its true rows in turn: with m = r n every true expert has r twins, and each choice is a tie
that goes to the true expert first (`TopKRouter`). A token's choices are then, in order, its best expert and r nulls, its
second best and r nulls, and so on. Imports no torch.
"""


def identity_choices(num_experts: int, num_null: int, true_choices: int) -> range:
    """The top_k with which copied null rows leave plain top-`true_choices` (k_0) as it was:

        (k_0 - 1) (r + 1) + 1  <=  k  <=  k_0 (r + 1)

    unless two true experts tie with each other at the k_0-th place. m must be a multiple of n (`uneven_twins`).
    """
    block = num_null // num_experts + 1  # an expert and its twins
    return range((true_choices - 1) * block + 1, true_choices * block + 1)


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """The k_0 of the plain router that one with copied null rows equals: its choices reach into k_0 blocks."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """Why so many null rows cannot be copies; None where they can."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
