"""A router that takes the top k of true, null and zero-computation experts inside each token's group (AdaMoE, arXiv
2406.13233). Without null experts (m = 0) it is plain top-k.

    z = x W^T over the group's columns,  T(x) = top-k of z,  A(x) = T(x) without the null columns
    y = sum over A of w_i E_i(x); y = 0 if A is empty

Null choices and dropped pairs become absent pairs, which cost nothing after the router. The weights of identity and
constant experts are in a separate tensor, because these experts run on the token's rank. Shape letters: T tokens, D hidden
size, C columns, K choices, G expert groups, n true and m null experts of a group, E true experts, F zero-computation
columns.
"""

from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.kernels.interface import TopK
from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routers.capacity import capacity_of, over_capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.counts import AuxSums, RoutingCounts
from moe_dist.moe.routing.types import ABSENT, Assignments, ChosenColumns, Routing, RoutingCache, group_columns
from moe_dist.placement.parameter_names import Role, group_module
from moe_dist.placement.placement import ExpertGroup

Normalise = Literal["true_chosen", "all_chosen", "true_all", "none"]
NullLogit = Literal["each", "single"]
KINDS = ("true", "null", "identity", "constant")  # order of the kinds among a group's columns


def column_counts(group: ExpertGroup) -> dict[str, int]:
    counts = (group.num_experts, group.num_null, group.num_identity, group.num_constant)
    return dict(zip(KINDS, counts, strict=True))


