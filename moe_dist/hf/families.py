"""Describes the supported Hugging Face model families: which field of config.json gives which key of the section `model`.

moe_dist computes the same function as these models. An import refuses a config.json with a feature that moe_dist lacks. A
dense model becomes a model with one expert per layer, whose routing weight is always 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.errors import ConfigError
from moe_dist.hf.attention_fields import (
    Windows,
    max_positions,
    read_rope,
    read_windows,
    windows_fit,
    write_rope,
    write_windows,
)
from moe_dist.hf.fields import Fields

GROUP = "all"  # name of the only expert group of an imported model
# `zce_types` of Qwen3-MoE++ (ZEDA, arXiv 2605.18643), in the order of our columns, by the key of a group with their number.
ZERO_COMPUTATION = {"num_null": "zero", "num_identity": "copy", "num_constant": "constant"}
# Where the tensors of MoE layers are (`moe_dist.hf.names`).
Layout = Literal["plain", "zero_computation", "moe_dist"]


@dataclass(frozen=True)
class ModelFamily:
    """One family (`model_type`) of Hugging Face models."""

    name: str  # `model_type`
    architecture: str  # the class with which transformers loads the model
    qk_norm: str  # value of `model.qk_norm`
    biases: Mapping[str, Mapping[str, bool]]  # fields by value of `model.attention_bias`; the first is the default
    normalise: Mapping[str, Mapping[str, bool]]  # fields by value of `router.normalise`; the first is the default
    experts: tuple[str, ...]  # possible names of the field with the number of experts; empty if dense
    ffn: str  # name of the field with the FFN width of an expert
    dense_layers: bool = False  # fields decoder_sparse_step and mlp_only_layers can make layers dense
    shared: bool = False  # each MoE layer has a shared expert with a sigmoid gate
    head_dim: bool = True  # config.json has the field head_dim
    null_head_dim: bool = False  # head_dim may be null, which means hidden_size / num_attention_heads
    kv_heads: int | None = None  # num_key_value_heads if it is absent; None: num_attention_heads, also if it is null
    rope_base: float = 10000.0  # base of the rotary frequencies if config.json says none
    windows: Windows = "none"  # how config.json says sliding windows
    layout: Layout = "plain"
    must_be: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)  # by field: allowed values, reason


_NORM = {"none": {"norm_topk_prob": False}, "true_chosen": {"norm_topk_prob": True}}
_BIAS = {"none": {"attention_bias": False}, "qkvo": {"attention_bias": True}}
_EXPERTS = ("num_experts", "num_local_experts")  # transformers 5 writes num_local_experts for some families
_CLIP = {"clip_qkv": ((None,), "queries, keys and values are not clipped")}
# Fields that transformers reads in any model, and that no class of these families has.
_ANY_FAMILY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "a token sees no later token"),
    "attention_chunk_size": ((None,), "attention has no chunks"),
    "kv_sharing_modes": ((None,), "every layer has its own keys and values"),
    "per_layer_config": ((None, {}), "all layers have the same sizes"),
    **dict.fromkeys(("text_config", "decoder", "generator"), ((None,), "the model must not be inside another")),
}
_MLP_BIAS = {"mlp_bias": ((False,), "FFNs have no biases")}

FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family
    for family in (
        ModelFamily(
            "mixtral", "MixtralForCausalLM", "none", {"none": {}}, {"true_chosen": {}}, _EXPERTS[::-1], "intermediate_size",
            null_head_dim=True, kv_heads=8, rope_base=1e6, windows="always",
        ),
        ModelFamily(
            "olmoe", "OlmoeForCausalLM", "full", _BIAS, _NORM, _EXPERTS, "intermediate_size", head_dim=False,
            must_be=_CLIP,
        ),
        ModelFamily(
            "qwen3_moe", "Qwen3MoeForCausalLM", "head", _BIAS, _NORM, _EXPERTS, "moe_intermediate_size",
            dense_layers=True, kv_heads=4, windows="flag",
        ),
        ModelFamily(
            "qwen2_moe", "Qwen2MoeForCausalLM", "none", {"qkv": {"qkv_bias": True}, "none": {"qkv_bias": False}}, _NORM,
            _EXPERTS[:1], "moe_intermediate_size", dense_layers=True, shared=True, kv_heads=16, windows="layers",
        ),
        ModelFamily(
            "llama", "LlamaForCausalLM", "none", _BIAS, {"true_chosen": {}}, (), "intermediate_size", must_be=_MLP_BIAS,
            null_head_dim=True,
        ),
    )
}  # fmt: skip

# The published form of models with null, copy and constant experts. transformers has no class for it.
PLUS_PLUS = replace(
    FAMILIES["qwen3_moe"],
    name="qwen3_moe_plus_plus",
    architecture="Qwen3MoePlusPlusForCausalLM",
    normalise={"none": {"norm_topk_prob": False}, "all_chosen": {"norm_topk_prob": True}},
    layout="zero_computation",
)
KNOWN = {**FAMILIES, PLUS_PLUS.name: PLUS_PLUS}

_MLA = "its attention (multi-head latent attention, MLA) is not in the model"
REFUSED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "longcat_flash"), _MLA),
    "gpt_oss": "its attention sinks and its experts' clipped activation are not in the model",
    "qwen3_next": "its linear attention is not in the model",
    "llama4_text": "its chunked attention is not in the model",
}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Returns the family that config.json names.

    Raises:
        ConfigError: the family is not supported, the model is quantised, or it brings its own code.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in KNOWN:
        reason = REFUSED.get(name, "this family is not known here") if isinstance(name, str) else "it must name a family"
        raise ConfigError(f"config.json: model_type={name!r}: {reason}; known are {', '.join(KNOWN)}")
    family = KNOWN[name]
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise ConfigError(f"config.json: {key}={config[key]!r:.80}: quantised weights are not read; take the originals")
    if config.get("auto_map"):
        raise ConfigError(
            f"config.json: auto_map={config['auto_map']!r:.80}: the model brings code of its own, which is never run; if "
            f"it is a plain {name} model, take auto_map out of config.json"
        )
    classes = config.get("architectures")
    if classes and classes != [family.architecture]:
        raise ConfigError(f"config.json: architectures={classes!r} must be [{family.architecture!r}], a language model")
    return family


def read_section(config: Mapping[str, Any]) -> tuple[ModelFamily, dict[str, Any], Sequence[str]]:
    """Returns the family, the values of the `model` section, and the fields of config.json that were not read.

    Raises:
        ConfigError: moe_dist does not support the family, or the value of a field.
    """
    family = family_of(config)
    read = Fields(config, family.name)
    layers, heads = read.whole("num_hidden_layers"), read.whole("num_attention_heads")
    max_seq_len = read.whole("max_position_embeddings")
    _check_plain(family, read)
    first, every, dense = _moe_layers(family, read, layers)
    experts = read.one_of(family.experts) if family.experts else 1
    width = read.whole("head_dim", None, **({"null": None} if family.null_head_dim else {}))
    if not family.head_dim and width is not None and width * heads != read.whole("hidden_size"):
        raise ConfigError(
            f"config.json: head_dim={width}: a {family.name} model has heads of hidden_size / num_attention_heads"
        )
    section = {
        "hidden_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(family, read, heads),
        "head_dim": width,
        "vocab_size": read.whole("vocab_size"),
        "max_seq_len": max_seq_len,
        "dense_ffn_dim": read.whole("intermediate_size") if dense else None,
        **read_rope(read, family.rope_base, max_seq_len),
        **read_windows(read, family.windows, layers),
        "norm_eps": read.positive("rms_norm_eps"),
        "qk_norm": family.qk_norm,
        "attention_bias": _said(family.biases, read),
        "tie_embeddings": read.flag("tie_word_embeddings", False),
        "init_std": read.positive("initializer_range", 0.02),
        "moe": {
            "groups": {
                GROUP: {
                    "num_experts": experts,
                    "top_k": read.whole("num_experts_per_tok") if family.experts else 1,
                    "ffn_dim": read.whole(family.ffn),
                    **(_zero_computation(read) if family.layout == "zero_computation" else {}),
                }
            },
            "router": {"normalise": _said(family.normalise, read)},
            "first": first,
            "every": every,
            "shared_ffn_dim": read.whole("shared_expert_intermediate_size") if family.shared else 0,
            "shared_gate": family.shared,
        },
    }
    if family.dense_layers:
        read.get("intermediate_size", None)  # counts as read, although only dense layers use it
    return family, section, read.unread()


def _check_plain(family: ModelFamily, read: Fields) -> None:
    """Raises ConfigError for features that a model may have and moe_dist lacks."""
    read.must_be("hidden_act", ("silu", "swish"), "experts are SwiGLUs")
    for name, (allowed, why) in {**_ANY_FAMILY, **family.must_be}.items():
        read.must_be(name, allowed, why)


def _kv_heads(family: ModelFamily, read: Fields, heads: int) -> int:
    if family.kv_heads is None:
        return read.whole("num_key_value_heads", heads, null=heads)
    return read.whole("num_key_value_heads", family.kv_heads)


def _said(choices: Mapping[str, Mapping[str, bool]], read: Fields) -> str:
    """Returns the key of `choices` whose fields are those of config.json; an absent field has the first key's value."""
    first = next(iter(choices.values()))
    values = {name: read.flag(name, default) for name, default in first.items()}
    return next(choice for choice, fields in choices.items() if fields == values)


