"""The CUDA stand-in: it replaces what it lists, and puts all of it back."""

from typing import Any

import pytest
import torch

from moe_dist.megatron.cpu_trial import CPU, cuda_replacements, megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from tests.support.worlds import RankContext


def test_replaces_what_it_lists_and_puts_all_of_it_back() -> None:
    before = {each.where: each.owner.__dict__.get(each.name) for each in cuda_replacements()}
    with megatron_on_cpu() as replaced:
        names = [each.where for each in replaced]
        assert all(getattr(each.owner, each.name) is each.value for each in replaced)
        assert torch.zeros(2, device="cuda").device == CPU
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("torch")] == list(before)
    after = {each.where: each.owner.__dict__.get(each.name) for each in cuda_replacements()}
    assert after == before
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_puts_all_back_after_an_error() -> None:
    before = torch.Tensor.type
    with pytest.raises(KeyError), megatron_on_cpu():
        raise KeyError
    assert torch.Tensor.type is before


def stock_layer(rank: RankContext, ep: int) -> list[float]:
    """Megatron's own MoE layer: a forward and a backward on this rank's tokens."""
    with megatron_on_cpu(), model_parallel(ep=ep):
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1,
            hidden_size=16,
            num_attention_heads=2,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_ffn_hidden_size=8,
            moe_token_dispatcher_type="alltoall",
            moe_aux_loss_coeff=0.0,
            moe_router_load_balancing_type="none",
            expert_model_parallel_size=ep,
            use_cpu_initialization=True,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
        )
        spec: Any = get_moe_module_spec(use_te=False, num_experts=4, moe_grouped_gemm=False)
        torch.manual_seed(1)
        layer = spec(config) if callable(spec) else spec.module(config, submodules=spec.submodules)
        layer.set_layer_number(1)
        x = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(rank.rank), requires_grad=True)
        y, _ = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        return [float(y.detach().norm()), float(x.grad.norm()), float(layer.router.weight.grad.norm())]


@pytest.mark.full
def test_megatrons_own_layer_runs_on_gloo(run_in_world: Any) -> None:
    for norms in run_in_world(2, stock_layer, 2):
        assert all(norm > 0.0 for norm in norms)
