"""The supported Hugging Face model families. Maps fields of config.json to keys of the section `model`.

moe_dist computes the same function as a model of a supported family. An import refuses a config.json with a feature that
moe_dist lacks. A dense model becomes a model with one expert per layer, whose routing weight is always 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.hf import deepseek_v3, ernie4_5_moe, glm4_moe, gpt_oss, longcat_flash, qwen_moe
from moe_dist.hf.attention_fields import max_positions, read_rope, read_windows, windows_fit, write_rope, write_windows
from moe_dist.hf.family import NORM, ModelFamily, SoftmaxRouter
from moe_dist.hf.fields import Fields, setting
from moe_dist.hf.head_fields import GroupedHeads

GROUP = "all"  # name of the only expert group of an imported model

_BIAS = {"none": {"attention_bias": False}, "qkvo": {"attention_bias": True}}
_ALWAYS = SoftmaxRouter({"true_chosen": {}})  # a token's routing weights always sum to 1
# Fields that transformers reads in any model, and that no class of the supported families has.
_ANY_FAMILY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "a token sees no later token"),
    "attention_chunk_size": ((None,), "attention has no chunks"),
    "kv_sharing_modes": ((None,), "every layer has its own keys and values"),
    "per_layer_config": ((None, {}), "all layers have the same sizes"),
    **dict.fromkeys(("text_config", "decoder", "generator"), ((None,), "the model must not be inside another")),
}

FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family
    for family in (
        ModelFamily(
            "mixtral", "MixtralForCausalLM", _ALWAYS, ("num_local_experts", "num_experts"), "intermediate_size",
            heads=GroupedHeads(null=True, kv_heads=8), rope_base=1e6, windows="always",
            gates=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
            expert="block_sparse_moe.experts.{expert}.{old}.weight",
        ),
        ModelFamily(
            "olmoe", "OlmoeForCausalLM", SoftmaxRouter(NORM), ("num_experts", "num_local_experts"), "intermediate_size",
            qk_norm={"full": {}}, biases=_BIAS, heads=GroupedHeads(field=False),
            must_be={"clip_qkv": ((None,), "queries, keys and values are not clipped")},
        ),
        qwen_moe.QWEN3,
        qwen_moe.QWEN2,
        ModelFamily(
            "llama", "LlamaForCausalLM", _ALWAYS, (), "intermediate_size", biases=_BIAS,
            heads=GroupedHeads(null=True),
            expert="mlp.{part}_proj.weight", must_be={"mlp_bias": ((False,), "FFNs have no biases")},
        ),
        ernie4_5_moe.FAMILY,
        glm4_moe.FAMILY,
        deepseek_v3.FAMILY,
        longcat_flash.FAMILY,
        gpt_oss.FAMILY,
    )
}  # fmt: skip
KNOWN = {**FAMILIES, qwen_moe.PLUS_PLUS.name: qwen_moe.PLUS_PLUS}  # transformers has no class for Qwen3-MoE++

_MLA = "its attention (MLA, model.attention.kind=latent)"
REFUSED = {
    "deepseek_v2": f"{_MLA} is in the model, but its choice by softmax inside the best groups of experts is not",
    "kimi_k2": f"transformers has no class of this name; {_MLA} and its router (kind=group_limited) are in the model",
    "qwen3_next": "its linear attention is not in the model",
    "llama4_text": "its chunked attention is not in the model",
}


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Returns the family that config.json names.

    Raises:
        ConfigError: the family is not supported, or the model is quantised or brings its own code.
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
    layers, heads = read.whole(family.num_layers) * family.layers_each, read.whole("num_attention_heads")
    max_seq_len = read.whole("max_position_embeddings")
    _check_plain(family, read)
    first, every, dense = _moe_layers(family, read, layers)
    experts = read.one_of(family.experts) if family.experts else 1
    ffn_dim = read.whole(family.ffn)
    head_values, rotated = family.heads.read(read, heads)
    section = {
        "hidden_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": read.whole("vocab_size"),
        "max_seq_len": max_seq_len,
        "dense_ffn_dim": read.whole(family.dense_ffn) if dense else None,
        **read_rope(read, family.rope_base, family.heads.rope_share, rotated, max_seq_len, family.rope_scaling),
        **head_values,
        "rope_pairs": read.choice(family.rope_pairs),
        **read_windows(read, family.windows, layers),
        "norm_eps": read.positive("rms_norm_eps"),
        "qk_norm": read.choice(family.qk_norm),
        "attention_bias": read.choice(family.biases),
        "tie_embeddings": read.flag("tie_word_embeddings", family.tied),
        "init_std": read.positive("initializer_range", 0.02),
        "moe": {
            "groups": {
                GROUP: {
                    "num_experts": experts,
                    "top_k": read.one_of(family.top_k) if family.experts else 1,
                    "ffn_dim": ffn_dim,
                    **(family.zero_computation.read(read) if family.zero_computation else {}),
                }
            },
            "experts": family.form.read(read),
            "router": family.router.read(read),
            "first": first,
            "every": every,
            "shortcut": family.shortcut,
            **(family.shared.read(read, ffn_dim) if family.shared else {}),
        },
    }
    if family.layers.names:
        read.get(family.dense_ffn, None)  # marks the field as read, although only dense layers use it
    family.multi_token(read, ())  # marks the fields of multi-token prediction as read
    return family, section, read.unread()


def _check_plain(family: ModelFamily, read: Fields) -> None:
    """Raises ConfigError for features that a model may have and moe_dist lacks."""
    read.must_be("hidden_act", ("silu", "swish"), "experts are SwiGLUs")
    for name, (allowed, why) in {**_ANY_FAMILY, **family.must_be}.items():
        read.must_be(name, allowed, why)
    for name in family.training:
        read.get(name, None, null=None)  # marks the field as read


def _moe_layers(family: ModelFamily, read: Fields, layers: int) -> tuple[int, int, bool]:
    """Returns the index of the first MoE layer, the distance between MoE layers, and whether dense layers exist."""
    sparse = family.layers.sparse(read, layers)
    every = sparse[1] - sparse[0] if len(sparse) > 1 else layers
    if not sparse or sparse != list(range(sparse[0], layers, every)):
        said = " and ".join(f"{name}={read.get(name, None, null=None)!r}" for name in family.layers.names)
        raise ConfigError(
            f"config.json: {said} leave experts in the layers {sparse} of {family.num_layers}={layers}; supported is every "
            "n-th layer from a first one to the last"
        )
    return sparse[0], every if len(sparse) > 1 else max(1, layers - sparse[0]), len(sparse) < layers


def misfits(section: ModelSection, family: ModelFamily) -> list[str]:
    """Returns those settings of a model with one expert group, except null experts, that a family does not support."""
    group, moe, zeros = next(iter(section.moe.groups.values())), section.moe, family.zero_computation
    held = {
        f"qk_norm={section.qk_norm}": section.qk_norm in family.qk_norm,
        f"attention_bias={section.attention_bias}": section.attention_bias in family.biases,
        **family.router.held(moe.router, group.num_experts),
        f"num_experts={group.num_experts}": (group.num_experts == 1) == (not family.experts),
        f"num_identity={group.num_identity}, num_constant={group.num_constant}": (
            zeros.fits(group) if zeros else not group.num_zero_computation
        ),
        f"moe.first={moe.first}, moe.every={moe.every}": family.layers.fit(section),
        f"experts.kind={moe.experts.kind}": family.form.fits(moe.experts),
        setting("moe.shortcut", moe.shortcut): moe.shortcut == family.shortcut,
        f"{setting('shared_ffn_dim', moe.shared_ffn_dim)}, {setting('shared_gate', moe.shared_gate)}": (
            family.shared.fits(moe, group.ffn_dim) if family.shared else not moe.shared_ffn_dim
        ),
        f"sliding_window={section.sliding_window}, sliding_layers={section.sliding_layers}": windows_fit(
            section, family.windows
        ),
        **family.heads.held(section),
        f"rope_pairs={section.rope_pairs}": section.rope_pairs in family.rope_pairs,
    }
    return [what for what, fits in held.items() if not fits]


def write_fields(section: ModelSection, family: ModelFamily) -> dict[str, Any]:
    """Returns the fields of config.json, for transformers 4 and 5, of a model that `misfits` has accepted."""
    group, moe = next(iter(section.moe.groups.values())), section.moe
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_size": section.hidden_dim,
        family.num_layers: section.num_layers // family.layers_each,
        "num_attention_heads": section.num_heads,
        **family.heads.write(section),
        "vocab_size": section.vocab_size,
        "max_position_embeddings": max_positions(section),
        "rms_norm_eps": section.norm_eps,
        **write_rope(section, partial=family.heads.rope_share is not None),
        **write_windows(section, family.windows),
        "hidden_act": "silu",
        "tie_word_embeddings": section.tie_embeddings,
        "initializer_range": section.init_std,
        **family.qk_norm[section.qk_norm],
        **family.biases[section.attention_bias],
        **family.rope_pairs[section.rope_pairs],
        **family.router.write(moe.router),
        **family.form.write(moe.experts),
        **family.layers.write(section),
    }
    if family.experts:
        fields |= {family.experts[0]: group.num_experts, family.top_k[0]: group.top_k}
    if family.layers.names:
        fields[family.dense_ffn] = section.dense_ffn_dim or group.ffn_dim
    if family.shared:
        fields |= family.shared.write(moe, group.ffn_dim)
    if family.zero_computation:
        fields |= family.zero_computation.write(group)
    return fields | {family.ffn: group.ffn_dim}
