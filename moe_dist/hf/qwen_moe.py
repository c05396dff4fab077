"""Qwen2-MoE, whose shared expert has a gate; Qwen3-MoE; and Qwen3-MoE++, which also has zero-computation experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moe_dist.config.model_schema import GroupSection, ModelSection
from moe_dist.errors import ConfigError
from moe_dist.hf.family import NORM, ModelFamily, SharedExpert, SoftmaxRouter
from moe_dist.hf.fields import Fields
from moe_dist.hf.head_fields import GroupedHeads


@dataclass(frozen=True)
class _Layers:
    """Every n-th layer has experts, except the layers in the list `mlp_only_layers`."""

    names: Sequence[str] = ("mlp_only_layers", "decoder_sparse_step")

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        step, only = read.whole("decoder_sparse_step", 1), read.many("mlp_only_layers", [], null=[])
        return [layer for layer in range(num_layers) if layer not in only and (layer + 1) % step == 0]

    def write(self, section: ModelSection) -> dict[str, Any]:
        dense = [layer for layer in range(section.num_layers) if layer not in section.moe_layers]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def fit(self, section: ModelSection) -> bool:
        return True


class _ZeroComputation:
    """The fields of Qwen3-MoE++ (ZEDA, arXiv 2605.18643)."""

    kinds: ClassVar = {
        "num_null": "zero",
        "num_identity": "copy",
        "num_constant": "constant",
    }  # in the order of the columns of moe_dist's routers

    def read(self, read: Fields) -> dict[str, int]:
        kinds, counts = read.many("zce_types"), read.many("zce_nums")
        ordered = [kind for kind in self.kinds.values() if kind in kinds]
        if kinds != ordered or len(kinds) != len(counts) or not all(type(count) is int and count > 0 for count in counts):
            raise ConfigError(
                f"config.json: zce_types={kinds!r:.80}, zce_nums={counts!r:.80}: supported is each type at most once, in "
                f"the order {', '.join(self.kinds.values())}, with a number above 0"
            )
        if read.flag("use_zce_mask", True):
            raise ConfigError(
                "config.json: use_zce_mask is true or absent: such a model never chooses its zero-computation experts; set "
                "it to false, or take these experts' rows away and set model_type to qwen3_moe"
            )
        return {name: counts[kinds.index(kind)] for name, kind in self.kinds.items() if kind in kinds}

    def write(self, group: GroupSection) -> dict[str, Any]:
        counts = {kind: count for name, kind in self.kinds.items() if (count := getattr(group, name))}
        return {"zce_types": list(counts), "zce_nums": list(counts.values()), "use_zce_mask": False}

    def fits(self, group: GroupSection) -> bool:
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
    heads=GroupedHeads(kv_heads=4),
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
    heads=GroupedHeads(kv_heads=16),
    windows="layers",
)
PLUS_PLUS = replace(
    QWEN3,
    name="qwen3_moe_plus_plus",
    architecture="Qwen3MoePlusPlusForCausalLM",
    router=SoftmaxRouter({"none": {"norm_topk_prob": False}, "all_chosen": {"norm_topk_prob": True}}),
    zero_computation=_ZeroComputation(),
    layout="zero_computation",
)
