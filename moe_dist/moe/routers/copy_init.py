"""Adds null experts to a trained model without changing its function (AdaMoE's start from a trained MoE).

The m null rows of the router copy its n true rows in turn. With m = r n every true row has r copies of equal logit, and
ties go to the true expert first (`TopKRouter`). So the choices of a token are its best expert and r nulls, then its second
best expert and r nulls, and so on. Imports no torch.
"""


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """The k_0 of the plain router that equals the router with copied null rows: ceil(k / (r + 1))."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """The reason why null rows of this number cannot be copies of the true rows; None if they can."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
