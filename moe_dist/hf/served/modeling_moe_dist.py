"""A decoder with groups of experts, as moe_dist trains it, for transformers. Needs transformers only.

A token takes some of the columns of its group's router. The kind of router determines the number. The columns are, in this
order, FFN experts, null experts (which add nothing and cost nothing), identity experts (which add the token's normed input)
and constant experts (which mix the input with a learned vector). The token id determines the group.
"""
# ruff: noqa: RUF012

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_attention_with_sinks
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
from transformers.models.llama.modeling_llama import eager_attention_forward as eager_attention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_moe_dist import MoeDistConfig

# This number, times the scale of attention, is added to the scores of tokens that skipped the layer, so that their
# probability is exactly 0.
SKIPPED = -1e4
# The name of transformers' cache of keys and values, which was `past_key_values` before version 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MoeDistRotaryEmbedding(Glm4MoeRotaryEmbedding):
    """Rotary positions of heads or parts of heads. With `dynamic` scaling, the base of the rotary frequencies is computed
    for each sequence, not for the batch."""

    @torch.no_grad()
    def forward(self, x, position_ids):
        if self.rope_type != "dynamic":
            return super().forward(x, position_ids)
        parameters, dim = dict(self.config.rope_parameters or {}), 2 * len(self.inv_freq)
        length = position_ids.amax(-1, keepdim=True).float() + 1
        growth = parameters["factor"] * (length / self.config.max_position_embeddings - 1) + 1
        base = parameters["rope_theta"] * growth.clamp(min=1.0) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=x.device, dtype=torch.float) / dim
        angles = (position_ids[..., None].float() * base[..., None] ** -exponents).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def in_halves(x, rotated):
    """Moves the values 2 i and 2 i + 1 of a head's first `rotated` values to i and i + `rotated` / 2."""
    return torch.cat([x[..., 0:rotated:2], x[..., 1:rotated:2], x[..., rotated:]], dim=-1)


class MoeDistClampedMLP(nn.Module):
    """An expert of gpt-oss: biases, a bounded gate, and a bounded `up` plus 1."""

    def __init__(self, config: MoeDistConfig, intermediate_size: int):
        super().__init__()
        self.alpha, self.limit = config.experts["alpha"], config.experts["limit"]
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(gate * (self.alpha * gate).sigmoid() * (up + 1))


EXPERTS = {"ffn": Qwen2MoeMLP, "clamped_ffn": MoeDistClampedMLP}


class MoeDistAttention(nn.Module):
    """The base class of all kinds of attention. A subclass has the projections."""

    o_proj: nn.Linear
    eager = staticmethod(eager_attention)

    def __init__(self, config: MoeDistConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, taken=None, **kwargs):
        """Returns output and attention weights. `taken` [batch, tokens] is true for tokens that a mixture-of-depths layer
        computes."""
        query, key, value = self.project(hidden_states, position_embeddings)
        if taken is not None:
            # An additional channel of queries and keys hides the tokens that skip the layer, with any cache and attention.
            query = F.pad(query, (0, 1), value=1.0)
            hidden = torch.where(taken, 0.0, SKIPPED).to(key.dtype)[:, None, :, None]
            key = torch.cat([key, hidden.expand(*key.shape[:-1], 1)], dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        key, value = self.expand(key, value)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)  # pyright: ignore
        options = {"dropout": 0.0, "sliding_window": self.sliding_window, **self.options(), **kwargs}
        # vLLM reads the scale in this call, and its attention returns [tokens, width].
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **options)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def project(self, hidden_states, position_embeddings):
        """Returns queries, and the cached key and value; all [batch, heads, tokens, width]."""
        raise NotImplementedError

    def expand(self, key, value):
        """Returns keys and values of all heads from the cached key and value."""
        return key, value

    def options(self):
        """Returns further keywords for transformers' attention."""
        return {}

    def rotate(self, query, key, position_embeddings):
        if self.config.rope_pairs == "adjacent":  # queries and keys are reordered alike, so their products stay the same
            query, key = (in_halves(each, position_embeddings[0].shape[-1]) for each in (query, key))
        return apply_rotary_pos_emb(query, key, *position_embeddings)


