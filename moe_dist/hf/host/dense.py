"""Makes a mixture of experts of a dense transformers model. Each FFN of its language model, y = down(act(gate x) * up x),
becomes a block with a router for each group of experts.

    model.moe.experts.kind=ffn           each expert begins as a copy of the FFN (MoMa, arXiv 2407.21770)
    model.moe.experts.kind=sharded_lora  each expert is a LoRA adapter on the frozen FFN (LLaVA-MoLE, arXiv 2401.16160)

Shape letters: T tokens, E experts of a group, K choices of a token, D hidden size, F width of the FFN, r rank, Q (token,
expert) pairs on this rank, R rows on this rank, I inputs and O outputs of a projection.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_dist.config.model_schema import ModelSection, MoESection
from moe_dist.hf.host.banks import GROUP, PROJECTIONS, Bank, dense_ffns
from moe_dist.hf.host.family import empty_model
from moe_dist.hf.host.model import FamilyExperts
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.experts.lora import expert_weights
from moe_dist.moe.kernels.torch_kernels import gather_rows, weighted_row_sum
from moe_dist.placement.parameter_names import Role


class Gate(nn.Linear):
    """A group's router [E, D]: a softmax over its experts. The weights of the chosen experts add up to 1, so that copies of
    one FFN compute the FFN. A single choice has weight p / detach(p): its value is 1, its gradient that of log p.

    Args:
        plain: Whether weights are the probabilities themselves.
    """

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, *, plain: bool) -> None:
        super().__init__(hidden_dim, num_experts, bias=False)
        self.top_k, self.plain = top_k, plain

    def forward(self, h_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns logits [T, E], and weights and ids of the chosen experts [T, K]."""
        logits_TE = F.linear(h_TD, self.weight)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        if not self.plain:
            total_T1 = weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK / (total_T1.detach() if self.top_k == 1 else total_T1)
        return logits_TE, weights_TK, ids_TK


class CopiedFFNs(MixtralExperts):
    """Experts that begin as copies of one FFN: `gate_up_proj` [E, 2 F, D] and `down_proj` [E, D, F]."""

    runs = FamilyExperts

    def __init__(self, ffn: Any, num_experts: int, std: float) -> None:
        width, hidden_dim = ffn.gate_proj.weight.shape
        config = MixtralConfig(hidden_size=hidden_dim, intermediate_size=width, num_local_experts=num_experts)
        config._experts_implementation = "grouped_mm"  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(config)
        self.act_fn, self._std = ffn.act_fn, std

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module._parameters.values():
            nn.init.normal_(parameter, std=self._std)  # pyright: ignore[reportArgumentType]


class _AdaptedRows(FamilyExperts):
    """Computes rows by the frozen FFN with each pair's adapter. The weight of a pair multiplies the adapter's output."""

    def compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        (experts,) = self._experts
        weight_Q = expert_weights(rows.weight_Q, experts.section.weight) * (experts.section.alpha / experts.section.rank)

        def projected(name: str, x_QI: Tensor) -> Tensor:
            y_QO = getattr(experts.ffn[0], name)(x_QI)
            if f"{name}_lora_A" not in experts._parameters:
                return y_QO
            stacks = [getattr(experts, f"{name}_lora_{matrix}").unbind() for matrix in "AB"]
            parts = zip(x_QI.split(layout.slot_counts), weight_Q.split(layout.slot_counts), *stacks, strict=True)
            deltas = [F.linear(F.linear(x, a) * weight[:, None].to(x.dtype), b) for x, weight, a, b in parts]
            return y_QO + torch.cat(deltas) if deltas else y_QO

        x_QD = gather_rows(rows.rows_RD, layout.row_of_pair_Q)
        y_QD = projected("down_proj", experts.ffn[0].act_fn(projected("gate_proj", x_QD)) * projected("up_proj", x_QD))
        ones_Q = torch.ones_like(weight_Q)
        return weighted_row_sum(y_QD, ones_Q, layout.row_of_pair_Q, rows.rows_RD.shape[0]).to(rows.rows_RD.dtype)


class AdapterStack(nn.Module):
    """Adapters on the frozen FFN of the block: `<projection>_lora_A` [E, r, I] and `<projection>_lora_B` [E, O, r]."""

    runs, is_transposed, _is_expert_parallel = _AdaptedRows, False, False

    def __init__(self, ffn: Any, num_experts: int, section: Any) -> None:
        super().__init__()
        self.ffn, self.section, self.num_experts = (ffn,), section, num_experts  # in a tuple, so that it is no child
        for target in section.targets:
            out, into = getattr(ffn, f"{target}_proj").weight.shape
            for matrix, shape in (("A", (section.rank, into)), ("B", (out, section.rank))):
                name = f"{target}_proj_lora_{matrix}"
                self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
        self.roles = dict.fromkeys(self._parameters, Role.EXPERT_ADAPTER)

    def _init_weights(self, module: nn.Module) -> None:
        """A has the variance 1 / (3 I), as in PEFT, and B is 0."""
        for name, parameter in module._parameters.items():
            assert parameter is not None
            nn.init.normal_(parameter, std=(3 * parameter.shape[-1]) ** -0.5 if name.endswith("A") else 0.0)


def hosted_family(model: ModelSection) -> Any:
    """Returns `empty_model` of the section's family. A dense family gets the experts of `model.moe`."""
    assert model.family is not None, "the engine's section completes the model's"
    family = empty_model(model.family, model.fields)
    if dense_ffns(family):
        add_experts(family, model.moe)
    return family


def add_experts(model: Any, moe: MoESection) -> None:
    """Turns the FFNs of `moe.layers` into blocks of experts, uninitialised, which `dense_banks` finds."""
    ffns, std = dense_ffns(model), getattr(model.config.get_text_config(), "initializer_range", 0.02)
    lora, banks = moe.experts.over_frozen_ffn, list[Bank]()
    for layer in moe.layers or ():
        block: Any = model.get_submodule(ffns[layer])
        first = 0
        for name, group in moe.groups.items():
            holder = nn.Module()
            holder.gate = Gate(block.gate_proj.in_features, group.num_experts, group.top_k, plain=lora)
            make: Any = partial(AdapterStack, section=moe.experts) if lora else partial(CopiedFFNs, std=std)
            holder.experts = make(block, group.num_experts)
            block.add_module(name, holder)
            path, ids = f"{ffns[layer]}.{name}", range(first, first + group.num_experts)
            banks.append(Bank(layer, f"{path}.{GROUP}", f"{path}.gate", name, ffns[layer], ids))
            first = ids.stop
        if not lora:
            for each in PROJECTIONS:
                delattr(block, each)
        block.gives_logits = False
    model.moe_dist_banks = banks
    _CHANGES.get(model.config.model_type, lambda _: None)(model)


def _chameleon(model: Any) -> None:
    """The family forbids picture tokens in its output, and has an encoder of pictures, which training does not need."""
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    model.model.vqmodel.requires_grad_(False)


def _llava(model: Any) -> None:
    """The encoder stays frozen, as in LLaVA. Its last layer has no effect and would have no gradient."""
    model.model.vision_tower.requires_grad_(False)


_CHANGES: Mapping[str, Callable[[Any], None]] = {"chameleon": _chameleon, "llava": _llava}
