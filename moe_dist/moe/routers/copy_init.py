"""Adds null experts to a trained model without changing its function (AdaMoE's start from a trained MoE).

The m null rows of the router copy its n true rows in turn. With m = r n every true row has r copies of equal logit, and
ties go to the true expert first (`TopKRouter`). So a token chooses its best true expert and r null experts, then its second
best true expert and r null experts, and so on. Imports no torch.
"""


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """The k_0 with which plain top-k equals the top-k router with copied null rows: ceil(k / (r + 1))."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """The reason why this number of null rows cannot copy the true rows; None if it can."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
