"""Top-k over true and null experts, inside the group of each token (AdaMoE, arXiv 2406.13233; top-k where m = 0).

    z = x W^T over the group's n + m experts,  T(x) = top-k of z,  A(x) = T(x) within the n true experts
    y = sum over A of w_i E_i(x); a token whose A is empty gets 0, and the residual carries it.

Null choices end here: they are pairs marked absent, and nothing behind the router knows of them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.routing import (
    ABSENT,
    Assignments,
    RouterSums,
    Routing,
    RoutingTape,
    accumulation_dtype,
    group_columns,
)
from moe_dist.placement.placement import ExpertGroup

Normalise = Literal["true_chosen", "all_chosen", "none"]


class GroupGate(nn.Module):
    """Router rows of one group: `true` [n, D] and `null` [m, D]."""

    def __init__(self, hidden_dim: int, group: ExpertGroup) -> None:
        super().__init__()
        self.true = nn.Parameter(torch.empty(group.num_experts, hidden_dim))
        if group.num_null:
            self.null = nn.Parameter(torch.empty(group.num_null, hidden_dim))


class TopKRouter(nn.Module):
    """Routes T tokens, each inside its group.

    Args:
        hidden_dim: D.
        groups: All groups, in logical order.
        normalise: Weights are a softmax over the chosen true experts (AdaMoE's own), over all chosen experts with the
            true ones kept, or the plain softmax over the group.
        scale: Factor on every weight.
    """

    group_of_column_C: Tensor
    top_k_G: Tensor  # with a last 0, which padding's group -1 reads

    def __init__(
        self, hidden_dim: int, groups: Sequence[ExpertGroup], *, normalise: Normalise = "true_chosen", scale: float = 1.0
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.normalise: Normalise = normalise
        self.scale = scale
        self.num_choices = max(group.top_k for group in groups)
        self.num_experts = sum(group.num_experts for group in groups)
        for group in groups:
            self.add_module(group.name, GroupGate(hidden_dim, group))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Makes the constant tables on the default device; called again after a move from the meta device."""
        columns = group_columns(
            tuple(group.num_experts for group in self.groups), tuple(group.num_null for group in self.groups)
        )
        self.register_buffer("group_of_column_C", torch.tensor(columns), persistent=False)
        self.register_buffer("top_k_G", torch.tensor([group.top_k for group in self.groups] + [0]), persistent=False)

    def forward(self, h_TD: Tensor, group_T: Tensor, tape: RoutingTape | None = None) -> Routing:
        """Routes tokens `h_TD` of the groups `group_T` (int64; -1 for padding, which is not routed).

        All arithmetic is fp32 (float64 for a float64 model). Shapes depend on T alone: no host sync.
        """
        dtype = accumulation_dtype(h_TD.dtype)
        with torch.autocast(device_type=h_TD.device.type, enabled=False):
            logits_TC = self._logits(h_TD.to(dtype))
            routed_T = group_T >= 0
            inside_TC = self.group_of_column_C == group_T[:, None]
            # Padding keeps finite logits, so that no softmax sees a row of -inf; it is masked out of every sum.
            masked_TC = logits_TC.masked_fill(~inside_TC & routed_T[:, None], float("-inf"))
            probs_TC = masked_TC.softmax(dim=-1)
            choice_TK = self._choose(masked_TC, tape)
            valid_TK = torch.arange(self.num_choices, device=h_TD.device) < self.top_k_G[group_T][:, None]
            true_TK = valid_TK & (choice_TK < self.num_experts)
            weight_TK = self._weights(masked_TC, probs_TC, choice_TK, valid_TK, true_TK)
            sums = self._sums(masked_TC, probs_TC, choice_TK, valid_TK, group_T)
        token_T = torch.arange(h_TD.shape[0], device=h_TD.device)
        assignments = Assignments(
            token_N=token_T.repeat_interleave(self.num_choices),
            expert_N=torch.where(true_TK, choice_TK, ABSENT).flatten(),
            weight_N=weight_TK.flatten(),
        )
        return Routing(assignments, sums)

    def _logits(self, h_TD: Tensor) -> Tensor:
        """Logits of all columns [T, C]. Null rows go in slices of n, each a product of the true rows' shape: the bits of a
        product depend on its shape, and a null row that copies a true one must tie with it exactly (methods of AdaMoE)."""
        gates = [self.get_submodule(group.name) for group in self.groups]
        true = [F.linear(h_TD, gate.true.to(h_TD.dtype)) for gate in gates]  # pyright: ignore
        null = [
            F.linear(h_TD, rows)
            for gate, group in zip(gates, self.groups, strict=True)
            if group.num_null
            for rows in gate.null.to(h_TD.dtype).split(group.num_experts)  # pyright: ignore
        ]
        return torch.cat([*true, *null], dim=1)

    def _choose(self, masked_TC: Tensor, tape: RoutingTape | None) -> Tensor:
        """The K best columns of each token. A stable sort: torch.topk would not let ties go to true experts."""
        if tape is not None and tape.choice_TK is not None:
            return tape.choice_TK
        order_TC = torch.sort(masked_TC.detach(), dim=-1, descending=True, stable=True).indices
        choice_TK = order_TC[:, : self.num_choices].contiguous()  # a view would keep all columns
        if tape is not None:
            tape.choice_TK = choice_TK
        return choice_TK

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, choice_TK: Tensor, valid_TK: Tensor, true_TK: Tensor) -> Tensor:
        if self.normalise == "none":
            weight_TK = probs_TC.gather(1, choice_TK)
        else:
            among_TK = true_TK if self.normalise == "true_chosen" else valid_TK
            weight_TK = _softmax_among(masked_TC.gather(1, choice_TK), among_TK)
        return self.scale * torch.where(true_TK, weight_TK, 0.0)

    def _sums(
        self, masked_TC: Tensor, probs_TC: Tensor, choice_TK: Tensor, valid_TK: Tensor, group_T: Tensor
    ) -> RouterSums:
        num_columns, num_groups = masked_TC.shape[1], len(self.groups)
        routed_T = group_T >= 0
        bins_N = torch.where(valid_TK, choice_TK, num_columns).flatten()
        choices_C = torch.zeros(num_columns + 1, dtype=torch.int64, device=group_T.device)
        choices_C.scatter_add_(0, bins_N, torch.ones_like(bins_N))
        # One-hot of the group: sums by group are small matrix products, deterministic on every device.
        member_TG = group_T[:, None] == torch.arange(num_groups, device=group_T.device)
        log_z_T = masked_TC.logsumexp(dim=-1)
        member = member_TG.to(log_z_T.dtype)
        with torch.no_grad():
            # An impossible column adds nothing: p log p is 0 at p = 0.
            entropy_T = -torch.xlogy(probs_TC, probs_TC).sum(-1)
        return RouterSums(
            choices_C=choices_C[:num_columns],
            prob_C=(probs_TC * routed_T[:, None]).sum(0),
            tokens_G=member_TG.sum(0),
            log_z_squared_G=log_z_T.square() @ member,
            entropy_G=entropy_T @ member,
        )


def _softmax_among(logits_TK: Tensor, among_TK: Tensor) -> Tensor:
    """Softmax over the marked entries of each row; 0 elsewhere, and all 0 with zero gradient where none is marked."""
    safe_TK = torch.where(among_TK, logits_TK, 0.0)
    top_T1 = torch.where(among_TK, logits_TK, float("-inf")).amax(-1, keepdim=True).detach()
    top_T1 = torch.where(top_T1.isfinite(), top_T1, 0.0)
    exp_TK = torch.where(among_TK, (safe_TK - top_T1).exp(), 0.0)
    # The largest exponential is 1, so the sum is at least 1 wherever anything is marked.
    return exp_TK / exp_TK.sum(-1, keepdim=True).clamp_min(0.5)
