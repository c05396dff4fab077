"""Layers of a transformers model with several banks of experts, one for each modality, such as those of ERNIE-4.5-VL.

The family's block calls a text bank for text tokens, and a vision bank only if the batch has a picture. So ranks with and
without pictures would issue different collectives. Here the experts of all banks of a layer form one list, and one exchange
sends each token to its bank.

Shape letters: B sequences, S positions, T = B x S tokens, E experts of all banks, K choices of a token, D hidden size, R
rows on this rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout, RunExperts
from moe_dist.moe.routing.draws import recomputed


class ExpertBank(Protocol):
    """The experts of one group on this rank: `num_local` of them, and the function that computes their rows."""

    num_local: int

    def compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor: ...


class _OfBank(NamedTuple):
    """The pairs of one bank (`PairLayout`)."""

    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


class SeveralBanks(nn.Module):
    """This rank's experts of all banks of a layer. A bank may have none on this rank."""

    def __init__(self, banks: Sequence[ExpertBank]) -> None:
        super().__init__()
        self._banks = tuple(banks)

    def start(self, h_TD: Tensor, *, recompute: bool) -> tuple[Tensor, RunExperts]:
        return h_TD, self._again if recompute else self._compute

    def _again(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        return recomputed(self._compute, rows, layout)

    def _compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        """Returns the sum of all banks, [R, D]. A token has experts of only one bank, so the sum is exact."""
        outputs, slot, pair = [], 0, 0
        for bank in self._banks:
            counts = layout.slot_counts[slot : slot + bank.num_local]
            pairs = slice(pair, pair + sum(counts))
            own = DispatchedRows(rows.rows_RD, rows.weight_Q[pairs])
            outputs.append(bank.compute(own, _OfBank(layout.row_of_pair_Q[pairs], counts)))
            slot, pair = slot + bank.num_local, pairs.stop
        return torch.stack(outputs).sum(0)


class OneExchange:
    """The forward of a block with a bank for each modality: the router of each bank, one exchange, and the shared expert.

    Args:
        routers: The router of each bank. Each router reads all tokens, so that its weight has a gradient on every rank.
        keep: Hook that keeps the output of a family's router for the layer.
        routed: Computes the layer's experts, and knows each token's group (`model._Routed`).
    """

    def __init__(self, block: Any, routers: Sequence[nn.Module], keep: Callable[..., None], routed: Any) -> None:
        self._block, self._routers, self._keep, self._routed = block, tuple(routers), keep, routed

    def __call__(self, h_BSD: Tensor, _types_BS: Tensor | None = None) -> Any:
        """Returns y [B, S, D] and, unless the block says `gives_logits = False`, the logits [T, E]."""
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
        if (shared := getattr(self._block, "shared_experts", None)) is not None:
            y_BSD = y_BSD + shared(h_BSD)
        return (y_BSD, scores_TE) if getattr(self._block, "gives_logits", True) else y_BSD
