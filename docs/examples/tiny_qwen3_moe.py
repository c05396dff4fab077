"""Makes a tiny Qwen3-MoE with random weights and a tokenizer of bytes, and some conversations:

python docs/examples/tiny_qwen3_moe.py tiny chats.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

folder, chats = sys.argv[1:]
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
raw = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
tokenizer.chat_template = (
    "{% for each in messages %}<|im_start|>{{ each.role }}\n{{ each.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
tokenizer.save_pretrained(folder)

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # pyright: ignore[reportCallIssue]
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
Qwen3MoeForCausalLM(config).save_pretrained(folder)

with Path(chats).open("w") as file:
    for a in range(64):
        answer = {"role": "assistant", "content": f"{a} + 7 = {a + 7}"}
        file.write(json.dumps({"messages": [{"role": "user", "content": f"What is {a} plus 7?"}, answer]}) + "\n")
