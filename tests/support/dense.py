"""Tiny dense models of transformers, and sections `model` that give them experts."""

from pathlib import Path
from typing import Any

from tests.support.tiny import IMAGE_IDS

_COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON |= {"vocab_size": IMAGE_IDS[1], "max_position_embeddings": 64, "intermediate_size": 16}
_VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 4, "latent_channels": 4}
_VQ |= {"num_embeddings": IMAGE_IDS[1] - IMAGE_IDS[0], "resolution": 16, "attn_resolutions": []}
FIELDS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "chameleon": {
        **_COMMON,
        "vq_config": _VQ,
        "vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + n)}Z": id_ for n, id_ in enumerate(range(*IMAGE_IDS))}},
    },
}
_CLIP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 16}
LLAVA = {"text_config": {"model_type": "llama", **_COMMON}, "vision_config": _CLIP, "image_seq_length": 16}
PICTURED = ("chameleon", "llava")  # families without a text-only model
PINNED: dict[str, Any] = {
    "parallel.ep": 4,
    "placement": {"policy": "pinned", "groups": {"text": {"ranks": [0, 1, 2]}, "image": {"ranks": [3]}}},
}


def dense_folder(family: str, folder: Path, seed: int = 0) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if family in PICTURED else AutoModelForCausalLM
    torch.manual_seed(seed)
    auto.from_config(CONFIG_MAPPING[family](**FIELDS[family])).save_pretrained(folder)


def moma(folder: Path, text: int = 3, image: int = 5) -> dict[str, Any]:
    """Returns a tiny Chameleon whose FFNs become `text` experts of text and `image` experts of pictures."""
    dense_folder("chameleon", folder)
    groups = {"text": {"num_experts": text}, "image": {"num_experts": image}}
    return {"folder": str(folder), "moe": {"groups": groups}}


def copies(folder: Path) -> dict[str, Any]:
    """Returns a tiny Llama whose FFNs become eight experts, of which a token takes two."""
    dense_folder("llama", folder)
    return {"folder": str(folder), "moe": {"groups": {"experts": {"num_experts": 8, "top_k": 2, **_BOTH}}}}


def mole(folder: Path, num_experts: int = 8) -> dict[str, Any]:
    """Returns a tiny Llama with LoRA experts on its frozen FFNs."""
    dense_folder("llama", folder)
    experts = {"kind": "sharded_lora", "rank": 2, "alpha": 4.0, "weight": "straight_through"}
    return {
        "folder": str(folder),
        "moe": {"experts": experts, "groups": {"experts": {"num_experts": num_experts, **_BOTH}}},
    }


_BOTH = {"modalities": ["text", "image"]}
MODELS = {"moma": moma, "copies": copies, "mole": mole}
