"""An incompatible Megatron configuration is refused, with all reasons and fixes."""

from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.megatron.cpu_trial import megatron_on_cpu
from tests.support.megatron_model import Layout, transformer_config

pytestmark = pytest.mark.megatron


def check(layout: Layout, **changes: Any) -> None:
    """Changes the finished configuration, because Megatron would refuse some changes while it builds the configuration."""
    with megatron_on_cpu():
        from moe_dist.megatron.requirements import check

        config = SimpleNamespace(**vars(transformer_config(layout)))
        vars(config).update(changes)
        check(config, layout.settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"expert_tensor_parallel_size": 2},
            "expert_tensor_parallel_size=2: experts cannot be split over ranks; set it to 1",
        ),
        ({"tensor_model_parallel_size": 2}, "sequence_parallel=False with tensor_model_parallel_size=2"),
        ({"num_moe_experts": 13}, "num_moe_experts=13: the groups of the expert settings have 8 true experts"),
        ({"gated_linear_unit": False}, "experts are SwiGLU"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "moe_router_load_balancing_type=seq_aux_loss"),
        ({"moe_aux_loss_coeff": [0.1, 0.1]}, "there is one load-balance loss"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function=sigmoid: must be softmax"),
        ({"moe_router_pre_softmax": True}, "set router.normalise to none"),
        ({"moe_expert_capacity_factor": 1.0}, "no token is dropped"),
        ({"moe_router_enable_expert_bias": True}, "balance by moe_aux_loss_coeff"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl=local: must be none"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm=True: must be False"),
        ({"mlp_chunks_for_training": 2}, "Megatron drops the mask"),
        ({"fp8": "hybrid"}, "fp8=hybrid: must be None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Layout(), **change)
    assert said in str(caught.value)
    assert "docs/megatron.md" in str(caught.value)


def test_says_everything_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check(Layout(), expert_tensor_parallel_size=2, num_moe_experts=1, fp8="hybrid")
    assert len(caught.value.problems) == 3