class GroupGate(nn.Module):
    """The rows of one group's router weight: the parameter `true` [n, D], and `null`, `identity` and `constant` if needed.

    With a single null logit, `null` has one row for all null columns. With a selection bias, the buffer `bias` has one
    number per column of the group, in the order of `KINDS`. With logit biases, `offset` [n] has one number for each true
    expert.
    """

    role = Role.ROUTER
    bias: Tensor
    initial_values: ClassVar = {"offset": 0.0, "level": 0.0}

    def __init__(
        self, hidden_dim: int, group: ExpertGroup, *, null_logit: NullLogit = "each", logit_bias: bool = False
    ) -> None:
        super().__init__()
        for kind, count in column_counts(group).items():
            if count:
                num_rows = 1 if (kind, null_logit) == ("null", "single") else count
                self.register_parameter(kind, nn.Parameter(torch.empty(num_rows, hidden_dim)))
        if logit_bias:
            self.offset = nn.Parameter(torch.empty(group.num_experts))

    @torch.no_grad()
    def zero_rows(self, step: float) -> int:
        """Sets all router rows to 0, so that all columns get the same score. Returns the number of rows. The biases of the
        null columns become -step, -2 step and so on. If a controller then lowers the biases of all true experts by r times
        `step`, null experts replace only r of each token's true experts."""
        rows = dict(self.named_parameters())
        if "null" in rows and "bias" in dict(self.named_buffers()):
            first, count = rows["true"].shape[0], rows["null"].shape[0]
            self.bias[first : first + count] = -step * torch.arange(1, count + 1, device=self.bias.device)
        return sum(each.zero_().shape[0] for each in rows.values())

    @torch.no_grad()
    def copy_true_rows(self) -> int:
        """Copies each of the router's n true rows into m / n of its m null rows (AdaMoE, section 4.2). Returns m, which is
        0 if the group has no null experts."""
        true_nD, null_mD = self.get_parameter("true"), dict(self.named_parameters()).get("null")
        if null_mD is None:
            return 0
        null_mD.copy_(true_nD.repeat(null_mD.shape[0] // true_nD.shape[0], 1))
        return null_mD.shape[0]


class _Chosen(NamedTuple):
    """The choices of T tokens.

    Attributes:
        column_TK: Chosen columns, the best first.
        valid_TK: bool, false for padding and for choices beyond the k of the token's group.
        true_TK, null_TK: bool, the valid choices of true experts, and the valid choices of null experts.
        factor_TK: Factor of each weight, with gradient. Only `PredictedKRouter` sets it.
    """

    column_TK: Tensor
    valid_TK: Tensor
    true_TK: Tensor
    null_TK: Tensor
    factor_TK: Tensor | None = None


class TopKRouter(nn.Module):
    """Routes T tokens, each to experts of the token's group.

    If `context.kernels` has `choose`, this kernel computes everything after the logits. The kernel is not used with a
    selection bias, a capacity, zero-computation experts or `true_all`, nor if the request asks for probabilities of tokens.

    Args:
        normalise: The columns over which the softmax of the weights runs. `true_chosen`: the token's choices that are not
            null (AdaMoE). `all_chosen`: all choices of the token. `true_all`: all columns that are not null. `none`: all
            columns.
        scale: Factor of every weight.
        null_logit: `each`: every null column has its own row of the router weight. `single`: all null columns share one
            row. Its logit is a learned threshold, which depends on the token (Kilian et al., arXiv 2601.15370).
        selection_bias: If true, tokens choose by softmax + bias; weights do not contain the bias (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2; LongCat-Flash and Ernie 4.5 add the bias to a softmax). Biases start at 0. While all
            biases of a group are 0, its tokens choose by logits, whose order is the order of the softmax, but without ties
            from rounding.
        logit_bias: Whether each true expert's logit has a learned bias. Groups must then have only true experts.
    """

    group_of_column_C: Tensor
    columns_E: Tensor  # number of columns of each true expert's group
    choices_E: Tensor  # k of each true expert's group
    group_of_expert_E: Tensor
    top_k_G: Tensor  # k of each group; the last entry, 0, is for padding (group -1)

    def __init__(
        self,
        context: RouterContext,
        *,
        normalise: Normalise = "true_chosen",
        scale: float = 1.0,
        null_logit: NullLogit = "each",
        selection_bias: bool = False,
        logit_bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernels, self.capacity = context.kernels, context.capacity
        self.groups = groups = tuple(context.groups)
        self.normalise: Normalise = normalise
        self.scale = scale
        self.null_logit: NullLogit = null_logit
        self.selection_bias = selection_bias
        self.logit_bias = logit_bias
        self.num_choices = max(group.top_k for group in groups)
        self.num_experts = sum(group.num_experts for group in groups)
        self.first_zero_computation = self.num_experts + sum(group.num_null for group in groups)
        self.num_zero_computation = sum(group.num_columns for group in groups) - self.first_zero_computation
        for group in groups:
            gate = GroupGate(context.hidden_dim, group, null_logit=null_logit, logit_bias=logit_bias)
            self.add_module(group_module(group.name), gate)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Creates the buffers (constants, and biases of 0) on the default device. Call this method again after moving the
        module from the meta device, where buffers have no values."""
        groups = self.groups
        by_expert = [group for group in groups for _ in group.experts]
        tables = {
            "group_of_column_C": group_columns(groups),
            "columns_E": [group.num_columns for group in by_expert],
            "choices_E": [group.top_k for group in by_expert],
            "group_of_expert_E": [groups.index(group) for group in by_expert],
            "top_k_G": [group.top_k for group in groups] + [0],
        }
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        if self.selection_bias:
            for group in groups:
                self.gate(group).register_buffer("bias", torch.zeros(group.num_columns))

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        """Routes the tokens `h_TD`. `group_T` (int64) has each token's group, or -1 for padding, which is not routed. All
        arithmetic is fp32 (float64 for a float64 model). Costs no host sync."""
        dtype = accumulation_dtype(h_TD.dtype)
        cache = cache or RoutingCache()
        with torch.autocast(device_type=h_TD.device.type, enabled=False):  # autocast would run the router in bf16
            logits_TC = self._all_logits(h_TD.to(dtype), cache)
            if self._one_kernel(logits_TC, cache):
                return self._choose_at_once(logits_TC, group_T, cache)
            routed_T = group_T >= 0
            # A temporary bool [T, C]. Padding keeps finite logits, because a softmax over -inf alone is NaN. No sum
            # includes padding.
            outside_TC = (self.group_of_column_C != group_T[:, None]) & routed_T[:, None]
            masked_TC = logits_TC.masked_fill(outside_TC, float("-inf"))
            probs_TC = self._probs(masked_TC)
            chosen = self._choose(masked_TC, probs_TC, group_T, cache)
            counts, aux = self._sums(masked_TC, probs_TC, chosen, group_T)
            weight_TK = self._weights(masked_TC, probs_TC, chosen)
            taken_TK = chosen.true_TK
            if self.capacity is not None and self.training:
                dropped_TK = self._dropped(probs_TC, chosen, counts.tokens_LG[0], cache)
                taken_TK = taken_TK & ~dropped_TK
                dropped_C = self._count(chosen.column_TK, dropped_TK, masked_TC.shape[1])
                counts = counts._replace(dropped_LE=dropped_C[None, : self.num_experts])
            free_TF = self._free_weights(weight_TK, chosen)
        # `_weights` sets weights of null choices and padding to 0, but not of dropped choices and zero-computation experts.
        whole = taken_TK is chosen.true_TK and free_TF is None
        token_T = torch.arange(h_TD.shape[0], device=h_TD.device)
        assignments = Assignments(
            token_N=token_T.repeat_interleave(self.num_choices),
            expert_N=torch.where(taken_TK, chosen.column_TK, ABSENT).flatten(),
            weight_N=(weight_TK if whole else torch.where(taken_TK, weight_TK, 0.0)).flatten(),
            num_choices=self.num_choices,
        )
        prob_AC = None if cache.probe_tokens_A is None else probs_TC[cache.probe_tokens_A]
        recorded = _recorded(chosen, taken_TK, weight_TK) if cache.keep_choices else None
        return Routing(assignments, counts, aux, free_TF, prob_AC, recorded)

    def _one_kernel(self, logits_TC: Tensor, cache: RoutingCache) -> bool:
        """Returns whether `kernels.choose` supports this router's options and the caller's request."""
        rare = self.selection_bias or self.num_zero_computation or self.normalise == "true_all"
        limited = self.capacity is not None and self.training
        probed = cache.probe_tokens_A is not None
        return self.kernels.has_choose and not (rare or limited or probed) and logits_TC.dtype == torch.float32

    def _choose_at_once(self, logits_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> Routing:
        tables = (self.group_of_column_C, self.top_k_G, self.num_experts, self.num_choices)
        made = self.kernels.choose(logits_TC, group_T, TopK(*tables, self.scale, self.normalise), cache.choice_TK)
        cache.choice_TK = made.choice_TK
        choices_LC, tokens_LG = made.counts[None].split([logits_TC.shape[1], len(self.groups)], dim=1)
        counts = RoutingCounts(choices_LC, tokens_LG, made.entropy_G[None], self._none_dropped(group_T))
        aux = AuxSums(made.prob_C[None], made.log_z_squared_G[None])
        recorded = None
        if cache.keep_choices:
            true_TK, valid_TK = (made.expert_N != ABSENT).view_as(made.choice_TK), self._valid(group_T)
            chosen = _Chosen(made.choice_TK, valid_TK, true_TK, valid_TK ^ true_TK)
            recorded = _recorded(chosen, true_TK, made.weight_N.view_as(true_TK))
        pairs = Assignments(made.token_N, made.expert_N, made.weight_N, num_choices=self.num_choices)
        return Routing(pairs, counts, aux, chosen=recorded)

    def _all_logits(self, h_TD: Tensor, cache: RoutingCache) -> Tensor:
        """Returns the logits [T, C]. Subclasses may add logits from the cache to the result of `_logits`."""
        return self._logits(h_TD)

    def _logits(self, h_TD: Tensor) -> Tensor:
        """Returns the logits [T, C]. A null row that copies a true row must give exactly the same logit. But the bits of a
        matrix product depend on its shape, so null rows are multiplied in slices of n rows (n true rows)."""
        parts = []
        for kind in KINDS:
            for group in self.groups:
                count = column_counts(group)[kind]
                if count:
                    rows = self._gate(group, kind).to(h_TD.dtype)
                    num_rows = group.num_experts
                    slices = [rows] if rows.shape[0] == num_rows else rows.split(num_rows)  # backward of a split copies
                    products = [F.linear(h_TD, slice_nD) for slice_nD in slices]
                    single = (kind, self.null_logit) == ("null", "single")  # whether null columns share one logit
                    parts += [products[0].expand(-1, count)] if single else products
        logits_TC = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.logit_bias:
            logits_TC = logits_TC + torch.cat([self._gate(group, "offset") for group in self.groups]).to(h_TD.dtype)
        return logits_TC

    def gate(self, group: ExpertGroup) -> nn.Module:
        return self.get_submodule(group_module(group.name))

    def _gate(self, group: ExpertGroup, name: str) -> Tensor:
        return getattr(self.gate(group), name)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        """Returns the selection biases of all columns [C]."""
        return self._of_columns("bias", dtype)

    def _of_columns(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one value per column [C] from the gates' tensors `name`, whose entries have the order of `KINDS`."""
        parts = [self._gate(group, name).split(list(column_counts(group).values())) for group in self.groups]
        return torch.cat([part[kind] for kind in range(len(KINDS)) for part in parts]).to(dtype)

    def _probs(self, masked_TC: Tensor) -> Tensor:
        """Returns the probabilities [T, C] for weights and balance loss; 0 for columns outside of the token's group."""
        return masked_TC.softmax(dim=-1)

    def _shares(self, probs_TC: Tensor) -> Tensor:
        """Returns the distribution [T, C] whose entropy is reported, from the result of `_probs`."""
        return probs_TC

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        """Returns the scores [T, C] by which tokens choose, without gradient; -inf outside of the token's group."""
        score_TC = masked_TC.detach()
        if not self.selection_bias:
            return score_TC
        biased_TC = probs_TC.detach() + self._bias(probs_TC.dtype)
        biased_TC = biased_TC.masked_fill(score_TC == float("-inf"), float("-inf"))
        biased_G = torch.stack([self._gate(group, "bias").any() for group in self.groups])  # kept on the device: no sync
        return torch.where(biased_G[self.group_of_column_C], biased_TC, score_TC)

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        if cache.choice_TK is None:
            score_TC = self._selection_scores(masked_TC, probs_TC)
            # In a stable sort the first columns, the true experts, win ties. In torch.topk any column may win a tie.
            order_TC = torch.sort(score_TC, dim=-1, descending=True, stable=True).indices
            cache.choice_TK = order_TC[:, : self.num_choices].contiguous()  # a view would keep all scores [T, C] in memory
        column_TK = cache.choice_TK
        valid_TK = self._valid(group_T)
        true_TK = valid_TK & (column_TK < self.num_experts)
        null_TK = valid_TK ^ true_TK  # all valid choices that are not true
        if self.num_zero_computation:
            null_TK = null_TK & (column_TK < self.first_zero_computation)
        return _Chosen(column_TK, valid_TK, true_TK, null_TK)

    def _valid(self, group_T: Tensor) -> Tensor:
        """Returns a bool [T, K] that is false for padding and for choices beyond the k of the token's group."""
        return torch.arange(self.num_choices, device=group_T.device) < self.top_k_G[group_T][:, None]

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        """Returns the weight of each choice [T, K]; 0 for null and for invalid choices."""
        kept_TK = chosen.valid_TK ^ chosen.null_TK  # null choices are valid
        if self.normalise == "none":
            weight_TK = probs_TC.gather(1, chosen.column_TK)
        elif self.normalise == "true_all":
            weight_TK = self._true_probs(masked_TC).gather(1, chosen.column_TK)
        else:
            among_TK = kept_TK if self.normalise == "true_chosen" else chosen.valid_TK
            weight_TK = _softmax_among(masked_TC.gather(1, chosen.column_TK), among_TK)
        weight_TK = torch.where(kept_TK, weight_TK, 0.0)
        return weight_TK if self.scale == 1.0 else self.scale * weight_TK

    def _true_probs(self, masked_TC: Tensor) -> Tensor:
        """Returns the softmax over the group's columns that are not null, [T, C]; 0 for null columns."""
        true_TE, null_TN, free_TF = masked_TC.tensor_split((self.num_experts, self.first_zero_computation), dim=1)
        # cat also makes a contiguous copy: the bits of a softmax may depend on the stride of its rows.
        kept = torch.cat([true_TE, free_TF], dim=1).softmax(-1)
        return torch.cat([kept[:, : self.num_experts], torch.zeros_like(null_TN), kept[:, self.num_experts :]], dim=1)

    def _free_weights(self, weight_TK: Tensor, chosen: _Chosen) -> Tensor | None:
        if not self.num_zero_computation:
            return None
        free_TK = chosen.valid_TK & (chosen.column_TK >= self.first_zero_computation)
        slot_TK = torch.where(free_TK, chosen.column_TK - self.first_zero_computation, self.num_zero_computation)
        # An extra last column collects choices of true and null experts, so that no shape depends on data.
        table_TF = weight_TK.new_zeros(weight_TK.shape[0], self.num_zero_computation + 1)
        return table_TF.scatter_add(1, slot_TK, torch.where(free_TK, weight_TK, 0.0))[:, : self.num_zero_computation]

    def _dropped(self, probs_TC: Tensor, chosen: _Chosen, tokens_G: Tensor, cache: RoutingCache) -> Tensor:
        """Returns a bool [T, K] that is true for choices that exceed the capacity of a true expert."""
        assert self.capacity is not None
        if cache.dropped_TK is None:
            choices_E = self.choices_E * tokens_G[self.group_of_expert_E]
            over_N = over_capacity(
                torch.where(chosen.true_TK, chosen.column_TK, ABSENT).flatten(),
                probs_TC.detach().gather(1, chosen.column_TK).flatten(),
                capacity_of(self.capacity.factor, choices_E, self.columns_E),
                self.capacity.drop,
            )
            cache.dropped_TK = over_N.view_as(chosen.column_TK)  # recomputation must drop the same pairs as forward
        return cache.dropped_TK

    @staticmethod
    def _count(column_TK: Tensor, marked_TK: Tensor, num_columns: int) -> Tensor:
        """Returns the number of choices of each column where `marked_TK` is true, int64 [C]."""
        counts = torch.zeros(num_columns, dtype=torch.int64, device=column_TK.device)
        return counts.scatter_add_(0, column_TK.flatten(), marked_TK.flatten().to(torch.int64))

    def _none_dropped(self, group_T: Tensor) -> Tensor:
        return torch.zeros((1, self.num_experts), dtype=torch.int64, device=group_T.device)

    def _sums(
        self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen, group_T: Tensor
    ) -> tuple[RoutingCounts[Tensor], AuxSums]:
        routed_T = group_T >= 0
        # A one-hot matrix turns sums by group into matrix products, which are deterministic on every device.
        member_TG = group_T[:, None] == torch.arange(len(self.groups), device=group_T.device)
        log_z_T = masked_TC.logsumexp(dim=-1)
        member = member_TG.to(log_z_T.dtype)
        with torch.no_grad():
            share_TC = self._shares(probs_TC)
            # xlogy, because p log p must be 0 at p = 0
            entropy_T = -torch.xlogy(share_TC, share_TC).sum(-1)
        counts = RoutingCounts(
            choices_LC=self._count(chosen.column_TK, chosen.valid_TK, masked_TC.shape[1])[None],
            tokens_LG=member_TG.sum(0, keepdim=True),
            entropy_LG=(entropy_T @ member)[None],
            dropped_LE=self._none_dropped(group_T),
        )
        prob_C, log_z_squared_G = (probs_TC * routed_T[:, None]).sum(0), log_z_T.square() @ member
        return counts, AuxSums(prob_C[None], log_z_squared_G[None])


@torch.no_grad()
def _recorded(chosen: _Chosen, taken_TK: Tensor, weight_TK: Tensor) -> ChosenColumns:
    """Returns the choices in the encoding of `ChosenColumns`."""
    dropped_TK = chosen.true_TK & ~taken_TK
    column_TK = torch.where(dropped_TK, -2 - chosen.column_TK, chosen.column_TK)
    column_TK = torch.where(chosen.valid_TK, column_TK, ABSENT)
    weight_TK = torch.where(chosen.valid_TK & ~dropped_TK, weight_TK, 0.0)
    return ChosenColumns(column_TK.to(torch.int16), weight_TK.to(torch.float16))


def _softmax_among(logits_TK: Tensor, among_TK: Tensor) -> Tensor:
    """Returns each row's softmax over entries marked by `among_TK`, 0 elsewhere. Rows without marks have no gradient."""
    safe_TK = torch.where(among_TK, logits_TK, 0.0)  # -inf minus -inf would give NaN gradients despite the mask
    top_T1 = torch.where(among_TK, logits_TK, float("-inf")).amax(-1, keepdim=True).detach()
    top_T1 = torch.where(top_T1.isfinite(), top_T1, 0.0)
    exp_TK = torch.where(among_TK, (safe_TK - top_T1).exp(), 0.0)
    # Adds the exponentials one by one, because torch's sum adds in an order that depends on K. Adding 0 changes no bit, so
    # a token's weights do not depend on the number of null choices between its true choices.
    total_T1 = reduce(torch.add, exp_TK.split(1, dim=-1))
    # the largest exponential is 1, so the clamp changes only rows without marked entries
    return exp_TK / total_T1.clamp_min(0.5)
