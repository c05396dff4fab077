"""Computes load-balance losses and the z-loss. Their inputs are one rank's router sums, and counts over all ranks.
`StepLoad` keeps the loads of the last step for the balance losses.

Shape letters: L MoE layers, G expert groups, C choice columns (a column for each true expert by logical id, then for the
groups' null, identity and constant experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.moe.routing.types import group_columns
from moe_dist.placement.placement import ExpertGroup

BalanceKind = Literal["null_averaged", "vanilla", "null_split", "weighted"]


@dataclass(frozen=True)
class AuxSettings:
    """The kind of balance loss, and the coefficients of a step's auxiliary losses. `balance_terms` explains
    `null_weight_G`."""

    kind: BalanceKind
    balance: float
    z: float
    null_weight_G: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ColumnTables:
    """Tensors that describe the columns of each expert group. `on` caches the tensors, because copying them to CUDA in each
    step would sync.

    Attributes:
        group_C: int64, index of each column's group.
        member_CG: bool, whether a column belongs to a group.
        size_G: Number of columns of each group.
    """

    groups: tuple[ExpertGroup, ...]
    group_C: Tensor
    member_CG: Tensor
    size_G: Tensor

    @classmethod
    @cache  # Megatron's layers call `on` in each forward; without the cache each call would be a host sync
    def on(cls, groups: tuple[ExpertGroup, ...], device: torch.device) -> "ColumnTables":
        group_C = torch.tensor(group_columns(groups), device=device)
        member_CG = group_C[:, None] == torch.arange(len(groups), device=device)
        sizes = [group.num_columns for group in groups]
        return cls(groups, group_C, member_CG, torch.tensor(sizes, device=device))


def balance_terms(
    prob_LC: Tensor,
    choices_LC: Tensor,
    tokens_LG: Tensor,
    tables: ColumnTables,
    *,
    kind: BalanceKind = "null_averaged",
    null_weight_G: Sequence[float] | None = None,
    load_tokens_LG: Tensor | None = None,
) -> Tensor:
    """Returns this rank's part of the balance loss of each layer and group [L, G], with coefficient 1. The balance loss is
    the sum of this part over all ranks.

        l = C sum_i f_i P_i,   f_i = choices_i / T,   P_i = sum of probabilities / T,   sums over the group's C columns

    `null_averaged` is AdaMoE's loss (arXiv 2406.13233, section 3.2): the load f_i of each null column is replaced by the
    mean load of the group's null columns, because null columns are equivalent. The load of each identity column is likewise
    replaced by the mean load of the group's identity columns. Loads of constant columns are not replaced, because each
    constant expert has a different vector. `vanilla` replaces no load.

    `null_split` (ZEDA, arXiv 2605.18643) balances only two sums: the sum over the n true columns (E) and the sum over the
    n_Z remaining columns (Z). If w = 1 and all columns have equal loads, ZEDA's published loss is 1. In that case
    `null_split` is k, the number of choices per token, as is the loss of every other kind:

        l = (n + n_Z w) / k (f_E P_E / n + f_Z P_Z / (n_Z w))

    `weighted` (MoE++, arXiv 2410.07348) divides the load of each null, identity and constant column by w, and does not
    average loads. MoE++ writes tau for 1 / w.

    The null weight w means the same as in ZEDA: the loss drives the load of a null column to w times the load of a true
    column. In a balanced layer a token takes k n / (n + m w) true experts on average, and the factor C becomes C + m (w -
    1). Here m is the number of null columns; for `weighted` and `null_split` it is the number of all columns that are not
    true experts.

    Args:
        prob_LC: This rank's sums of probabilities, with gradient.
        choices_LC: Number of choices of each column over all ranks.
        tokens_LG: Number of tokens of each group over all ranks. A group without tokens contributes 0.
        null_weight_G: The null weight w of each group; None for w = 1. `vanilla` ignores `null_weight_G`.
        load_tokens_LG: Number of tokens whose choices `choices_LC` counts; None if this number is `tokens_LG`.
    """
    load_LC, groups = choices_LC.to(prob_LC.dtype), tables.groups
    weight_G = [1.0] * len(groups) if null_weight_G is None else null_weight_G
    per_LG = tokens_LG.to(prob_LC.dtype).clamp_min(1.0)  # a group without tokens has the loss 0 / 1 = 0
    load_per_LG = per_LG if load_tokens_LG is None else load_tokens_LG.to(prob_LC.dtype).clamp_min(1.0)
    if kind == "null_split":
        return _split_terms(prob_LC, load_LC, per_LG, load_per_LG, tables, weight_G)
    if kind == "null_averaged":
        load_LC = _average_copies(load_LC, groups, weight_G)
    if kind == "weighted":
        load_LC = _weighted(load_LC, groups, weight_G)
    products_LC = load_LC / load_per_LG[:, tables.group_C] * prob_LC / per_LG[:, tables.group_C]
    sums_LG = products_LC @ tables.member_CG.to(prob_LC.dtype)  # deterministic, unlike a scatter on CUDA
    if kind == "vanilla" or null_weight_G is None:
        return sums_LG * tables.size_G.to(prob_LC.dtype)
    free_G = [group.num_columns - group.num_experts if kind == "weighted" else group.num_null for group in groups]
    sizes = [group.num_columns + free * (w - 1.0) for group, free, w in zip(groups, free_G, weight_G, strict=True)]
    return _scaled(sums_LG, sizes)


def _weighted(load_LC: Tensor, groups: Sequence[ExpertGroup], weight_G: Sequence[float]) -> Tensor:
    """Divides the load of each null, identity and constant column by the null weight of the column's group."""
    at = sum(group.num_experts for group in groups)
    parts = [load_LC[:, :at]]
    kinds = zip(*((g.num_null, g.num_identity, g.num_constant) for g in groups), strict=True)
    for counts in kinds:
        for count, weight in zip(counts, weight_G, strict=True):
            parts.append(load_LC[:, at : at + count] / weight)
            at += count
    return torch.cat(parts, dim=1)


