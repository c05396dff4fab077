"""Null experts beside trained ones, so that the function stays what it was (AdaMoE's start from a trained MoE).

The null rows of the router copy its true rows in turn: with m = r n every true expert has r twins, and each choice is a tie
that goes to the true expert first (`TopKRouter`). A token's choices are then, in order, its best expert and r nulls, its
second best and r nulls, and so on. They hold the k_0 experts of plain top-k_0, and no other, for

    (k_0 - 1) (r + 1) + 1  <=  k  <=  k_0 (r + 1)

unless two true experts tie with each other at the k_0-th place. Imports no torch.
"""


def kept_choices(*, top_k: int, num_experts: int, num_null: int) -> range:
    """The numbers of choices k with which `num_null` copied rows leave plain top-`top_k` as it was.

    Raises:
        ValueError: the null experts are no multiple of the true ones, so that some have more twins than others.
    """
    if num_null % num_experts:
        raise ValueError(
            f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as "
            f"the others; take {-(-num_null // num_experts) * num_experts}"
        )
    run = num_null // num_experts + 1  # an expert and its twins
    return range((top_k - 1) * run + 1, top_k * run + 1)


def folded_top_k(*, top_k: int, num_experts: int, num_null: int) -> int:
    """The k_0 of the plain router that one with copied null rows equals: its choices reach into k_0 runs.

    Raises:
        ValueError: as `kept_choices`.
    """
    run = kept_choices(top_k=1, num_experts=num_experts, num_null=num_null).stop - 1
    return -(-top_k // run)