def _moe_layers(family: ModelFamily, read: Fields, layers: int) -> tuple[int, int, bool]:
    """Returns the index of the first MoE layer, the distance between MoE layers, and True if there are dense layers."""
    if not family.dense_layers:
        return 0, 1, False
    step, only = read.whole("decoder_sparse_step", 1), read.many("mlp_only_layers", [], null=[])
    sparse = [layer for layer in range(layers) if layer not in only and (layer + 1) % step == 0]
    every = sparse[1] - sparse[0] if len(sparse) > 1 else layers
    if not sparse or sparse != list(range(sparse[0], layers, every)):
        raise ConfigError(
            f"config.json: mlp_only_layers={only!r} and decoder_sparse_step={step} leave experts in the layers {sparse}; "
            "supported is every n-th layer from a first one to the last"
        )
    return sparse[0], every if len(sparse) > 1 else max(1, layers - sparse[0]), len(sparse) < layers


def _zero_computation(read: Fields) -> dict[str, int]:
    """Returns the numbers of null, identity and constant experts."""
    kinds, counts = read.many("zce_types"), read.many("zce_nums")
    ordered = [kind for kind in ZERO_COMPUTATION.values() if kind in kinds]
    if kinds != ordered or len(kinds) != len(counts) or not all(type(count) is int and count > 0 for count in counts):
        raise ConfigError(
            f"config.json: zce_types={kinds!r:.80}, zce_nums={counts!r:.80}: supported is each type at most once, in the "
            f"order {', '.join(ZERO_COMPUTATION.values())}, with a number above 0"
        )
    if read.flag("use_zce_mask", True):
        raise ConfigError(
            "config.json: use_zce_mask is true or absent: such a model never chooses its zero-computation experts; set it "
            "to false, or take these experts' rows away and set model_type to qwen3_moe"
        )
    return {name: counts[kinds.index(kind)] for name, kind in ZERO_COMPUTATION.items() if kind in kinds}


