"""Maps the fields of a family's config.json to the keys of the section `model`, and back."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_dist.config.base.section import MAX_LAYERS
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.hf.attention_fields import max_positions, read_rope, read_windows, write_rope, write_windows
from moe_dist.hf.families import ANY_FAMILY, KNOWN
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.fields import Fields, Part, Value, setting

GROUP = "all"  # name of the only expert group of an imported model


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """Returns the family that config.json names. Raises ConfigError if the family is not supported, or if the model is
    quantised."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in KNOWN:
        reason = _other_way(name) if isinstance(name, str) else "it must name a family"
        raise ConfigError(f"config.json: model_type={name!r}: {reason}; known are {', '.join(KNOWN)}")
    family = KNOWN[name]
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise ConfigError(f"config.json: {key}={config[key]!r:.80}: quantised weights are not read; take the originals")
    classes = config.get("architectures")
    if classes and classes != [family.architecture]:
        raise ConfigError(f"config.json: architectures={classes!r} must be [{family.architecture!r}], a language model")
    return family


def _other_way(name: str) -> str:
    """Returns a text that says how to train a family that cannot be imported. A mark of transformers shows which families
    the engine transformers can train."""
    engine = "engine.kind=transformers (docs/hf-engine.md)"
    if (transformers := find_spec("transformers")) is None or transformers.origin is None:
        return f"it cannot be imported; if its experts are those of transformers, {engine} trains it"
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = model_type_to_module_name(name)
    code = Path(transformers.origin).parent / "models" / module / f"modeling_{module}.py"
    if not os.path.isfile(code):  # also for a name that is too long
        return "transformers has no such family"
    if "@use_experts_implementation" not in code.read_text():
        return "it cannot be imported, and has no experts that engine.kind=transformers could distribute"
    return f"it cannot be imported; train it by {engine}"


def read_section(config: Mapping[str, Any]) -> tuple[ModelFamily, dict[str, Any], Sequence[str]]:
    """Returns the family, the values of the section `model`, and the fields of config.json that were not read. Raises
    ConfigError if moe_dist does not support the family or the value of a field."""
    family = family_of(config)
    read = Fields(config, family.name)
    layers, heads = read.whole(family.num_layers, most=MAX_LAYERS) * family.layers_each, read.whole("num_attention_heads")
    max_seq_len = read.whole("max_position_embeddings")
    for name, (allowed, why) in {**ANY_FAMILY, **family.must_be}.items():
        read.must_be(name, allowed, why)
    for name in family.training:
        read.get(name, None, null=None)  # marks the field as read
    first, every, dense = _moe_layers(family, read, layers)
    experts = read.one_of(family.experts) if family.experts else 1
    ffn_dim = read.whole(family.ffn)
    head_values, rotated = family.heads.read(read, heads)
    section = {
        **_plain(family).read(read),
        "num_layers": layers,
        "num_heads": heads,
        "max_seq_len": max_seq_len,
        "dense_ffn_dim": read.whole(family.dense_ffn) if dense else None,
        **read_rope(read, family.rope_base, family.heads.rope_share, rotated, max_seq_len, family.rope_scaling),
        **head_values,
        **read_windows(read, family.windows, layers),
        "moe": {
            "groups": {
                GROUP: {
                    "num_experts": experts,
                    "top_k": read.one_of(family.top_k) if family.experts else 1,
                    "ffn_dim": ffn_dim,
                    **family.zero_computation.read(read),
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
        read.get(family.dense_ffn, None)  # marks the field as read even if no dense layer uses it
    family.multi_token(read, ())  # marks the fields for multi-token prediction as read
    return family, section, read.unread()


def _moe_layers(family: ModelFamily, read: Fields, layers: int) -> tuple[int, int, bool]:
    """Returns the index of the first MoE layer, the distance between MoE layers, and whether there are dense layers."""
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
    """Returns the settings of a model that a family does not support, except null experts. These are the settings that
    differ after config.json is written and read again. The model must have one expert group."""
    kinds = {
        "attention.kind": (section.attention.kind, family.heads.kind),
        "router.kind": (section.moe.router.kind, family.router.keys["kind"]),
        "experts.kind": (section.moe.experts.kind, family.form.keys["kind"]),
    }
    found = [f"{key}={ours}" for key, (ours, theirs) in kinds.items() if ours != theirs]
    if family.shared and family.shared.least and not section.moe.shared_ffn_dim:
        found.append("shared_ffn_dim=0")
    if found:
        return found
    try:
        again = meaning(parsed_section(read_section(write_fields(section, family))[1]))
    except ConfigError as error:
        return [f"these fields: {problem}" for problem in error.problems]
    except ValidationError as error:
        return [f"these values: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
    return [f"{setting(key, value)!s:.80}" for key, value in meaning(section).items() if again[key] != value]


def meaning(section: ModelSection) -> dict[str, Any]:
    """Returns the settings that determine a model's function. Equivalent sections give equal results."""
    moe, dense = section.moe, len(section.moe_layers) < section.num_layers
    adapted = {"kind": "ffn"} if moe.experts.adapts_ffns or moe.experts.over_frozen_ffn else None  # an export merges them
    groups = {}
    for number, group in enumerate(moe.groups.values()):
        values = group.model_dump(exclude={"modalities"})
        groups |= {f"groups.{number}.{key}" if number else key: value for key, value in values.items()}
    return {
        **section.model_dump(exclude={"moe", "init_std", "head_dim", "dense_ffn_dim"}),
        "head_dim": section.resolved_head_dim,
        "rope_dim": section.rope_dim or section.resolved_head_dim,
        "max_seq_len": max_positions(section),
        "sliding_layers": section.windows,
        "dense_ffn_dim": section.dense_ffn_dim if dense else None,
        "moe_layers": section.moe_layers,
        **groups,
        **{f"router.{key}": value for key, value in moe.router.model_dump().items()},
        **{key: getattr(moe, key) for key in ("shared_ffn_dim", "shared_gate", "shortcut")},
        "experts": adapted or moe.experts.model_dump(),
    }


def parsed_section(values: Mapping[str, Any]) -> ModelSection:
    """Parses a section `model`. Raises pydantic.ValidationError if the values are invalid."""
    return ModelSection.model_validate_json(json.dumps(values))


def write_fields(section: ModelSection, family: ModelFamily) -> dict[str, Any]:
    """Returns the fields of config.json, for transformers 4 and 5, of a model that has no `misfits`."""
    group, moe = next(iter(section.moe.groups.values())), section.moe
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        **_plain(family).write(section),
        family.num_layers: section.num_layers // family.layers_each,
        "num_attention_heads": section.num_heads,
        **family.heads.write(section),
        "max_position_embeddings": max_positions(section),
        **write_rope(section, partial=family.heads.rope_share is not None),
        **write_windows(section, family.windows),
        "hidden_act": "silu",
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
    return {**fields, **family.zero_computation.write(group), family.ffn: group.ffn_dim}


def _plain(family: ModelFamily) -> Part:
    """Returns the keys of the section `model` that correspond to exactly one field each."""
    return Part({
        "hidden_dim": Value("hidden_size"),
        "vocab_size": Value("vocab_size"),
        "norm_eps": Value("rms_norm_eps", "positive"),
        "init_std": Value("initializer_range", "positive", 0.02),
        "tie_embeddings": Value("tie_word_embeddings", "flag", family.tied),
        "qk_norm": family.qk_norm,
        "attention_bias": family.biases,
        "rope_pairs": family.rope_pairs,
    })  # fmt: skip
