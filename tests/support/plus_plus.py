"""A model in the published form of null, copy and constant experts, which no class of transformers has."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.reference.plus_plus import PlusPlusBlock


def their_model(folder: Path) -> Any:
    """Returns transformers' Qwen3-MoE with the reference's blocks, in fp32 and evaluation mode."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    tensors = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    plain = {name: each for name, each in config.items() if not name.startswith(("zce_", "use_zce", "model_type"))}
    model: Any = transformers.Qwen3MoeForCausalLM._from_config(
        transformers.Qwen3MoeConfig(**plain), attn_implementation="eager", dtype=torch.float32
    )
    told = model.load_state_dict({n: t for n, t in tensors.items() if ".mlp." not in n}, strict=False)
    assert not told.unexpected_keys
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.mlp."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        layer.mlp = PlusPlusBlock(config, own)
    return model.eval()
