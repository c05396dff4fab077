"""Finds the families of the installed transformers, and makes a tiny configuration of each from its own defaults."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import transformers

MARK = "use_experts_implementation"
HIDDEN, HEAD, EXPERTS, CHOICES, VOCAB = 32, 16, 8, 2, 256

# The first pattern that matches a whole field name gives its value. Other fields keep the family's default.
SIZES = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    r"(unpadded_)?vocab_size(_per_layer_input)?|max_position_embeddings|model_max_length": VOCAB,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts": CHOICES,
    r"\w*jitter\w*|\w*dropout\w*|\w*drop_path\w*": 0.0,
    r"num_(mtp|nextn_predict)_layers": 0,
    r"topk_group|(moe_|n_|num_|moe_num_)?shared_experts|first_k_dense_replace|num_dense_layers": 1,
    r"n_group|num_expert_group|num_hidden_layers|depth|encoder_layers|n_layers|(mamba_)?n_groups": 2,
    r"(swa_)?num_key_value_heads|linear_num_key_heads|index_n_heads": 2,
    r"(swa_)?num_attention_heads|num_heads|encoder_attention_heads|linear_num_(value_)?heads": 4,
    r"qk_(rope|nope)_head_dim|linear_(key_|value_)?head_dim|mamba_(d_state|n(um)?_heads|d?_?head(_dim)?|dt_rank)": 8,
    r"ssm_state_size|sliding_window(_size)?": 8,
    r"(q|kv|o)_lora_rank|router_hidden_size|moe_latent_size|(mamba_)?chunk_size|block_size|num_position_embeddings": 16,
    r"(global_|swa_|v_|swa_v_)?head_dim|index_head_dim": HEAD,
    r"moe_intermediate_size|(moe_)?shared_experts?_intermediate_size": 24,
    r"\w*intermediate_size|\w*ffn_dim|mlp_dim": 48,
    r"\w*hidden_size|d_model|out(put)?_(hidden_size|dim|proj_dims)|adapter_out_dim": HIDDEN,
    r"index_topk|image_size": 64,  # the indexer chooses all keys, so a picture behind the text is harmless
}


@dataclass(frozen=True)
class Family:
    """A class of experts, and the model class that is tested with it.

    Attributes:
        name: Folder of the family below transformers/models.
        experts, model: Class names.
    """

    name: str
    experts: str
    model: str

    @property
    def key(self) -> str:
        return f"{self.name}.{self.experts}"

    def model_class(self) -> Any:
        return getattr(importlib.import_module(f"transformers.models.{self.name}.modeling_{self.name}"), self.model)


def families() -> list[Family]:
    """Returns each class that the installed transformers marks with the experts interface."""
    files = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    return [each for file in files for each in _of(file)]


def _of(file: Path) -> Iterator[Family]:
    text = file.read_text()
    if MARK not in text:
        return
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    tops = [node.name for node in classes if re.search(r"For[A-Z]\w+$", node.name)]
    for node in classes:
        if any(MARK in ast.unparse(each) for each in node.decorator_list):
            yield Family(file.parent.name, node.name, min(tops, key=lambda top, name=node.name: _far(name, top)))


def _far(experts: str, top: str) -> tuple[bool, bool, int, int]:
    """A sort key for model classes: multimodal models first, then models whose name is most like the experts' class."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(experts, top, strict=False)))
    return "ConditionalGeneration" not in top, not re.search("For(CausalLM|Block|Token)", top), -shared, len(top)


def tiny_config(family: Family) -> Any:
    """Returns the family's configuration with few and small layers. It keeps one layer of each kind."""
    make = family.model_class().config_class
    return _tiny(make())


def _tiny(default: Any) -> Any:
    values: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is None and name == "vision_config":
            part = default.sub_configs[name]()
        if part is not None:
            values[name] = _tiny(part)
    names = [each.name for each in fields(default) if each.name not in default.sub_configs]
    for name in names:
        size = next((new for pattern, new in SIZES.items() if re.fullmatch(pattern, name)), None)
        if size is not None and default.__dict__.get(name) is not None:
            values[name] = size
    values |= _marks(default, names)
    values |= _layers(default, names)
    if "kv_lora_rank" in names:  # latent attention has one key head per query head
        values["num_key_value_heads"] = 4
    values |= EXCEPTIONS.get(default.model_type or type(default).__name__, {})
    return type(default)(**values)


def _marks(default: Any, names: list[str]) -> dict[str, int]:
    """Returns ids within the tiny vocabulary for the tokens that stand for pictures, videos and audio."""
    found = [name for name in names if re.search(r"_token_(id|index)$", name) and not re.match("pad|bos|eos", name)]
    return {name: 200 + at for at, name in enumerate(sorted(found))}


def _layers(default: Any, names: list[str]) -> dict[str, Any]:
    """Returns a smaller number of layers, and the shortened per-layer lists. One layer of each kind stays."""
    number = next((n for n in ("num_hidden_layers", "depth") if n in names), None)
    if number is None:
        return {}
    total = getattr(default, number)
    lists = {name: default.__dict__.get(name) for name in names}
    lists = {name: each for name, each in lists.items() if isinstance(each, list) and len(each) == total}
    kept = {each.index(kind) for each in lists.values() if isinstance(each[0], str) for kind in each}
    kept |= {each for each in (total - 1, total - 2) if len(kept) < 2}
    return {number: len(kept)} | {name: [each[at] for at in sorted(kept)] for name, each in lists.items()}


# Values that SIZES does not give, by model_type, or by class name for a configuration without model_type.
HYBRID = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERT_SIZES = {"num_experts_per_tok": CHOICES, "n_routed_experts": EXPERTS}
GEMMA = {"num_experts": EXPERTS, "top_k_experts": CHOICES, "moe_intermediate_size": 24, "enable_moe_block": True}
GEMMA |= {"global_head_dim": HEAD, "hidden_size_per_layer_input": 0}
SLIDING = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16}
SLIDING |= {"qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 64, "compress_ratio": 4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "deepseek_ocr2_text": EXPERT_SIZES | {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_sam_vision_model": {"global_attn_indexes": [1], "downsample_channels": [32, 32], "image_size": 768},
    "deepseek_v2": EXPERT_SIZES,
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": GEMMA,
    "dots1": EXPERT_SIZES | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "downsample_hidden_size": 8},
    "dots3_note_text": {f"swa_{name}": size for name, size in SLIDING.items()},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4], "num_hidden_layers": 2, "adapter_in_dim": HIDDEN},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 16], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": GEMMA,
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 16},
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": HYBRID, "num_hidden_layers": 2, "mamba_n_groups": 1},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hy_v4_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "muse_spark": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1]},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "qwen4_exp_text": {f"indexer_{name}": size for name, size in INDEXER.items()},
    "unlimited_ocr_sam_vision_model": {"global_attn_indexes": [1], "downsample_channels": [32, 32]},
    "zaya": {"num_experts_per_tok": 1},
}
