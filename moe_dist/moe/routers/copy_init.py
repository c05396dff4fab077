"""Adds null experts to a trained model without changing the model's outputs, as AdaMoE does when it starts training from a
trained MoE.

The m = r n null rows of the router's weight repeat its n true rows r times. So each true expert has the same logit as r
null experts, and the true expert wins the tie (`TopKRouter`). A token thus chooses its best true expert, then r null
experts, then its second best true expert, then r null experts, and so on. This module imports no torch.
"""


def folded_choices(num_experts: int, num_null: int, top_k: int) -> int:
    """Returns the number of true experts among a token's k choices after the router rows were copied: ceil(k / (r + 1))."""
    return -(-top_k // (num_null // num_experts + 1))


def uneven_twins(num_experts: int, num_null: int) -> str | None:
    """Returns None if `num_null` router rows can repeat all true rows equally often, else the reason why not."""
    if num_null % num_experts == 0:
        return None
    return (
        f"num_null={num_null} must be a multiple of num_experts={num_experts}: each true expert needs as many twins as the "
        f"others; take {-(-num_null // num_experts) * num_experts}"
    )