class MoeDistGroupedQueryAttention(MoeDistAttention):
    def __init__(self, config: MoeDistConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.projection_bias
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias != "none")
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias != "none")
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias != "none")
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=bias == "qkvo")
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = LlamaRMSNorm(self.head_dim if per_head else heads, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim if per_head else kv_heads, eps=config.rms_norm_eps)

    def project(self, hidden_states, position_embeddings):
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(hidden_shape), key.view(hidden_shape)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        return *self.rotate(query.transpose(1, 2), key.transpose(1, 2), position_embeddings), value


class MoeDistSinkAttention(MoeDistGroupedQueryAttention):
    """Grouped-query attention with a learned score of each head beside the tokens' scores, as in gpt-oss."""

    eager = staticmethod(eager_attention_with_sinks)

    def __init__(self, config: MoeDistConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def options(self):
        return {"s_aux": self.sinks}


class MoeDistLatentAttention(MoeDistAttention):
    """Multi-head latent attention, as in DeepSeek-V3. The cache keeps the rotated part of the keys, and the latent."""

    def __init__(self, config: MoeDistConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden_size, heads, rope = config.hidden_size, config.num_attention_heads, config.rope_parameters
        q_rank, kv_rank, value_dim = (config.attention[name] for name in ("q_rank", "kv_rank", "value_dim"))
        rotated = int(self.head_dim * rope["partial_rotary_factor"])
        plain = self.head_dim - rotated
        self.query_parts, self.latent_parts, self.head_parts = [plain, rotated], [kv_rank, rotated], [plain, value_dim]
        if rope.get("mscale_all_dim") and rope["factor"] > 1:
            self.scaling *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
        self.has_latent_queries, scaled = q_rank is not None, config.attention.get("scaled", False)
        self.query_scale = (hidden_size / q_rank) ** 0.5 if scaled and q_rank else 1.0
        self.latent_scale = (hidden_size / kv_rank) ** 0.5 if scaled else 1.0
        if q_rank is None:
            self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        else:
            self.q_a_proj, self.q_a_layernorm = nn.Linear(hidden_size, q_rank, bias=False), LlamaRMSNorm(q_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_rank, heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_rank + rotated, bias=False)
        self.kv_a_layernorm = LlamaRMSNorm(kv_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (plain + value_dim), bias=False)
        self.o_proj = nn.Linear(heads * value_dim, hidden_size, bias=False)

    def project(self, hidden_states, position_embeddings):
        if self.has_latent_queries:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)) * self.query_scale)
        else:
            query = self.q_proj(hidden_states)
        heads = query.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        plain, turned = heads.split(self.query_parts, dim=-1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).split(self.latent_parts, dim=-1)
        turned, key = self.rotate(turned, key[:, None], position_embeddings)
        return torch.cat([plain, turned], dim=-1), key, self.kv_a_layernorm(latent)[:, None] * self.latent_scale

    def expand(self, key, value):
        both = self.kv_b_proj(value[:, 0]).unflatten(-1, (-1, sum(self.head_parts))).transpose(1, 2)
        plain, value = both.split(self.head_parts, dim=-1)
        return torch.cat([plain, key.expand(-1, plain.shape[1], -1, -1)], dim=-1), value


ATTENTIONS = {
    "grouped_query": MoeDistGroupedQueryAttention,
    "latent": MoeDistLatentAttention,
    "sinks": MoeDistSinkAttention,
}


# The rule of each kind of router: a function from logits to scores, then three methods of MoeDistRouter. They return the
# values by which columns are ordered, the fraction of its weight that each of the first `top_k` columns gets, and the
# weights.
ROUTERS = {
    "top_k": ("softmax", "biased", "whole", "normalised"),
    "group_limited": ("sigmoid", "limited", "whole", "among_taken"),  # DeepSeek-V3
    "top_p": ("softmax", "shifted", "until_p", "normalised"),
    "relu": ("relu", "by_logit", "positive", "normalised"),  # ReMoE
    "threshold": ("sigmoid", "above_level", "admitted_by_level", "equal"),  # DynMoE
    "predicted_k": ("softmax", "shifted", "predicted", "normalised"),
    "expert_threshold": ("sigmoid", "biased", "admitted", "normalised"),
    "expert_choice": ("sigmoid", "biased", "admitted", "normalised"),  # routes as in evaluation
}
SCORES = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}


