"""Layers of other projects that `gpu-check` times, held to this project's layer."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.gpu_check.kernels import difference
from tools.gpu_check.layers import make_layer, passes, single_group
from tools.gpu_check.rivals import PACKAGED, OtherExperts

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 12, 16, 24, 4, 2


class GLUMLP(nn.Module):
    """Stands in for ScatterMoE's: up rows before gate rows, and the largest number of choices at its making."""

    def __init__(self, input_size: int, hidden_size: int, num_experts: int, top_k: int, activation: nn.Module) -> None:
        super().__init__()
        self.experts, self.output_experts = nn.Module(), nn.Module()
        self.experts.weight = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, input_size))
        self.output_experts.weight = nn.Parameter(torch.empty(num_experts, input_size, hidden_size))
        self.top_k, self.activation = top_k, activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        assert expert_idxs.shape == (len(x), self.top_k)
        first: Any = self.experts.weight
        second: Any = self.output_experts.weight
        rows = []
        for token, weights, chosen in zip(x, expert_p, expert_idxs, strict=True):
            up, gate = torch.stack([F.linear(token, first[expert]) for expert in chosen]).chunk(2, dim=-1)
            hidden = self.activation(gate) * up
            rows.append(sum(w * F.linear(h, second[expert]) for w, h, expert in zip(weights, hidden, chosen, strict=True)))
        return torch.stack(rows)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_layer_of_a_package_has_the_same_output_and_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("scattermoe"), ModuleType("scattermoe.mlp")
    vars(module)["GLUMLP"] = GLUMLP
    for each in (package, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    dtype = torch.bfloat16  # Hugging Face's grouped product has no other one
    ours, like = (make_layer(HIDDEN, single_group(EXPERTS, 0, TOP_K, FFN)) for _ in range(2))
    theirs = OtherExperts(like.to(dtype), PACKAGED[name])
    x_TD = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    group_T = torch.zeros(TOKENS, dtype=torch.int64)
    found, expected = (passes(layer, x_TD, group_T) for layer in (theirs, ours.to(dtype)))
    assert max(map(difference, found[:2], expected[:2])) < 0.01
