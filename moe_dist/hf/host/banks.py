"""Layers with several banks of experts, one for each modality, such as those of ERNIE-4.5-VL.

The family's block calls a text bank for text tokens, and a vision bank only if the batch has a picture. So ranks with and
without pictures would issue different collectives. Here all banks of a layer are one list of experts, and one exchange
brings each token to its bank.

Shape letters: B sequences, S positions, T = B x S tokens, E experts of all banks, K choices, D hidden size, G banks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class OneExchange:
    """The forward of a block with a bank for each modality: the router of each bank, one exchange, and the shared expert.

    Args:
        routers: One for each bank. Each reads all tokens, so that its weight has a gradient on every rank.
        keep: Hook that keeps the output of a family's router for the layer.
        routed: Computes the layer's experts, and knows each token's group (`model._Routed`).
    """

    def __init__(self, block: Any, routers: Sequence[nn.Module], keep: Callable[..., None], routed: Any) -> None:
        self._block, self._routers, self._keep, self._routed = block, tuple(routers), keep, routed

    def __call__(self, h_BSD: Tensor, _types_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns y [B, S, D], and the logits [T, E]."""
        h_TD, first = h_BSD.flatten(0, 1), 0
        scores, weights, ids = [], [], []
        for router in self._routers:
            scores_TE, weights_TK, ids_TK = router(h_TD)
            scores.append(scores_TE)
            weights.append(weights_TK)
            ids.append(ids_TK + first)
            first += scores_TE.shape[1]
        bank_T1 = self._routed.open().group_T.clamp_min(0)[:, None]  # padding has group -1 and no expert
        bank_1TK = bank_T1.expand_as(ids[0])[None]
        weights_TK, ids_TK = (torch.stack(each).gather(0, bank_1TK)[0] for each in (weights, ids))
        scores_TE = torch.cat(scores, dim=1)
        self._keep(None, None, (scores_TE, weights_TK, ids_TK))
        y_BSD = self._routed(h_TD, ids_TK, weights_TK).view_as(h_BSD)
        if self._block.shared_experts is not None:
            y_BSD = y_BSD + self._block.shared_experts(h_BSD)
        return y_BSD, scores_TE


def split_by_bank(mapping: Sequence[Any], sizes: Sequence[int]) -> None:
    """Makes transformers' conversion of a folder split this rank's experts by bank. `sizes` are the banks' numbers of
    experts on this rank. transformers would give each bank as many."""
    for converter in mapping:
        for operation in getattr(converter, "operations", ()):
            if hasattr(operation, "split_list_into_chunks"):
                operation.convert = partial(_split, operation, sizes)


def _split(
    operation: Any,
    sizes: Sequence[int],
    found: dict[str, list[Tensor]],
    source_patterns: Sequence[str],
    target_patterns: Sequence[str],
    **_: Any,
) -> dict[str, Tensor]:
    joined, start = dict[str, Tensor](), 0
    for target, size in zip(target_patterns, sizes, strict=True):
        if size:  # torch stacks no empty list
            stacks = [torch.stack(found[each][start : start + size], operation.stack_dim) for each in source_patterns]
            joined[target] = torch.cat(stacks, operation.concat_dim)
        start += size
    return joined