class MoeDistRouter(nn.Module):
    """Chooses columns for each token, and weighs them, by the rule of its kind. Computes in fp32."""

    def __init__(self, config: MoeDistConfig, group: dict):
        super().__init__()
        self.options, hidden_size = config.router, config.hidden_size
        score, *self.methods = ROUTERS[config.router["kind"]]
        self.score = SCORES[config.router.get("score", score)]  # older exports have no score
        self.normalise, self.scale = config.router.get("normalise", "none"), config.router.get("scale", 1.0)
        self.num_experts, self.num_null = group["num_experts"], group["num_null"]
        self.top_k = self.num_experts if "admitted" in self.methods else group["top_k"]
        # Router rows are multiplied in parts of `num_experts` rows, as in training, because the bits of a product depend on
        # its shape. A null expert's row that copies an expert's row must give the same logit, because the expert must win
        # this tie.
        self.parts = []  # (rows, columns) of each part; one row may give the logit of all null columns
        for name in ("num_experts", "num_null", "num_identity", "num_constant"):
            count = group[name]
            if name == "num_null" and count and config.router.get("null_logit") == "single":
                self.parts.append((1, count))
            else:
                starts = range(0, count, self.num_experts)
                self.parts += [(min(self.num_experts, count - start),) * 2 for start in starts]
        self.num_columns = sum(columns for _, columns in self.parts)
        self.weight = nn.Parameter(torch.empty(sum(rows for rows, _ in self.parts), hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if config.router.get("logit_bias") else None
        # In adaptive routers the mean of the experts' biases changes the number of columns that a token takes.
        adaptive = self.methods[0] in ("shifted", "by_logit", "above_level")
        if config.router.get("selection_bias", adaptive):
            self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_columns))
        if "above_level" in self.methods:
            self.level = nn.Parameter(torch.empty(self.num_columns))
        if "predicted" in self.methods:
            self.number = nn.Parameter(torch.empty(1, hidden_size))
        if "admitted" in self.methods:
            self.threshold = nn.Buffer(torch.zeros(self.num_experts))
            self.statistics = nn.Buffer(torch.zeros(2, self.num_experts))  # only training reads these
            if config.router["causal"] == "auxiliary":
                inner_size = max(1, hidden_size // 2)
                self.auxiliary_inner = nn.Parameter(torch.empty(inner_size, hidden_size))
                self.auxiliary_outer = nn.Parameter(torch.empty(self.num_experts, inner_size))

    def forward(self, x):
        """Takes [tokens, hidden_size]; returns columns and their weights [tokens, choices].

        A choice that the token does not take has the column `num_columns`, which no expert has.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, share, weigh = (getattr(self, name) for name in self.methods)
        logits = self.logits(x)
        # With a stable sort the first columns, which are the experts, win ties.
        chosen = first(logits).sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        shares = share(x, logits, chosen)
        taken = shares > 0
        counted = taken & ((chosen < self.num_experts) | (chosen >= self.num_experts + self.num_null))
        weights = self.scale * shares * weigh(logits, chosen, counted)
        return chosen.masked_fill(~taken, self.num_columns), weights.masked_fill(~counted, 0.0)

    def logits(self, x):
        rows, cosine = self.weight.to(x.dtype), "above_level" in self.methods
        if cosine:
            x, rows = F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1).to(x.dtype)
        parts = rows.split([rows for rows, _ in self.parts])
        products = [F.linear(x, each).expand(-1, part[1]) for each, part in zip(parts, self.parts, strict=True)]
        logits = torch.cat(products, dim=-1)
        if self.bias is not None:
            logits = logits + self.bias.to(x.dtype)
        if "by_logit" in self.methods:
            logits = logits + self.e_score_correction_bias.to(x.dtype)
        return logits / self.options["temperature"] if cosine else logits

    def shift(self):
        return self.e_score_correction_bias[: self.num_experts].mean()

    # These methods return the values [tokens, columns] by which columns are ordered, the largest first.

    def biased(self, logits):
        if not hasattr(self, "e_score_correction_bias"):
            return logits
        bias = self.e_score_correction_bias.to(logits.dtype)
        return torch.where(bias.any(), self.score(logits) + bias, logits)

    def limited(self, logits):
        """Keeps only the experts of the `topk_group` node groups with the largest sums of their two best scores."""
        ranking, kept, node_groups = self.score(logits), self.options["topk_group"], self.options["n_group"]
        if hasattr(self, "e_score_correction_bias"):
            ranking = ranking + self.e_score_correction_bias.to(logits.dtype)
        if kept == node_groups:
            return ranking
        experts, others = ranking.split([self.num_experts, self.num_columns - self.num_experts], dim=1)
        experts = experts.unflatten(1, (node_groups, -1))
        best = experts.sort(dim=-1, descending=True).values[..., :2].sum(-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, order, False)
        return torch.cat([experts.masked_fill(outside[..., None], float("-inf")).flatten(1), others], dim=1)

    def shifted(self, logits):
        """Adds to each score the deviation of the expert's bias from the mean bias."""
        experts, others = self.e_score_correction_bias.tensor_split([self.num_experts])
        return self.score(logits) + torch.cat([experts - self.shift(), others]).to(logits.dtype)

    def by_logit(self, logits):
        return logits

    def margins(self, logits):
        return self.score(logits) - self.level.to(logits.dtype).sigmoid()

    def above_level(self, logits):
        return self.margins(logits) + self.e_score_correction_bias.to(logits.dtype)

    # These methods return the share of each choice's weight that the token takes: 0 if it does not take the choice.

    def whole(self, x, logits, chosen):
        return torch.ones_like(chosen, dtype=logits.dtype)

    def until_p(self, x, logits, chosen):
        """A token takes its most probable columns until their probabilities add up to `p`."""
        probabilities = self.score(logits).gather(1, chosen)
        before = probabilities.cumsum(1) - probabilities
        bound = (self.options["p"] + self.shift().to(logits.dtype)).clamp(min=torch.finfo(logits.dtype).tiny)
        return (before < bound).to(logits.dtype)

    def positive(self, x, logits, chosen):
        return (logits.gather(1, chosen) > 0).to(logits.dtype)

    def admitted_by_level(self, x, logits, chosen):
        taken = self.above_level(logits).gather(1, chosen) > 0
        margins = self.margins(logits).gather(1, chosen)  # margins give the weights a gradient, as in training
        return torch.where(taken, 1.0 + (margins - margins.detach()), 0.0)

    def predicted(self, x, logits, chosen):
        """A linear head predicts the number of columns. The last column's share is the fractional part of the number."""
        number = self.top_k * (F.linear(x, self.number.to(x.dtype)) + self.shift().to(x.dtype)).sigmoid()
        return (number - torch.arange(self.top_k, device=x.device)).clamp(min=0.0, max=1.0)

    def admitted(self, x, logits, chosen):
        """An expert takes each token whose score exceeds its threshold. With an auxiliary router, which learned the
        experts' choices, it takes each token with a positive output of this router."""
        if hasattr(self, "auxiliary_inner"):
            margins = F.linear(F.silu(F.linear(x, self.auxiliary_inner.to(x.dtype))), self.auxiliary_outer.to(x.dtype))
        else:
            margins = self.score(logits) - self.threshold.to(x.dtype)
        return (margins > 0).to(x.dtype).gather(1, chosen)

    # The weights before scaling. `counted` is true for choices that the token takes, except null choices.

    def normalised(self, logits, chosen, counted):
        if self.normalise == "none":
            return self.score(logits).gather(1, chosen)
        if self.normalise == "true_all":
            null = slice(self.num_experts, self.num_experts + self.num_null)
            logits = logits.clone()
            logits[:, null] = float("-inf")
            return logits.softmax(-1).gather(1, chosen)
        logits = logits.gather(1, chosen)
        if self.normalise == "true_chosen":
            logits = logits.masked_fill(~counted, torch.finfo(logits.dtype).min)
        return logits.softmax(-1)

    def among_taken(self, logits, chosen, counted):
        weights = self.score(logits).gather(1, chosen).masked_fill(~counted, 0.0)
        return weights if self.normalise == "none" else weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def equal(self, logits, chosen, counted):
        return 1.0 / counted.sum(-1, keepdim=True).clamp(min=1)


class MoeDistExpertGroup(nn.Module):
    """The router and the experts of some modalities."""

    def __init__(self, config: MoeDistConfig, group: dict):
        super().__init__()
        self.num_identity, self.num_constant = group["num_identity"], group["num_constant"]
        self.router = MoeDistRouter(config, group)
        make_expert = EXPERTS[config.experts["kind"]]
        self.experts = nn.ModuleList(make_expert(config, group["ffn_dim"]) for _ in range(group["num_experts"]))
        if self.num_constant:
            self.constant_vectors = nn.Parameter(torch.empty(self.num_constant, config.hidden_size))
            self.constant_gates = nn.Parameter(torch.empty(self.num_constant, 2, config.hidden_size))

    def forward(self, x):
        """Takes and returns [tokens, hidden_size]."""
        columns, weights = self.router(x)
        output = torch.zeros_like(x, dtype=weights.dtype)
        for expert in columns[columns < len(self.experts)].unique().tolist():  # no other expert runs
            tokens, choices = torch.where(columns == expert)
            output.index_add_(0, tokens, self.experts[expert](x[tokens]) * weights[tokens, choices, None])
        first = len(self.experts) + self.router.num_null
        if self.num_identity:
            identity = (columns >= first) & (columns < first + self.num_identity)
            output += x * weights.masked_fill(~identity, 0.0).sum(-1, keepdim=True)
        for constant in range(self.num_constant):
            tokens, choices = torch.where(columns == first + self.num_identity + constant)
            inputs = x[tokens].to(weights.dtype)
            shares = F.linear(inputs, self.constant_gates[constant].to(weights.dtype)).softmax(-1)
            mixed = shares[:, :1] * inputs + shares[:, 1:] * self.constant_vectors[constant].to(weights.dtype)
            output.index_add_(0, tokens, mixed * weights[tokens, choices, None])
        return output.to(x.dtype)


class MoeDistSparseMoeBlock(nn.Module):
    def __init__(self, config: MoeDistConfig):
        super().__init__()
        self.groups = nn.ModuleList(MoeDistExpertGroup(config, group) for group in config.expert_groups)
        self.has_shared_expert, self.has_shared_gate = config.shared_expert_intermediate_size > 0, config.shared_expert_gate
        self.has_shortcut = config.moe_shortcut
        if self.has_shared_expert:
            self.shared_expert = Qwen2MoeMLP(config, config.shared_expert_intermediate_size)
        if self.has_shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states, group_ids):
        """Returns the output, and the tensor to add after the next layer (None without a shortcut).

        `group_ids` [batch, tokens]: index of each token's group; -1 for tokens that no expert computes.
        """
        x, output = hidden_states.flatten(0, 1), torch.zeros_like(hidden_states).flatten(0, 1)
        for index, group in enumerate(self.groups):
            (tokens,) = torch.where(group_ids.flatten() == index)
            output[tokens] = group(x[tokens])
        output, late = output.view_as(hidden_states), None
        if self.has_shortcut:
            output, late = torch.zeros_like(output), output
        if self.has_shared_expert:
            shared = self.shared_expert(hidden_states)
            gate = self.shared_expert_gate(hidden_states).sigmoid() if self.has_shared_gate else 1.0
            output = output + gate * shared
        return output, late


