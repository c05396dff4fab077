"""Computes Qwen3-MoE++'s block from its formula, one token at a time (ZEDA, arXiv 2605.18643; MoE++, arXiv 2410.07348).

p = softmax(W x) over all columns: FFN experts, then null, copy and constant experts
y = sum over the k largest p_i of w_i E_i(x),  w_i = p_i, or p_i divided by the sum of the k
null E(x) = 0;  copy E(x) = x;  constant E(x) = a1 x + a2 v with [a1, a2] = softmax(U x)
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlusPlusBlock(nn.Module):
    """Replaces a block of transformers' Qwen3-MoE. `tensors` maps names without the layer's prefix to the layer's
    tensors."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config, self.tensors = config, tensors
        self.kinds = ["ffn"] * config["num_experts"]
        for kind, count in zip(config["zce_types"], config["zce_nums"], strict=True):
            self.kinds += [kind] * count

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([self._token(x) for x in hidden.flatten(0, -2)]).view_as(hidden)

    def _token(self, x: Tensor) -> Tensor:
        p = (self.tensors["gate.weight"] @ x).softmax(-1)
        chosen = p.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
        total = sum(p[i] for i in chosen) if self.config["norm_topk_prob"] else 1.0
        y = torch.zeros_like(x)
        for i in chosen:
            y = y + p[i] / total * self._expert(i, x)
        return y

    def _expert(self, i: int, x: Tensor) -> Tensor:
        if self.kinds[i] == "zero":
            return torch.zeros_like(x)
        if self.kinds[i] == "copy":
            return x
        if self.kinds[i] == "constant":
            a = (self.tensors[f"experts.{i}.wg.weight"] @ x).softmax(-1)
            return a[0] * x + a[1] * self.tensors[f"experts.{i}.constant"]
        gate, up, down = (self.tensors[f"experts.{i}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))
