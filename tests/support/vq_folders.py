"""Tiny folders of models whose VQ model encodes pictures of 32 pixels as 8 x 8 codes."""

import json
from pathlib import Path
from typing import Any

import torch

_VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "embed_dim": 8}
_TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT |= {"num_key_value_heads": 2}
PROCESSORS: dict[str, dict[str, Any]] = {
    "janus": {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "chameleon": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "emu3": {"min_pixels": 1024, "max_pixels": 4096, "spatial_factor": 4},
}


def vq_folder(folder: Path, family: str) -> Path:
    """Saves a model with random weights and its image processor: Janus's VQ model alone, or a whole Chameleon or Emu3."""
    import transformers as hf

    torch.manual_seed(0)
    model: Any
    if family == "janus":
        model = hf.JanusVQVAE(hf.JanusVQVAEConfig(**_VQ, latent_channels=32, num_embeddings=64, num_patches=8))
    elif family == "chameleon":
        names = {f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z": 4 + code for code in range(64)}
        vq = {**_VQ, "latent_channels": 32, "num_embeddings": 64, "resolution": 32}
        config = hf.ChameleonConfig(vocab_size=100, vocabulary_map={**names, "<image>": 80}, vq_config=vq, **_TEXT)
        model = hf.ChameleonForConditionalGeneration(config)
    else:
        names = {f"<|visual token {code:06d}|>": 4 + code for code in range(64)} | {"<image>": 80, "<|extra_200|>": 81}
        vq = {**_VQ, "latent_channels": 8, "codebook_size": 64, "attn_resolutions": [2], "hidden_size": 32}
        text = {**_TEXT, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = hf.Emu3ForConditionalGeneration(hf.Emu3Config(vocabulary_map=names, vq_config=vq, text_config=text))
    model.save_pretrained(folder)
    values = {"image_processor_type": f"{family.capitalize()}ImageProcessor", **PROCESSORS[family]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder
