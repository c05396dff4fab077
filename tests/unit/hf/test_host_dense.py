"""Experts of dense transformers models: adapters against a slow reference, and messages for wrong sections."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.hf.host.dense import AdapterStack, _AdaptedRows
from moe_dist.hf.host.family import complete
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.plan.preflight import layout_of_file
from tests.support.dense import FIELDS
from tests.support.messages import refused

HIDDEN, WIDTH, RANK = 8, 12, 2


class FFN(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(WIDTH, HIDDEN, bias=False), F.silu


@pytest.mark.parametrize("weight", ["probability", "straight_through", "published"])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("down",)])
def test_adapters_equal_a_reference_by_token(weight: str, counts: tuple[int, ...], targets: tuple[str, ...]) -> None:
    """Outputs and gradients of input, weights and adapters, also for experts without tokens and ranks without rows."""
    torch.manual_seed(0)
    ffn, section = FFN().double(), SimpleNamespace(rank=RANK, alpha=6.0, weight=weight, targets=targets)
    stack = AdapterStack(ffn, len(counts), section).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    rows = sum(counts)
    args: Any = SimpleNamespace(compute_dtype=torch.float64)
    experts = _AdaptedRows(stack, range(len(counts)), args)
    x_RD = torch.randn(rows, HIDDEN, dtype=torch.float64, requires_grad=True)
    p_Q = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    given = [x_RD, p_Q, *stack.parameters()]
    order_Q = torch.randperm(rows)
    layout: Any = SimpleNamespace(row_of_pair_Q=order_Q, slot_counts=counts)
    found_RD = experts.compute(DispatchedRows(x_RD, p_Q), layout)

    def reference(x_D: Tensor, expert: int, p: Tensor) -> Tensor:
        scale = {"probability": p, "straight_through": p / p.detach(), "published": torch.ones_like(p)}[weight]

        def projected(name: str, x: Tensor) -> Tensor:
            y = ffn.get_submodule(f"{name}_proj")(x)
            if name not in targets:
                return y
            a, b = (stack.get_parameter(f"{name}_proj_lora_{matrix}")[expert] for matrix in "AB")
            return y + scale * (6.0 / RANK) * (b @ (a @ x))

        return projected("down", F.silu(projected("gate", x_D)) * projected("up", x_D))

    expert_Q = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected_RD = 0.0 * x_RD
    for pair, expert in enumerate(expert_Q):
        row = int(order_Q[pair])
        expected_RD = expected_RD.index_add(0, order_Q[[pair]], reference(x_RD[row], expert, p_Q[pair])[None])
    torch.testing.assert_close(found_RD, expected_RD)
    out_RD = torch.randn_like(found_RD)
    grads = [torch.autograd.grad(each, given, out_RD, allow_unused=True) for each in (found_RD, expected_RD)]
    for found, expected, value in zip(*grads, given, strict=True):
        zero = torch.zeros_like(value)
        torch.testing.assert_close(zero if found is None else found, zero if expected is None else expected)


def test_a_dense_family_needs_groups() -> None:
    model: dict[str, Any] = {"family": "llama", "fields": FIELDS["llama"]}
    with refused(ConfigError, "model.moe.groups", "llama has no experts", "num_experts"):
        complete(model)
    groups = {"text": {"num_experts": 2}, "image": {"num_experts": 2, "top_k": 2}}
    with refused(ConfigError, "top_k is 1 and 2", "the same top_k"):
        complete({**model, "moe": {"groups": groups}})
    with refused(ConfigError, "model.moe.groups.image.num_null", "a single group"):
        complete({**model, "moe": {"groups": {"text": {"num_experts": 2}, "image": {"num_experts": 2, "num_null": 2}}}})
    with refused(ConfigError, "llama has no layer 7", "2 layers"):
        complete({**model, "moe": {"layers": [0, 7], "groups": {"text": {"num_experts": 2}}}})
    found = complete({**model, "moe": {"layers": [1], "groups": {"text": {"num_experts": 2}}}})
    assert found["moe"] == {"layers": [1], "groups": {"text": {"top_k": 1, "num_experts": 2, "ffn_dim": 16}}}


def test_wrong_settings_of_lora_experts_are_named() -> None:
    with refused(ConfigError, "model.moe.experts.kind=sharded_lora", "top_k=2", "model.folder"):
        layout_of_file(
            "mole_llava_7b_8gpu_transformers", ["model.folder=null", "model.moe.groups.ffn.top_k=2", "model.lora=null"]
        )
