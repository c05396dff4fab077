"""Tiny models of transformers' families, and runs of them by engine.kind=transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_dist.config.load import completed
from moe_dist.config.schema import Config
from tests.support.tiny import IMAGE_IDS, tiny_config

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON |= {"vocab_size": IMAGE_IDS[1], "max_position_embeddings": 64, "num_experts_per_tok": 2}
_FINE = {"moe_intermediate_size": 16, "intermediate_size": 24}
_NAMED = {"num_experts": 8, **_FINE}
_LOCAL = {"num_local_experts": 8, "intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
# Fields of each family's configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_COMMON, **_NAMED, "head_dim": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "mixtral": {**_COMMON, **_LOCAL, "head_dim": 8},
    "olmoe": {**_COMMON, "num_experts": 8, "intermediate_size": 16, "eos_token_id": 1},
    "granitemoe": {**_COMMON, **_LOCAL},
    # attention has sinks and is therefore eager: tokens see earlier documents of their sequence
    "gpt_oss": {**_COMMON, **_LOCAL, "head_dim": 8, "sliding_window": 16},
    # a dense first layer, sigmoid scores, a selection bias, a shared expert
    "deepseek_v3": {**_COMMON, **_FINE, **_LATENT, **_GROUPS, "num_hidden_layers": 3, "num_key_value_heads": 4},
    # convolutions, which see earlier documents, and tied embeddings
    "lfm2_moe": {
        **_COMMON,
        **_NAMED,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}
CHANGES: Mapping[str, Any] = {
    "engine": {"kind": "transformers"},
    "loss.z": 1e-3,
    "optimizer.eps": 1e-5,  # large enough that rounding of a gradient near zero makes no full Adam step
    "placement": {"policy": "interleaved"},
    "evaluation.balance_efficiency": False,
}
UNEVEN: Mapping[str, Any] = {
    "parallel.ep": 2,
    "placement": {"policy": "explicit", "slots": [[f"experts/{i}" for i in run] for run in (range(5), range(5, 8))]},
}


def hosted_config(data: str | Path, root: str | Path, model: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Returns the configuration of a run of 4 steps of 2 ranks. `model` names a folder, or a family and its fields."""
    section = {"moe": {"groups": {"experts": {"modalities": ["text", "image"]}}}, **model}
    section = completed({"engine": CHANGES["engine"], "model": section})["model"]
    return tiny_config(Path(data), Path(root), {**CHANGES, "model": section, **changes})


def of_family(family: str) -> dict[str, Any]:
    """Returns the section `model` of a tiny model of a family with random weights."""
    return {"family": family, "fields": FAMILIES[family]}