def _average_copies(load_LC: Tensor, groups: Sequence[ExpertGroup], weight_G: Sequence[float]) -> Tensor:
    """Replaces the load of each null column by (mean load of the group's null columns) / (null weight), and the load of
    each identity column by the mean load of the group's identity columns."""
    at = sum(group.num_experts for group in groups)
    parts = [load_LC[:, :at]]
    counts = [group.num_null for group in groups] + [group.num_identity for group in groups]
    for count, weight in zip(counts, [*weight_G, *([1.0] * len(groups))], strict=True):
        if count:
            copies = load_LC[:, at : at + count]
            parts.append(copies.mean(dim=1, keepdim=True).expand_as(copies) / weight)
            at += count
    return torch.cat([*parts, load_LC[:, at:]], dim=1)


def _split_terms(
    prob_LC: Tensor,
    load_LC: Tensor,
    per_LG: Tensor,
    load_per_LG: Tensor,
    tables: ColumnTables,
    weight_G: Sequence[float],
) -> Tensor:
    """Computes the loss `null_split` (see `balance_terms`). The loss of a group that has only true experts is constant."""
    num_true = sum(group.num_experts for group in tables.groups)
    member_CG = tables.member_CG.to(prob_LC.dtype)
    terms_LG = torch.zeros_like(per_LG)
    zero_G = [(group.num_columns - group.num_experts) * w for group, w in zip(tables.groups, weight_G, strict=True)]
    sizes = ([group.num_experts for group in tables.groups], zero_G)
    for part, size_G in zip((slice(0, num_true), slice(num_true, None)), sizes, strict=True):
        products_LG = (load_LC[:, part] @ member_CG[part]) * (prob_LC[:, part] @ member_CG[part]) / load_per_LG / per_LG
        terms_LG = terms_LG + _scaled(products_LG, [1.0 / size if size else 0.0 for size in size_G])
    factors = [(g.num_experts + zero) / g.top_k for g, zero in zip(tables.groups, zero_G, strict=True)]
    return _scaled(terms_LG, factors)


def _scaled(values_LG: Tensor, factor_G: Sequence[float]) -> Tensor:
    """Multiplies each group's column by a float, because copying a tensor of factors to the device would be a host sync."""
    return torch.stack([values_L * factor for values_L, factor in zip(values_LG.unbind(1), factor_G, strict=True)], dim=1)