def top_k_router(section: ModelSection) -> TopKRouterSection:
    """Returns the section of the model's top-k router, the only kind of router that the families have.

    Raises:
        ConfigError: the router is of another kind.
    """
    router = section.moe.router
    if not isinstance(router, TopKRouterSection):
        raise ConfigError(f"model.moe.router.kind={router.kind}: known families choose by top-k")
    return router


def misfits(section: ModelSection, family: ModelFamily) -> list[str]:
    """Returns the settings of a model with one group that a family does not support, zero-computation experts apart."""
    group, moe = next(iter(section.moe.groups.values())), section.moe
    normalise = top_k_router(section).normalise
    width = section.hidden_dim // section.num_heads
    held = {
        f"qk_norm={section.qk_norm}": section.qk_norm == family.qk_norm,
        f"attention_bias={section.attention_bias}": section.attention_bias in family.biases,
        f"router.normalise={normalise}": normalise in family.normalise or group.num_experts == 1,
        f"num_experts={group.num_experts}": (group.num_experts == 1) == (not family.experts),
        f"moe.first={moe.first}, moe.every={moe.every}": family.dense_layers
        or len(section.moe_layers) == section.num_layers,
        f"shared_ffn_dim={moe.shared_ffn_dim}, shared_gate={moe.shared_gate}": (
            bool(moe.shared_ffn_dim) == family.shared == moe.shared_gate
        ),
        f"sliding_window={section.sliding_window}, sliding_layers={section.sliding_layers}": windows_fit(
            section, family.windows
        ),
        f"head_dim={section.head_dim}": family.head_dim or section.resolved_head_dim == width,
    }
    return [what for what, fits in held.items() if not fits]


def write_fields(section: ModelSection, family: ModelFamily) -> dict[str, Any]:
    """Returns the fields of config.json, for transformers 4 and 5, of a model that `misfits` has accepted."""
    group, moe = next(iter(section.moe.groups.values())), section.moe
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_size": section.hidden_dim,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_kv_heads,
        "vocab_size": section.vocab_size,
        "max_position_embeddings": max_positions(section),
        "rms_norm_eps": section.norm_eps,
        **write_rope(section),
        **write_windows(section, family.windows),
        "hidden_act": "silu",
        "tie_word_embeddings": section.tie_embeddings,
        "initializer_range": section.init_std,
        **family.biases[section.attention_bias],
        **family.normalise.get(top_k_router(section).normalise, {}),
    }
    if family.head_dim:
        fields["head_dim"] = section.resolved_head_dim
    if family.experts:
        fields |= {family.experts[0]: group.num_experts, "num_experts_per_tok": group.top_k}
    if family.dense_layers:
        dense = [layer for layer in range(section.num_layers) if layer not in section.moe_layers]
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        fields |= {"intermediate_size": section.dense_ffn_dim or group.ffn_dim}
    if family.shared:
        fields["shared_expert_intermediate_size"] = moe.shared_ffn_dim
    if family.layout == "zero_computation":
        counts = {kind: count for name, kind in ZERO_COMPUTATION.items() if (count := getattr(group, name))}
        fields |= {"zce_types": list(counts), "zce_nums": list(counts.values()), "use_zce_mask": False}
    return fields | {family.ffn: group.ffn_dim}
