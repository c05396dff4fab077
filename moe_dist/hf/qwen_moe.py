"""Qwen2-MoE (its shared expert has a gate) and Qwen3-MoE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.hf.family import NORM, ModelFamily, SharedExpert, SoftmaxRouter
from moe_dist.hf.fields import Fields


@dataclass(frozen=True)
class _Layers:
    """Every n-th layer has experts, except those that a list names."""

    names: Sequence[str] = ("mlp_only_layers", "decoder_sparse_step")

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        step, only = read.whole("decoder_sparse_step", 1), read.many("mlp_only_layers", [], null=[])
        return [layer for layer in range(num_layers) if layer not in only and (layer + 1) % step == 0]

    def write(self, section: ModelSection) -> dict[str, Any]:
        dense = [layer for layer in range(section.num_layers) if layer not in section.moe_layers]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def fit(self, section: ModelSection) -> bool:
        return True


QWEN3 = ModelFamily(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    SoftmaxRouter(NORM),
    ("num_experts", "num_local_experts"),
    "moe_intermediate_size",
    qk_norm={"head": {}},
    biases={"none": {"attention_bias": False}, "qkvo": {"attention_bias": True}},
    layers=_Layers(),
    kv_heads=4,
    windows="flag",
)
QWEN2 = ModelFamily(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    SoftmaxRouter(NORM),
    ("num_experts",),
    "moe_intermediate_size",
    biases={"qkv": {"qkv_bias": True}, "none": {"qkv_bias": False}},
    layers=_Layers(),
    shared=SharedExpert("shared_expert_intermediate_size", "mlp.shared_expert", gated=True),
    kv_heads=16,
    windows="layers",
)
