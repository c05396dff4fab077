"""Tiny models of Hugging Face's families with random weights, made and saved by transformers.

python -m tests.support.tiny_hf mixtral OUT [--vocab-size 512] [--tokenizer tokenizer.json] [--dtype bfloat16]
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

HIDDEN_DIM, LENGTH, VOCAB = 32, 12, 64


def draw(module: nn.Module, seed: int) -> None:
    """Draws weights of order 1, because a fresh model's weights would leave logits and gradients near 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor.normal_(1.0, 0.1)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.05)
            elif not name.endswith("inv_freq"):
                tensor.normal_(0.0, 0.2)
        for experts in module.modules():  # transformers never uses these rows, and an import leaves them out
            if hasattr(experts, "zero_expert_num") and hasattr(experts, "gate_up_proj"):
                experts.gate_up_proj[experts.num_routed_experts :] = 0.0  # pyright: ignore


def tiny_config(kind: str, **changes: Any) -> Any:
    """Returns transformers' configuration of a family, or of a variant of it."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN_DIM, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    sparse = {"num_experts": 8, "num_experts_per_tok": 3}
    qwen = {**shape, **sparse, "moe_intermediate_size": 24, "intermediate_size": 20}
    qwen2, qwen3 = {**qwen, "shared_expert_intermediate_size": 28}, {**qwen, "head_dim": 16}
    experts8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"rope_theta": 1e4, "original_max_position_embeddings": 8}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    biased = {"num_hidden_layers": 3, "moe_intermediate_size": 24, "intermediate_size": 20}
    ernie = {**shape, **biased, "moe_num_experts": 8, "moe_k": 3, "tie_word_embeddings": False}
    glm = {**shape, **biased, "n_routed_experts": 8, "num_experts_per_tok": 3}
    deepseek = {**glm, "num_key_value_heads": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    deepseek |= {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    longcat = {**shape, "num_layers": 2, "num_key_value_heads": 4, "ffn_hidden_size": 20, "expert_ffn_hidden_size": 24}
    longcat |= {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 4, "q_lora_rank": 20, "kv_lora_rank": 12}
    longcat |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 6}
    del longcat["num_hidden_layers"]
    scaled = {**yarn, "mscale": 0.7, "mscale_all_dim": 1.3}
    families = {  # each has a class, and the values that all its variants share
        "gpt_oss": (transformers.GptOssConfig, {**shape, **experts8, "intermediate_size": 24, "head_dim": 8}),
        "longcat_flash": (transformers.LongcatFlashConfig, longcat),
        "deepseek_v3": (transformers.DeepseekV3Config, deepseek),
        "ernie4_5_moe": (transformers.Ernie4_5_MoeConfig, ernie),
        "glm4_moe": (transformers.Glm4MoeConfig, glm),
        "mixtral": (transformers.MixtralConfig, {**shape, **experts8, "intermediate_size": 24}),
        "olmoe": (transformers.OlmoeConfig, {**shape, **sparse, "intermediate_size": 24}),
        "qwen3_moe": (transformers.Qwen3MoeConfig, qwen3),
        "qwen2_moe": (transformers.Qwen2MoeConfig, qwen2),
        "llama": (transformers.LlamaConfig, {**shape, "intermediate_size": 40}),
        "smollm2": (transformers.LlamaConfig, {}),
    }
    more: dict[str, dict[str, Any]] = {
        "gpt_oss": {"sliding_window": 4, "swiglu_limit": 1.5, "rope_parameters": {**yarn, "truncate": False}},
        "gpt_oss plain": {
            "attention_bias": False, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "longcat_flash": {"routed_scaling_factor": 1.5},
        "longcat_flash scaled": {
            "num_layers": 1, "zero_expert_num": 0, "v_head_dim": 8, "tie_word_embeddings": True, "rope_parameters": scaled,
        },
        "deepseek_v3": {"rope_parameters": scaled},
        "deepseek_v3 plain": {
            "q_lora_rank": None, "qk_rope_head_dim": 6, "rope_interleave": False, "norm_topk_prob": False, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 2, "tie_word_embeddings": True,
        },
        "ernie4_5_moe tied": {
            "num_hidden_layers": 4, "moe_layer_interval": 2, "moe_num_shared_experts": 0, "tie_word_embeddings": True,
            "head_dim": 12, "rope_parameters": yarn,
        },
        "glm4_moe": {
            "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "use_qk_norm": True, "attention_bias": True,
            "head_dim": 16,
        },
        "glm4_moe plain": {
            "n_shared_experts": 2, "norm_topk_prob": False, "first_k_dense_replace": 2, "num_mtp_layers": 0,
            "rope_parameters": {**llama3, "partial_rotary_factor": 0.75},
        },
        "mixtral sliding": {"sliding_window": 4, "head_dim": 8, "rope_parameters": yarn},
        "olmoe dynamic": {  # LENGTH exceeds the original maximum length
            "max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
        "olmoe biased": {"attention_bias": True, "norm_topk_prob": True},
        "qwen3_moe": {"norm_topk_prob": True},
        "qwen3_moe sliding": {
            "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 5,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
        "qwen3_moe tied": {"norm_topk_prob": False, "tie_word_embeddings": True, "decoder_sparse_step": 2},
        "qwen2_moe sliding": {
            "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
        },
        "qwen2_moe dense": {"mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False},
        "llama scaled": {"rope_parameters": llama3},
        "llama biased": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 12},
        "smollm2": {  # the shape of SmolLM2-135M, by its model card and config.json
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    }  # fmt: skip
    make, values = families[kind.partition(" ")[0]]
    return make(**{**values, **more.get(kind, {}), **changes})


def tiny_model(kind: str, *, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Returns a model of `tiny_config` with drawn weights."""
    import transformers

    config = tiny_config(kind, **changes)
    experts = {} if config.model_type == "llama" else {"experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32, **experts
    )
    draw(model, seed)
    return model.to(dtype)


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Saves with `save_pretrained`. Returns the folder."""
    model.save_pretrained(folder, **options)  # pyright: ignore[reportCallIssue]
    return folder


def main(
    kind: Annotated[str, typer.Argument(help="A family, or a family and a variant: see `tiny_config`.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    vocab_size: Annotated[int, typer.Option(min=1)] = VOCAB,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to put beside the weights.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Make a tiny model."""
    if out.exists():
        raise typer.BadParameter(f"{out} exists")
    model = tiny_model(kind, vocab_size=vocab_size, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    save(model, out)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / "tokenizer.json")


if __name__ == "__main__":
    typer.run(main)
