"""The slow reference of the gating residual loops over tokens and columns. It shares no code with the router."""

from collections.abc import Sequence

import torch
from torch import Tensor


def chained_logits(
    h_LD: Sequence[Tensor], rows_LCD: Sequence[Tensor], residual_LCC: Sequence[Tensor | None]
) -> list[Tensor]:
    """Returns one token's logits of its group in each layer: z_l[c] = sum_d W_l[c, d] x_l[d] + sum_b V_l[c, b] z_{l-1}[b].

    Args:
        h_LD: The router's input in each layer.
        rows_LCD: The group's router rows.
        residual_LCC: The matrix V of each layer; None in the first layer.
    """
    found: list[Tensor] = []
    for h_D, rows_CD, residual_CC in zip(h_LD, rows_LCD, residual_LCC, strict=True):
        logits = []
        for column, row_D in enumerate(rows_CD):
            logit = sum(row_D[d] * h_D[d] for d in range(len(h_D)))
            if residual_CC is not None:
                logit = logit + sum(residual_CC[column, other] * found[-1][other] for other in range(len(rows_CD)))
            logits.append(logit)
        found.append(torch.stack(logits))  # pyright: ignore[reportArgumentType]
    return found


def top_k_weights(logits_C: Tensor, *, top_k: int, null: range, bias_C: Tensor | None = None) -> dict[int, Tensor]:
    """Returns the softmax over the chosen columns that are not null. With a bias, tokens choose by softmax + bias."""
    score_C = logits_C if bias_C is None or not bias_C.any() else logits_C.softmax(0) + bias_C
    scores = score_C.tolist()
    chosen = sorted(range(len(scores)), key=lambda column: (-scores[column], column))[:top_k]
    kept = [column for column in chosen if column not in null]
    if not kept:
        return {}
    weights = torch.stack([logits_C[column] for column in kept]).softmax(0)
    return dict(zip(kept, weights, strict=True))
