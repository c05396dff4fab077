"""Tiny folders of models that read pictures, and rows of conversations with pictures of many sizes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.banked import ERNIE
from tests.support.chat_folders import KINDS, text
from tests.support.dense import LLAVA

MARKS = ("<|image|>", "<|video|>", "<|image_start|>", "<|image_end|>")
TEMPLATE = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endgeneration %}
{%- elif message.content is string %}{{ message.content + '<|im_end|>\\n' }}
{%- else %}{% for part in message.content %}{% if part.type == 'image' %}<|image_start|><|image|><|image_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
_TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT |= {"head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_TEXT |= {"rope_parameters": _ROPE, "max_position_embeddings": 512, "vocab_size": 512}
_VISION: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
QWEN: dict[str, Any] = {
    "text_config": _TEXT,
    "vision_config": _VISION | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
_GLM = {name: each for name, each in _TEXT.items() if name not in ("num_experts", "rope_parameters")}
_GLM |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
_GLM |= {"rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}}
GLM: dict[str, Any] = {"text_config": _GLM, "vision_config": _VISION | {"out_hidden_size": 32, "image_size": 16}}
FAMILIES = {
    "qwen3_vl_moe": (QWEN, "Qwen2VLImageProcessor", {"temporal_patch_size": 2}),
    "ernie4_5_vl_moe": (ERNIE, "Ernie4_5_VLMoeImageProcessor", {"temporal_patch_size": 1}),
    "llava": (LLAVA, "CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
    "glm4v_moe": (GLM, "Glm4vImageProcessor", {"temporal_patch_size": 2}),
}


def picture_folder(folder: Path, family: str, *, weights: bool = True) -> Path:
    """Saves a tiny model with a tokenizer, a chat template and an image processor."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast

    fields, processor, more = FAMILIES[family]
    lines = [text(np.random.default_rng(seed), 12) for seed in range(200)]
    backend = KINDS["chatml"][0]([*KINDS["chatml"][1], *MARKS], lines)
    special: dict[str, Any] = {"unk_token": "<pad>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    image, video, begin, end = (backend.token_to_id(mark) for mark in MARKS)
    ids = {"image_token_id": image, "video_token_id": video}
    marks = ("vision", "vision") if family == "qwen3_vl_moe" else ("image", "image")
    ids |= {f"{marks[0]}_start_token_id": begin, f"{marks[1]}_end_token_id": end}
    ids = {"image_token_index": image} if family == "llava" else ids
    vision = {**fields["vision_config"]}
    of_text = {**fields["text_config"], "vocab_size": 512, "max_position_embeddings": 512}
    given = {**fields, **ids, "text_config": of_text, "vision_config": vision, "tie_word_embeddings": False}
    if family not in ("qwen3_vl_moe", "llava"):
        given |= {"video_start_token_id": video, "video_end_token_id": video}
    config = CONFIG_MAPPING[family](**given)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    if weights:
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    values = {"image_processor_type": processor, "patch_size": 4, "merge_size": 2, "size": size, **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def picture(rng: np.random.Generator, kind: str = "PNG") -> bytes:
    """Returns a file of 8 to 60 pixels a side."""
    height, width = rng.integers(8, 61, 2).tolist()
    mode = ["RGB", "RGBA", "L", "P"][int(rng.integers(4))] if kind == "PNG" else "RGB"
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def rows(folder: Path, count: int, seed: int = 0) -> tuple[Path, list[dict[str, Any]]]:
    """Writes conversations with 0 to 3 pictures in three forms of rows, and the pictures. Returns the JSONL file, and each
    conversation in the form that transformers reads, with paths."""
    rng, lines, plain = np.random.default_rng(seed), [], []
    (folder / "pictures").mkdir(parents=True)
    for number in range(count):
        names = []
        for each in range(int(rng.integers(0, 4))):
            kind = ["PNG", "JPEG", "WEBP"][int(rng.integers(3))]
            names.append(f"pictures/{number}-{each}.{kind.lower()}")
            (folder / names[-1]).write_bytes(picture(rng, kind))
        question, answer, again, more = (text(rng, 6) for _ in range(4))
        last = [{"role": "user", "content": again}, {"role": "assistant", "content": more}] if number % 2 else []
        own = [{"type": "image", "path": str(folder / name)} for name in names]
        plain.append([_user([*own, {"type": "text", "text": question}]), {"role": "assistant", "content": answer}, *last])
        form = number % 3
        if form == 0:
            parts = [{"type": "image", ["image", "path", "url"][number % 3 - 1]: name} for name in names]
            messages = [_user([*parts, {"type": "text", "text": question}]), *plain[-1][1:]]
            lines.append({"messages": messages})
        elif form == 1:
            parts = [{"type": "image"} for _ in names]
            messages = [_user([*parts, {"type": "text", "text": question}]), *plain[-1][1:]]
            lines.append({"messages": messages, "images": names})
        else:
            turns = [{"from": "human", "value": "<image>\n" * len(names) + question}, {"from": "gpt", "value": answer}]
            turns += [{"from": "human" if each["role"] == "user" else "gpt", "value": each["content"]} for each in last]
            lines.append({"image": names if len(names) != 1 else names[0], "conversations": turns})
            plain[-1][0]["content"][-1]["text"] = question.strip("\n") if names else question
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, plain


def _user(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": parts}


def shards(folder: Path, file: Path, count: int, *, in_order: bool = False) -> Path:
    """Writes the rows of a JSONL file, and their pictures, as `count` shards of WebDataset: in turn, or in order."""
    folder.mkdir()
    lines = file.read_text().splitlines()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            ends = len(lines) * shard // count, len(lines) * (shard + 1) // count
            for number in range(*ends) if in_order else range(shard, len(lines), count):
                row = json.loads(lines[number])
                names = sorted((file.parent / "pictures").glob(f"{number}-*"))
                files = {f"{number:05}.{name.name.partition('-')[2]}": name.read_bytes() for name in names}
                messages = json.loads(json.dumps(row).replace(f"pictures/{number}-", f"{number:05}."))
                for name, content in {f"{number:05}.json": json.dumps(messages).encode(), **files}.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder
