"""Ernie 4.5 without vision: a softmax with a selection bias, shared experts, dense layers before the first experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.hf.family import ModelFamily, SharedExpert, SoftmaxRouter
from moe_dist.hf.fields import Fields
from moe_dist.hf.head_fields import GroupedHeads


@dataclass(frozen=True)
class _Layers:
    """Every n-th layer of the model has experts, if it lies between a first and a last layer."""

    names: Sequence[str] = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        first, step = read.count("moe_layer_start_index", 1), read.whole("moe_layer_interval", 1)
        last = read.count("moe_layer_end_index", -1, least=-1)
        last = num_layers - 1 if last == -1 else last
        return [layer for layer in range(num_layers) if first <= layer <= last and (layer + 1) % step == 0]

    def write(self, section: ModelSection) -> dict[str, Any]:
        layers = section.moe_layers
        values = (layers[0], layers[-1], section.moe.every if len(layers) > 1 else 1)
        return dict(zip(self.names, values, strict=True))

    def fit(self, section: ModelSection) -> bool:
        return len(section.moe_layers) == 1 or (section.moe.first + 1) % section.moe.every == 0


FAMILY = ModelFamily(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    SoftmaxRouter({"true_chosen": {}}, selection_bias=True),
    ("moe_num_experts", "num_experts"),
    "moe_intermediate_size",
    top_k=("moe_k", "num_experts_per_tok"),
    layers=_Layers(),
    shared=SharedExpert("moe_num_shared_experts", "mlp.shared_experts", counted=True, least=0),
    heads=GroupedHeads(kv_heads=4),
    rope_base=5e5,
    rope_pairs={"adjacent": {}},
    tied=True,
    must_be={
        "use_bias": ((False, None), "projections have no biases"),
        "moe_norm_min": ((1e-12,), "weights are divided by the sum of the chosen probabilities"),
    },
    selection_bias=("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
    selection_bias_dims=2,
    multi_token=lambda read, names: ["model.mtp_"],
)
