"""Writes folders of four tiny tokenizers with different chat templates, and makes conversations for them.

python -m tests.support.chat_folders OUT    makes a tiny Mixtral with a tokenizer, and OUT/messages.jsonl with conversations
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = ["the", "a", "cat", "Dog", "runs", "über", "naïve", "東京", "42", "3.14", "(x)", "don't\n", "tab\t", "", "two"]
WORDS += ["'quoted'", "{json}", "émigré", "🙂", "sum", "of"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
        },
    }
]
CHATML = """{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content or '' }}
{%- for call in message.tool_calls %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """{{- bos_token }}
{%- if tools is not none %}{{ '<|start|>system<|end|>\\n\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}<|eot|>{% endif %}
{%- for message in messages %}
{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}
{%- if message.tool_calls is defined %}{{ message.tool_calls[0].function | tojson }}{% endif %}
{{- (message['content'] | trim if message['content'] else '') + '<|eot|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
INSTRUCT = """{{- bos_token }}{% for message in messages %}
{%- if message['role'] == 'assistant' %}{% generation %} {{ message['content'] }}
{%- for call in message.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}
{{- call.function.arguments | tojson }}{% endfor %}
{{- eos_token }}{% endgeneration %}
{%- elif message['role'] == 'tool' %}[TOOL_RESULTS] {{ message.content }}[/TOOL_RESULTS]
{%- else %}[INST] {{ message['content'] }} [/INST]{% endif %}
{%- endfor %}"""
PLAIN = """{% for message in messages %}
{%- if message.role == 'assistant' %}Answer:{% generation %} {{ message.content }}
{%- for call in message.tool_calls %} {{ call.function | tojson }}{% endfor %} [EOS]
{%- endgeneration %}{% else %}{{ message.role | capitalize }}: {{ message.content }} {% endif %}{% endfor %}
{%- if add_generation_prompt %}Answer:{% endif %}"""


def _byte_level(specials: list[str], lines: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _unigram(specials: list[str], lines: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()  # changes lengths, so that offsets before and after it differ
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token=specials[0], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _word_piece(specials: list[str], lines: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=specials[0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # removes white space
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


# For each kind of tokenizer: the function that trains it, its special tokens (unknown, begin, others, end), and its
# template.
KINDS: dict[str, tuple[Callable[[list[str], list[str]], Tokenizer], list[str], str]] = {
    "chatml": (_byte_level, ["<pad>", "<|im_start|>", "<|im_end|>"], CHATML),
    "headers": (_byte_level, ["<pad>", "<|begin|>", "<|start|>", "<|end|>", "<|eot|>"], HEADERS),
    "instruct": (_unigram, ["<unk>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"], INSTRUCT),
    "plain": (_word_piece, ["[UNK]", "[BOS]", "[EOS]"], PLAIN),
}


def chat_folder(folder: Path, kind: str, *, template: str | None = None) -> Path:
    """Saves a tokenizer in transformers' format. `template` replaces the kind's own template."""
    from transformers import PreTrainedTokenizerFast

    train, specials, own = KINDS[kind]
    lines = [text(np.random.default_rng(seed), 12) for seed in range(200)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train(specials, lines), unk_token=specials[0], bos_token=specials[1], eos_token=specials[-1]
    )
    tokenizer.chat_template = own if template is None else template
    tokenizer.save_pretrained(folder)
    return folder


def text(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most + 1)).tolist())


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns rows with one to four turns. Some rows begin with a system message. Some rows have tools, and some rows with
    tools also have calls and results."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"messages": [{"role": "system", "content": text(rng, 4)}] if rng.random() < 0.3 else []}
        if rng.random() < 0.4:
            row["tools"] = TOOLS if number % 2 else json.dumps(TOOLS)
        for _ in range(rng.integers(1, 5)):
            row["messages"].append({"role": "user", "content": f"{number}: {text(rng, 8)}"})
            if "tools" in row and rng.random() < 0.5:
                call = {"type": "function", "function": {"name": "weather", "arguments": {"city": text(rng, 1)}}}
                row["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
                row["messages"].append({"role": "tool", "content": text(rng, 2)})
            row["messages"].append({"role": "assistant", "content": text(rng, 10)})
        rows.append(row)
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def main(out: Path) -> None:
    """Make a tiny Mixtral with random weights and a chat template, and conversations."""
    from transformers import AutoTokenizer

    from tests.support.tiny_hf import save, tiny_model

    save(tiny_model("mixtral", vocab_size=512), out)
    chat_folder(out, "chatml")
    assert len(AutoTokenizer.from_pretrained(out)) <= 512
    write_lines(out / "messages.jsonl", conversations(400))


if __name__ == "__main__":
    typer.run(main)
