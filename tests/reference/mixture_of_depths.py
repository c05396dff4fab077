"""The slow reference of mixture of depths loops over documents and tokens on one device.

It shares no code with the router, the slots or their mask. It calls the layer's own attention and experts on one document
at a time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup
from tests.reference.expert_choice import choice_of_training

Block = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


def choose(scores: Sequence[float], real: Sequence[bool], capacity: float, scopes: Sequence[Sequence[int]]) -> set[int]:
    """Returns the selected tokens. In a scope of n real tokens these are the ceil(c n) tokens with the highest scores.
    On a tie the earlier token is selected. This is expert choice with one expert."""
    one = ExpertGroup("all", 1, 0, 1, 1, 0, ("text",))
    groups = [0 if each else -1 for each in real]
    return {token for token, _ in choice_of_training([[score] for score in scores], groups, [one], [capacity], scopes)}


def depth_forward(
    x_TD: Tensor, router_D: Tensor, taken: set[int], document_T: Sequence[object], position_T: Sequence[int], block: Block
) -> Tensor:
    """Returns x + sigmoid(s) block(x) for the selected tokens, and x for all other tokens.

    Args:
        document_T: The document of each token. No two sequences share a document, and its tokens are in order.
        block: The layer's update for the tokens [1, n, D] of one document at the given positions [1, n]. It also gets
            the tokens' numbers.
    """
    rows = list(x_TD)
    for document in dict.fromkeys(document_T):
        members = [token for token in sorted(taken) if document_T[token] == document]
        if not members:
            continue
        positions = torch.tensor([[position_T[token] for token in members]])
        added_1nD = block(x_TD[members][None], positions, members)
        for place, token in enumerate(members):
            x_D = x_TD[token]
            score = torch.dot(router_D, x_D / (x_D.square().mean() + 1e-6).sqrt())
            rows[token] = x_D + added_1nD[0, place] / (1 + torch.exp(-score))
    return torch.stack(rows)