def z_terms(log_z_squared_LG: Tensor, tokens_LG: Tensor) -> Tensor:
    """Returns this rank's part of each layer's router z-loss [L], with coefficient 1. The z-loss is the mean over tokens of
    logsumexp(logits)^2, over the columns of the token's group (ST-MoE, arXiv 2202.08906, eq. 5).
    `tokens_LG` counts the tokens of all ranks."""
    return log_z_squared_LG.sum(1) / tokens_LG.sum(1).to(log_z_squared_LG.dtype).clamp_min(1.0)


class StepLoad:
    """Keeps the load of each choice column over a whole step, for the balance loss of the next step.

    The load-balance loss is a sum of products, load times mean probability. If both factors came from one micro-batch, the
    loss would depend on the division of the step into micro-batches. It would also push even a micro-batch of similar
    tokens towards a uniform load. (Qiu et al., arXiv 2501.11873, therefore count loads over all earlier micro-batches of
    the step, too.) Loads have no gradient, so this class uses the loads of the previous step, which are known before the
    first forward. The balance loss is then a plain sum over the step's tokens: the micro-batch size, the number of
    micro-batches and the number of ranks change only the rounding.

    The counts cover all ranks. A group's counts come from the last step in which the group had tokens. Before the first
    step all counts are 0, so the balance loss of the first step is 0.

    Attributes:
        choices_LC: float64, number of choices of each column.
        tokens_LG: float64, number of tokens of each group.
    """

    def __init__(self, groups: Sequence[ExpertGroup], num_layers: int, device: torch.device) -> None:
        self._group_C = torch.tensor(group_columns(groups), device=device)
        self.choices_LC = torch.zeros((num_layers, len(self._group_C)), dtype=torch.float64, device=device)
        self.tokens_LG = torch.zeros((num_layers, len(groups)), dtype=torch.float64, device=device)

    def after_step(self, counts: RoutingCounts[Tensor]) -> None:
        """Stores the counts of a whole step over all ranks. If a group had no tokens in a layer, the layer keeps the
        group's old counts. Costs no collective and no host sync."""
        seen_LG = counts.tokens_LG > 0
        self.choices_LC = torch.where(seen_LG[:, self._group_C], counts.choices_LC, self.choices_LC)
        self.tokens_LG = torch.where(seen_LG, counts.tokens_LG, self.tokens_LG)

    def state(self) -> JsonValue:
        """Returns the counts of choices and of tokens as lists of rows, one row per layer. Host sync."""
        return {"choices": self.choices_LC.tolist(), "tokens": self.tokens_LG.tolist()}

    def restore(self, state: JsonValue) -> None:
        """Restores the value that `state` returned. Raises DataError if it has other numbers of layers, columns or groups
        than this model."""
        rows = state if isinstance(state, dict) else {}
        self.choices_LC = _counts("choices", rows.get("choices"), self.choices_LC)
        self.tokens_LG = _counts("tokens", rows.get("tokens"), self.tokens_LG)


def _counts(name: str, saved: object, like: Tensor) -> Tensor:
    """Returns saved counts as a tensor of the shape, dtype and device of `like`."""
    try:
        found = torch.tensor(saved, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None or found.shape != like.shape or not bool((found.isfinite() & (found >= 0)).all()):
        raise DataError(f"state of the balance loss: {name}={saved!r:.80} are not {tuple(like.shape)} counts")
    return found


def busiest_load(counts: RoutingCounts[Tensor], groups: Sequence[ExpertGroup]) -> Tensor:
    """Computes `Forwarded.busiest_G`, float64 [G], from counts with a row per layer of each micro-batch. Needs no sync."""
    choices_LC, tokens_LG = counts.choices_LC, counts.tokens_LG.to(torch.float64)
    most_G = []
    for g, group in enumerate(groups):
        even_L = tokens_LG[:, g] * (group.expected_experts_per_token / group.num_experts)
        choices_Ln = choices_LC[:, group.first_expert : group.first_expert + group.num_experts]
        most_G.append((choices_Ln.amax(1) / even_L.clamp_min(1e-9)).amax())
    return torch.stack(most_G)
