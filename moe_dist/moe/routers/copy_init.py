"""Adds null experts to a trained model without changing its function (AdaMoE's start from a trained MoE).

The null rows of the router copy its true rows in turn. With m = r n every true expert has r copies, and each choice is a
tie that goes to the true expert first (`TopKRouter`). So the choices of a token are its best expert and r nulls, its second
best and r nulls, and so on. Imports no torch.
"""


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """The k_0 of the plain router that equals the one with copied null rows: its choices reach into k_0 blocks."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """Why this number of null rows cannot be copies of the true rows; None if it can."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
