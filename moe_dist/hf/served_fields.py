"""Reads and writes the config.json for `served/modeling_moe_dist.py`, for models that no transformers family can express.

Sizes have the names that are usual in transformers. The values of expert groups, router and mixture of depths are the
sections `model.moe.groups`, `model.moe.router` and `model.mixture_of_depths`. Each group also has its name and its token
ids.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.config.experts.ffn import ClampedFFNExpertsSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.hf.attention_fields import layer_types, max_positions, read_rope, sliding_layers, write_rope
from moe_dist.hf.family import ModelFamily, SharedExpert
from moe_dist.hf.fields import Fields, Part

SERVED = ModelFamily(  # only `read_served` and `write_served` handle this family's fields
    "moe_dist", "MoeDistForCausalLM", Part({}), (), "intermediate_size", layout="moe_dist",
    shared=SharedExpert("shared_expert_intermediate_size", "mlp.shared_expert"),
    expert="experts.{expert}.{part}_proj.weight",
)  # fmt: skip
CODE = Path(__file__).parent / "served"
CODE_FILES = ("configuration_moe_dist.py", "modeling_moe_dist.py")
AUTO_MAP = {
    "AutoConfig": "configuration_moe_dist.MoeDistConfig",
    "AutoModel": "modeling_moe_dist.MoeDistModel",  # for vLLM, which uses only the decoder, with its own output layer
    "AutoModelForCausalLM": "modeling_moe_dist.MoeDistForCausalLM",
}
OLD_AUTO_MAP = {name: each for name, each in AUTO_MAP.items() if name != "AutoModel"}  # `auto_map` in older exports
DENSE = "moe_dist_dense"  # model_type of dense models of transformers whose FFNs became experts
DENSE_CODE = ("modeling_moe_dist_dense.py",)
DENSE_MAP = {
    "AutoConfig": "modeling_moe_dist_dense.MoeDistDenseConfig",
    "AutoModelForCausalLM": "modeling_moe_dist_dense.MoeDistDenseModel",
}
# For each model_type of exports with code, the files of the code, and the values of auto_map.
CODES = {SERVED.name: (CODE_FILES, (AUTO_MAP, OLD_AUTO_MAP)), DENSE: (DENSE_CODE, (DENSE_MAP,))}

_FIELDS = {  # maps keys of the section `model` to fields
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "dense_ffn_dim": "intermediate_size",
    "rope_pairs": "rope_pairs",
    "norm_eps": "rms_norm_eps",
    "qk_norm": "qk_norm",
    "attention_bias": "projection_bias",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "sliding_window": "sliding_window",
    "mixture_of_depths": "mixture_of_depths",
}
_MOE_FIELDS = {  # maps keys of the section `model.moe` to fields
    "first": "first_moe_layer",
    "every": "moe_layer_step",
    "shared_ffn_dim": "shared_expert_intermediate_size",
    "shared_gate": "shared_expert_gate",
    "router": "router",
}


def unserved(model: ModelSection) -> list[str]:
    """Returns an error text for each kind in a model that the exported code lacks, such as a kind of another package."""
    sections = {
        "model.attention": model.attention,
        "model.rope_scaling": model.rope_scaling,
        "model.moe.experts": model.moe.experts,
        "model.moe.router": model.moe.router,
    }
    return [
        f"{key}.kind={section.kind}: the exported code has no such {key.rpartition('.')[2]}; train with another {key}.kind"
        for key, section in sections.items()
        if section is not None and section.served != section.kind
    ]


def served_problems(section: ModelSection) -> list[str]:
    """Returns the reasons why `modeling_moe_dist.py` cannot compute a model: the exported code lacks one of the model's
    kinds, or routing depends on later tokens even in evaluation."""
    problem = section.moe.router.not_causal()
    return [problem] if problem else unserved(section)


TokenIds = list[list[int]]  # ranges [first, last + 1] of token ids


def token_ids(section: ModelSection, manifest: Manifest) -> dict[str, TokenIds]:
    """Returns the token ids of each group. Raises ConfigError if the model has several groups whose modalities differ from
    those of the data set."""
    routed = {name: group.modalities or (name,) for name, group in section.moe.groups.items()}
    known = {modality for modalities in routed.values() for modality in modalities}
    if len(routed) > 1 and known != set(manifest.modalities):
        raise ConfigError(
            f"model.moe.groups: their modalities are {', '.join(sorted(known))}, those of the data set {manifest.name} are "
            f"{', '.join(sorted(manifest.modalities))}; give the data set of the model with --data"
        )
    return {
        name: [list(ids) for each in modalities for ids in manifest.modalities.get(each, ())]
        for name, modalities in routed.items()
    }


def write_served(section: ModelSection, ids: Mapping[str, TokenIds]) -> dict[str, Any]:
    """Returns the fields of config.json. `ids` may lack the group if there is only one."""
    values = section.model_dump(mode="json")
    fields = {theirs: values[ours] for ours, theirs in _FIELDS.items()}
    fields |= {theirs: values["moe"][ours] for ours, theirs in _MOE_FIELDS.items()}
    fields["moe_shortcut"] = section.moe.shortcut
    clamped = isinstance(section.moe.experts, ClampedFFNExpertsSection)
    fields["experts"] = values["moe"]["experts"] if clamped else {"kind": "ffn"}  # adapters are merged
    groups = [
        {"name": name, **group.model_dump(mode="json"), "token_ids": ids.get(name)}
        for name, group in section.moe.groups.items()
    ]
    return {
        "architectures": [SERVED.architecture],
        "auto_map": AUTO_MAP,
        "model_type": SERVED.name,
        **fields,
        "attention": values["attention"],
        "head_dim": section.resolved_head_dim,
        "max_position_embeddings": max_positions(section),
        **write_rope(section, partial=section.rope_dim is not None),
        "layer_types": layer_types(section),
        "expert_groups": groups,
    }


def read_served(config: Mapping[str, Any]) -> tuple[ModelFamily, dict[str, Any], Sequence[str]]:
    """Returns the family, the values of the section `model`, and the fields of config.json that were not read. Raises
    ConfigError if a field is missing, or has a value that exports never write."""
    read = Fields(config, SERVED.name)
    read.must_be(
        "auto_map", (AUTO_MAP, OLD_AUTO_MAP), "the code beside the weights is never run, and must be that of an export"
    )
    read.must_be("architectures", ([SERVED.architecture],), "it must be a language model")
    read.must_be("hidden_act", ("silu",), "experts are SwiGLUs")
    section = {ours: read.get(theirs, null=None) for ours, theirs in _FIELDS.items()}
    moe = {ours: read.get(theirs) for ours, theirs in _MOE_FIELDS.items()}
    moe["shortcut"] = read.get("moe_shortcut", False)  # older exports lack this field and the next one
    moe["experts"] = read.get("experts", {"kind": "ffn"})
    groups = read.many("expert_groups")
    if not all(isinstance(group, dict) and "name" in group for group in groups):
        raise ConfigError(f"config.json: expert_groups={groups!r:.80} must be objects, each with a name")
    by_name = {group["name"]: {k: v for k, v in group.items() if k not in ("name", "token_ids")} for group in groups}
    section |= read_rope(read, 10000.0, 1.0, read.whole("head_dim"), read.whole("max_position_embeddings"))
    section |= {"max_seq_len": read.whole("max_position_embeddings"), "moe": {**moe, "groups": by_name}}
    section["attention"] = read.get("attention", {"kind": "grouped_query"})  # absent in older exports
    return SERVED, section | sliding_layers(read.many("layer_types")), read.unread()
