"""The table of supported Hugging Face model families.

A model of a supported family computes the same function in moe_dist. An import refuses a config.json with a feature that
moe_dist lacks. A dense model is imported with one expert per layer, whose routing weight is always 1.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from moe_dist.hf.family import (
    SILENT,
    Alternate,
    Between,
    DenseFirst,
    GroupedHeads,
    LatentHeads,
    Listed,
    ModelFamily,
    SharedExpert,
    ZeroComputation,
)
from moe_dist.hf.fields import Choices, Fields, Part, Value

_ALWAYS: Choices = {"true_chosen": {}}  # in this family a token's routing weights always sum to 1
_NORM: Choices = {"none": {"norm_topk_prob": False}, "true_chosen": {"norm_topk_prob": True}}
_QKVO: Choices = {"none": {"attention_bias": False}, "qkvo": {"attention_bias": True}}
_ADJACENT: Choices = {"adjacent": {}}


def _softmax(normalise: Choices, *, selection_bias: bool = False, logit_bias: bool = False, **further: Value) -> Part:
    """Returns the fields of a router that takes the top k of one softmax, after adding a selection bias if it has one."""
    biases = {"selection_bias": selection_bias, "logit_bias": logit_bias}
    return Part({"kind": "top_k", "normalise": normalise, **biases, **further})


def _sigmoid(n_group: int = 1, topk_group: int = 1, scale: float = 1.0) -> Part:
    """Returns the fields of a router that takes the top k of sigmoid scores plus bias, within the best groups of experts.
    The arguments are the default values of fields."""
    return Part({
        "kind": "group_limited",
        "n_group": Value("n_group", "whole", n_group),
        "topk_group": Value("topk_group", "whole", topk_group),
        "normalise": {each: _NORM[each] for each in ("true_chosen", "none")},
        "scale": Value("routed_scaling_factor", "positive", scale),
        "selection_bias": True,
    })  # fmt: skip


def _layers_behind(read: Fields, names: Collection[str]) -> list[str]:
    """Returns the name prefixes of layers for multi-token prediction. These layers come after the model's last layer, and
    project two concatenated hidden states."""
    layers, extra = read.whole("num_hidden_layers"), read.count("num_nextn_predict_layers", read.count("num_mtp_layers", 1))
    behind = [f"model.layers.{layer}." for layer in range(layers, layers + extra)]
    return [prefix for prefix in behind if f"{prefix}eh_proj.weight" in names]


_MIXTRAL = ModelFamily(
    "mixtral", "MixtralForCausalLM", _softmax(_ALWAYS), ("num_local_experts", "num_experts"), "intermediate_size",
    heads=GroupedHeads(null=True, kv_heads=8), rope_base=1e6, windows="always",
    gates=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    expert="block_sparse_moe.experts.{expert}.{old}.weight",
)  # fmt: skip
_OLMOE = ModelFamily(
    "olmoe", "OlmoeForCausalLM", _softmax(_NORM), ("num_experts", "num_local_experts"), "intermediate_size",
    qk_norm={"full": {}}, biases=_QKVO, heads=GroupedHeads(field=False),
    must_be={"clip_qkv": ((None,), "queries, keys and values are not clipped")},
)  # fmt: skip
_QWEN3 = ModelFamily(
    "qwen3_moe", "Qwen3MoeForCausalLM", _softmax(_NORM), ("num_experts", "num_local_experts"), "moe_intermediate_size",
    qk_norm={"head": {}}, biases=_QKVO, layers=Listed(), heads=GroupedHeads(kv_heads=4), windows="flag",
)  # fmt: skip
_QWEN2 = ModelFamily(
    "qwen2_moe", "Qwen2MoeForCausalLM", _softmax(_NORM), ("num_experts",), "moe_intermediate_size",
    biases={"qkv": {"qkv_bias": True}, "none": {"qkv_bias": False}}, layers=Listed(),
    shared=SharedExpert("shared_expert_intermediate_size", "mlp.shared_expert", gated=True),
    heads=GroupedHeads(kv_heads=16), windows="layers",
)  # fmt: skip
PLUS_PLUS = replace(
    _QWEN3, name="qwen3_moe_plus_plus", architecture="Qwen3MoePlusPlusForCausalLM",
    router=_softmax({"none": {"norm_topk_prob": False}, "all_chosen": {"norm_topk_prob": True}}),
    zero_computation=ZeroComputation(), layout="zero_computation",
)  # fmt: skip
_LLAMA = ModelFamily(
    "llama", "LlamaForCausalLM", _softmax(_ALWAYS), (), "intermediate_size", biases=_QKVO, heads=GroupedHeads(null=True),
    expert="mlp.{part}_proj.weight", must_be={"mlp_bias": ((False,), "FFNs have no biases")},
)  # fmt: skip
_ERNIE = ModelFamily(
    "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _softmax(_ALWAYS, selection_bias=True),
    ("moe_num_experts", "num_experts"), "moe_intermediate_size",
    top_k=("moe_k", "num_experts_per_tok"), layers=Between(),
    shared=SharedExpert("moe_num_shared_experts", "mlp.shared_experts", counted=True, least=0),
    heads=GroupedHeads(kv_heads=4), rope_base=5e5, rope_pairs=_ADJACENT, tied=True,
    must_be={
        "use_bias": ((False, None), "projections have no biases"),
        "moe_norm_min": ((1e-12,), "weights are divided by the sum of the chosen probabilities"),
    },
    selection_bias=("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
    selection_bias_dims=2, multi_token=lambda read, names: ["model.mtp_"],
)  # fmt: skip
_GLM = ModelFamily(
    "glm4_moe", "Glm4MoeForCausalLM", _sigmoid(), ("n_routed_experts", "num_local_experts"), "moe_intermediate_size",
    qk_norm={"none": {"use_qk_norm": False}, "head": {"use_qk_norm": True}},
    biases={"none": {"attention_bias": False}, "qkv": {"attention_bias": True}},
    layers=DenseFirst(), shared=SharedExpert("n_shared_experts", "mlp.shared_experts", counted=True),
    heads=GroupedHeads(kv_heads=8, rope_share=0.5),
    selection_bias=("mlp.gate.e_score_correction_bias",), multi_token=_layers_behind,
)  # fmt: skip
_DEEPSEEK = replace(
    _GLM, name="deepseek_v3", architecture="DeepseekV3ForCausalLM",
    router=_sigmoid(n_group=8, topk_group=4, scale=2.5), qk_norm=SILENT, biases=SILENT, layers=DenseFirst(first=3),
    heads=LatentHeads(), rope_pairs={"adjacent": {"rope_interleave": True}, "halves": {"rope_interleave": False}},
    # transformers ignores the last three of these fields and all in `training`, but DeepSeek's published code uses them.
    must_be={
        "attention_bias": ((False,), "the projections of latent attention have no biases"),
        "scoring_func": (("sigmoid",), "transformers' DeepSeek-V3 has sigmoid scores whatever the field says"),
        "topk_method": (("noaux_tc",), "transformers' DeepSeek-V3 chooses by scores plus bias inside the best groups"),
        "moe_layer_freq": ((1,), "in transformers' DeepSeek-V3 every layer behind the dense ones has experts"),
    },
    training=("aux_loss_alpha", "seq_aux", "ep_size"),
)  # fmt: skip
# LongCat-Flash: each layer has two attentions, two FFNs, and a set of experts, some of which are identity experts:
#     a = x + attention_0(norm(x)),  h = norm(a),  b = a + ffn_0(h)
#     c = b + attention_1(norm(b)),  y = c + ffn_1(norm(c)) + experts(h)
# Such a layer becomes two layers of moe_dist. The first one has the experts, with a shortcut, and ffn_0 as shared expert.
# The second one is dense.
_LONGCAT = ModelFamily(
    "longcat_flash", "LongcatFlashForCausalLM",
    _softmax({"none": {}}, selection_bias=True, scale=Value("routed_scaling_factor", "positive", 6.0)),
    ("n_routed_experts",), "expert_ffn_hidden_size",
    top_k=("moe_topk",), num_layers="num_layers", layers_each=2, layers=Alternate(), shortcut=True,
    shared=SharedExpert("ffn_hidden_size", "mlps.0"), dense_ffn="ffn_hidden_size", dense_module="mlps.1",
    zero_computation=Part({"num_identity": Value("zero_expert_num", "count", 256)}), layout="identity",
    heads=LatentHeads(kv_heads=None, head_dim=64, plain_queries=False, scaled=True), rope_base=1e7, rope_pairs=_ADJACENT,
    must_be={
        "attention_bias": ((False,), "the projections of latent attention have no biases"),
        "router_bias": ((False,), "logits have no bias"),
        "zero_expert_type": (("identity",), "zero experts are the identity"),
        "mla_scale_q_lora": ((True,), "latents are scaled"),
        "mla_scale_kv_lora": ((True,), "latents are scaled"),
    },
    gates=("mlp.router.classifier.weight",), selection_bias=("mlp.router.e_score_correction_bias",),
    multi_token=lambda read, names: ["model.mtp"],
)  # fmt: skip
_GPT_OSS = ModelFamily(
    "gpt_oss", "GptOssForCausalLM", _softmax(_ALWAYS, logit_bias=True), ("num_local_experts", "num_experts"),
    "intermediate_size", biases={"qkvo": {"attention_bias": True}, "none": {"attention_bias": False}},
    form=Part({
        "kind": "clamped_ffn",
        "alpha": Value("swiglu_alpha", "positive", 1.702),
        "limit": Value("swiglu_limit", "positive", 7.0),
    }),
    layout="interleaved", heads=GroupedHeads(kind="sinks", kv_heads=8, width=64), rope_base=150000.0,
    rope_scaling={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    windows="alternate", gates=("mlp.router.weight",),
)  # fmt: skip

FAMILIES: Mapping[str, ModelFamily] = {
    each.name: each for each in (_MIXTRAL, _OLMOE, _QWEN3, _QWEN2, _LLAMA, _ERNIE, _GLM, _DEEPSEEK, _LONGCAT, _GPT_OSS)
}
KNOWN = {**FAMILIES, PLUS_PLUS.name: PLUS_PLUS}  # transformers has no class for Qwen3-MoE++

# Fields that transformers reads for any model, but that no configuration class of the supported families defines.
ANY_FAMILY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "experts are SwiGLUs"),
    "is_causal": ((True,), "a token sees no later token"),
    "attention_chunk_size": ((None,), "attention has no chunks"),
    "kv_sharing_modes": ((None,), "every layer has its own keys and values"),
    "per_layer_config": ((None, {}), "all layers have the same sizes"),
    **dict.fromkeys(("text_config", "decoder", "generator"), ((None,), "the model must not be inside another")),
}
