"""The slow reference of `moe_dist.moe.experts.lora` computes LoRA experts in a loop over tokens and experts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.experts.lora import LoRALayer, Weight
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup


def reference_lora_layer(
    layer: LoRALayer,
    x_TD: Tensor,
    group_T: Tensor,
    groups: Sequence[ExpertGroup],
    *,
    rank: int,
    alpha: float,
    weight: Weight,
) -> Tensor:
    """Computes the output of a layer without dropout for x [T, D], one token at a time. Padding (group -1) passes only
    the frozen FFN."""
    rows = []
    for x, index in zip(layer.norm(x_TD), group_T.tolist(), strict=True):
        taken = [] if index < 0 else _taken(layer, x, groups[index], weight)
        group = groups[max(index, 0)]

        def projected(target: str, value: Tensor, group: ExpertGroup = group, taken: list = taken) -> Tensor:
            y = layer.ffn.get_submodule(target).weight @ value  # pyright: ignore[reportOperatorIssue]
            stack = layer.adapters.get_submodule(group_module(group.name))
            for expert, w in taken:
                if hasattr(stack, f"{target}_a"):
                    a, b = (stack.get_parameter(f"{target}_{matrix}")[expert] for matrix in "ab")
                    y = y + w * (alpha / rank) * (b @ (a @ value))
            return y

        rows.append(projected("down", F.silu(projected("gate", x)) * projected("up", x)))
    return torch.stack(rows)


def _taken(layer: LoRALayer, x: Tensor, group: ExpertGroup, weight: Weight) -> list[tuple[int, Tensor]]:
    """Returns the true experts among the best k columns of the token's softmax, with their weights."""
    gate = dict(layer.router.get_submodule(group_module(group.name)).named_parameters())
    logits = torch.cat([gate[kind] @ x for kind in ("true", "null") if kind in gate])
    p = logits.softmax(0)
    best = logits.argsort(descending=True, stable=True)[: group.top_k].tolist()
    weights = {"probability": p, "straight_through": p / p.detach(), "published": torch.ones_like(p)}[weight]
    return [(column, weights[column]) for column in best if column < group.num_experts]
