"""LongCat-Flash: each layer has two attentions, two FFNs, and experts, some of which are identity experts.

    a = x + attention_0(norm(x)),  h = norm(a),  b = a + ffn_0(h)
    c = b + attention_1(norm(b)),  y = c + ffn_1(norm(c)) + experts(h)

A layer of LongCat-Flash becomes two layers of moe_dist: the first has the experts with a shortcut, and ffn_0 as shared
expert; the second is dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import GroupSection, ModelSection
from moe_dist.hf.family import ModelFamily, SharedExpert, SoftmaxRouter
from moe_dist.hf.fields import Fields
from moe_dist.hf.head_fields import LatentHeads

# Second names of fields. If config.json has both names of a field, transformers may use either value; the two values must
# therefore be equal.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts_per_tok": "moe_topk",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}


@dataclass(frozen=True)
class _Layers:
    """The first of every two layers of moe_dist has experts."""

    names: Sequence[str] = ("num_layers",)

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        read.must_be("num_hidden_layers", (num_layers,), "it must be 2 num_layers")
        for alias, name in _ALIASES.items():
            read.must_be(alias, (read.whole(name),), f"it must be {name}")
        return list(range(0, num_layers, 2))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {"num_layers": section.num_layers // 2}

    def fit(self, section: ModelSection) -> bool:
        alternate = section.moe_layers == tuple(range(0, section.num_layers, 2)) and section.num_layers % 2 == 0
        return alternate and section.moe.shared_ffn_dim == section.dense_ffn_dim


class _IdentityExperts:
    """The field with the number of identity experts."""

    def read(self, read: Fields) -> dict[str, int]:
        return {"num_identity": read.count("zero_expert_num", 256)}

    def write(self, group: GroupSection) -> dict[str, Any]:
        return {"zero_expert_num": group.num_identity}

    def fits(self, group: GroupSection) -> bool:
        return group.num_constant == 0


FAMILY = ModelFamily(
    "longcat_flash",
    "LongcatFlashForCausalLM",
    SoftmaxRouter({"none": {}}, selection_bias=True, scale=6.0),
    ("n_routed_experts",),
    "expert_ffn_hidden_size",
    top_k=("moe_topk",),
    num_layers="num_layers",
    layers_each=2,
    layers=_Layers(),
    shortcut=True,
    shared=SharedExpert("ffn_hidden_size", "mlps.0"),
    dense_ffn="ffn_hidden_size",
    dense_module="mlps.1",
    zero_computation=_IdentityExperts(),
    layout="identity",
    heads=LatentHeads(kv_heads=None, head_dim=64, plain_queries=False, scaled=True),
    rope_base=1e7,
    rope_pairs={"adjacent": {}},
    must_be={
        "attention_bias": ((False,), "the projections of latent attention have no biases"),
        "router_bias": ((False,), "logits have no bias"),
        "zero_expert_type": (("identity",), "zero experts are the identity"),
        "mla_scale_q_lora": ((True,), "latents are scaled"),
        "mla_scale_kv_lora": ((True,), "latents are scaled"),
    },
    gates=("mlp.router.classifier.weight",),
    selection_bias=("mlp.router.e_score_correction_bias",),
    multi_token=lambda read, names: ["model.mtp"],
)
