"""GLM-4.5: sigmoid scores with a selection bias and group limits, a shared expert, dense first layers, and rotary
positions that turn part of each head."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.group_limited import GroupLimitedRouterSection
from moe_dist.hf.family import NORM, ModelFamily, SharedExpert
from moe_dist.hf.fields import Fields, setting
from moe_dist.hf.head_fields import GroupedHeads


@dataclass(frozen=True)
class SigmoidRouter:
    """Chooses the top k of sigmoids plus bias, inside the best groups of experts (`router.kind=group_limited`). The
    attributes are defaults of fields."""

    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0

    def read(self, read: Fields) -> dict[str, Any]:
        return {
            "kind": "group_limited",
            "n_group": read.whole("n_group", self.n_group),
            "topk_group": read.whole("topk_group", self.topk_group),
            "normalise": read.choice({each: NORM[each] for each in ("true_chosen", "none")}),
            "scale": read.positive("routed_scaling_factor", self.scale),
            "selection_bias": True,
        }

    def write(self, router: RouterSection) -> dict[str, Any]:
        assert isinstance(router, GroupLimitedRouterSection)
        groups = {"n_group": router.n_group, "topk_group": router.topk_group}
        return {**groups, "routed_scaling_factor": router.scale, **NORM[router.normalise]}

    def held(self, router: RouterSection, num_experts: int) -> Mapping[str, bool]:
        if not isinstance(router, GroupLimitedRouterSection):
            return {setting("router.kind", router.kind): False}
        return {setting("router.selection_bias", router.selection_bias): router.selection_bias}


@dataclass(frozen=True)
class DenseFirst:
    """The first layers are dense, all others have experts."""

    first: int = 1  # default of the field with the number of dense layers
    names: Sequence[str] = ("first_k_dense_replace",)

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        return list(range(read.count(self.names[0], self.first), num_layers))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {self.names[0]: section.moe_layers[0]}

    def fit(self, section: ModelSection) -> bool:
        return section.moe_layers == tuple(range(section.moe_layers[0], section.num_layers))


def _multi_token(read: Fields, names: Collection[str]) -> list[str]:
    """Returns the names of layers beyond the model's last layer that have the projection of two joined hidden states."""
    layers, extra = read.whole("num_hidden_layers"), read.count("num_nextn_predict_layers", read.count("num_mtp_layers", 1))
    behind = [f"model.layers.{layer}." for layer in range(layers, layers + extra)]
    return [prefix for prefix in behind if f"{prefix}eh_proj.weight" in names]


FAMILY = ModelFamily(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    SigmoidRouter(),
    ("n_routed_experts", "num_local_experts"),
    "moe_intermediate_size",
    qk_norm={"none": {"use_qk_norm": False}, "head": {"use_qk_norm": True}},
    biases={"none": {"attention_bias": False}, "qkv": {"attention_bias": True}},
    layers=DenseFirst(),
    shared=SharedExpert("n_shared_experts", "mlp.shared_experts", counted=True),
    heads=GroupedHeads(kv_heads=8, rope_share=0.5),
    selection_bias=("mlp.gate.e_score_correction_bias",),
    multi_token=_multi_token,
)