class MoeDistDepthRouter(nn.Module):
    """Decides for each token independently whether a mixture-of-depths layer computes it. Computes in fp32."""

    def __init__(self, config: MoeDistConfig):
        super().__init__()
        self.auxiliary = config.mixture_of_depths["causal"] == "auxiliary"
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))
        if self.auxiliary:
            inner_size = max(1, config.hidden_size // 2)
            self.inner = nn.Parameter(torch.empty(inner_size, config.hidden_size))
            self.outer = nn.Parameter(torch.empty(1, inner_size))
        else:
            self.threshold = nn.Buffer(torch.zeros(1))
            self.mean, self.steps = nn.Buffer(torch.zeros(1)), nn.Buffer(torch.zeros(1))  # only training reads these

    def forward(self, hidden_states):
        """Returns which tokens the layer computes, and the weight of the layer's output for each token."""
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = F.rms_norm(x, (x.shape[-1],), eps=1e-6)
        weight = (x * self.weight.to(x.dtype)).sum(-1).sigmoid()
        if self.auxiliary:
            inner = F.silu(F.linear(x, self.inner.to(x.dtype)))
            return F.linear(inner, self.outer.to(x.dtype)).squeeze(-1) > 0, weight
        return weight - self.threshold.to(x.dtype) > 0, weight


class MoeDistDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MoeDistConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTIONS[config.attention["kind"]](config, layer_idx)
        self.is_sparse, self.has_depths = layer_idx in config.moe_layers, layer_idx in config.depth_layers
        self.mlp = MoeDistSparseMoeBlock(config) if self.is_sparse else Qwen2MoeMLP(config, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.has_depths:
            self.depth_router = MoeDistDepthRouter(config)

    def forward(self, hidden_states, group_ids, late=None, **kwargs):
        """Adds `late`, the deferred output of the layer before. Returns the hidden states, and this layer's deferred
        output."""
        weight = 1.0
        if self.has_depths:
            kwargs["taken"], weight = self.depth_router(hidden_states)
            group_ids = group_ids.masked_fill(~kwargs["taken"], -1)
            weight = weight.masked_fill(~kwargs["taken"], 0.0)[..., None]
        added, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        normed = self.post_attention_layernorm(hidden_states + added)
        output, left = self.mlp(normed, group_ids) if self.is_sparse else (self.mlp(normed), None)
        hidden_states = hidden_states + (weight * (added + output)).to(added.dtype)
        return hidden_states if late is None else hidden_states + late, left


class MoeDistPreTrainedModel(PreTrainedModel):
    config: MoeDistConfig
    config_class = MoeDistConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeDistDecoderLayer"]
    _keep_in_fp32_modules_strict = ["router", "depth_router"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MoeDistDecoderLayer, "attentions": MoeDistAttention}

    @property
    def _supports_sdpa(self):  # pyright: ignore
        return self.config.attention["kind"] != "sinks"  # torch's kernel lacks attention sinks

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (MoeDistRouter, MoeDistExpertGroup, MoeDistDepthRouter)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)


class MoeDistModel(MoeDistPreTrainedModel):
    def __init__(self, config: MoeDistConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoeDistDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MoeDistRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    def group_ids(self, input_ids, inputs_embeds, attention_mask):
        """Returns the index of each token's group [batch, tokens]; -1 for padding, which no expert computes."""
        groups = self.config.expert_groups
        if len(groups) == 1:
            groups_of_tokens = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        elif input_ids is None:
            raise ValueError("A model with several groups of experts needs input_ids: a token's group follows from its id")
        else:
            groups_of_tokens = torch.full_like(input_ids, -1)
            for index, group in enumerate(groups):
                for first, end in group["token_ids"]:
                    groups_of_tokens.masked_fill_((input_ids >= first) & (input_ids < end), index)
        if attention_mask is not None and attention_mask.dim() == 2:
            groups_of_tokens.masked_fill_(attention_mask[:, -groups_of_tokens.shape[1] :] == 0, -1)
        return groups_of_tokens

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        cache = kwargs.pop("past_key_values", cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]

        # `generate` with a cache of fixed size makes the masks of all kinds of layers itself.
        masks = attention_mask if isinstance(attention_mask, dict) else None
        group_ids = self.group_ids(input_ids, inputs_embeds, None if masks else attention_mask)
        if masks is None:
            given = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, CACHE: cache}
            makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
            masks = {kind: makers[kind](**given, position_ids=position_ids) for kind in set(self.config.layer_types)}
        hidden_states, rotary = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        kwargs |= {"position_embeddings": rotary, "cache": cache}
        late = None
        for kind, layer in zip(self.config.layer_types, self.layers, strict=True):
            hidden_states, late = layer(hidden_states, group_ids, late, attention_mask=masks[kind], **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})  # pyright: ignore


class MoeDistForCausalLM(MoeDistPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoeDistConfig):
        super().__init__(config)
        self.model = MoeDistModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = LlamaForCausalLM.forward  # the loss, with `labels`, is the cross entropy without a balance loss


__all__ = ["MoeDistForCausalLM", "MoeDistModel", "MoeDistPreTrainedModel"]
