"""A data set of a few kilobytes, and the configuration of a run that takes seconds, for tests of whole runs.

A model can learn the data: a caption's word determines the picture, and each text follows a cycle.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_dist.config.schema import Config
from moe_dist.data.indexed import write_indexed
from moe_dist.formats.manifest import ImageSection, Manifest, SourceSection, SplitSection, write_manifest

PAD, EOS, BEGIN_IMAGE, END_IMAGE = 0, 1, 2, 3
TEXT_IDS = (0, 48)
IMAGE_IDS = (48, 64)
GRID = (4, 4)
WORDS = np.arange(8, 24)
FILLER_CODE = IMAGE_IDS[0]


def tiny_dataset(folder: Path, seed: int = 0, *, documents: int = 96) -> Manifest:
    """Writes a prepared data set into `folder`, with a bit per token that marks the filler codes of pictures.

    Its sources are `captions` (text and image) and `prose` (text), each with a training and a held-out split.

    Args:
        documents: Training documents of each source; a third as many are held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sources: dict[str, SourceSection] = {}
    for name, draw in (("captions", _captions), ("prose", _prose)):
        train = _write_split(folder, f"{name}_train", draw(rng, documents))
        valid = _write_split(folder, f"{name}_valid", draw(rng, documents // 3))
        sources[name] = SourceSection(train=train, valid=valid, licence="CC0-1.0")
    text, image = float(np.log(TEXT_IDS[1])), float(np.log(IMAGE_IDS[1] - IMAGE_IDS[0]))
    manifest = Manifest(
        name="tiny",
        vocab_size=IMAGE_IDS[1],
        modalities={"text": (TEXT_IDS,), "image": (IMAGE_IDS,)},
        pad_id=PAD,
        eos_id=EOS,
        image=ImageSection(grid=GRID, begin_id=BEGIN_IMAGE, end_id=END_IMAGE),
        sources=sources,
        baselines={
            "text/unigram": text,
            "image/unigram": image,
            "image/left_bigram": image,
            "image_no_filler/unigram": image,
        },
    )
    write_manifest(manifest, folder)
    return manifest


def tiny_config(data: Path, root: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Returns the configuration of a run of 4 steps on 2 ranks with pinned groups and null experts.

    Args:
        data: Folder of `tiny_dataset`.
        root: Folder of the runs; the run is called 'tiny'.
        changes: New values by dotted key, such as `{"train.steps": 6}`.
    """
    values: dict[str, Any] = {
        "run": {"name": "tiny", "root": str(root), "seed": 0},
        "model": {
            "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": IMAGE_IDS[1],
            "max_seq_len": 64,
            "moe": {
                "groups": {
                    "text": {"num_experts": 3, "num_null": 1, "top_k": 2, "ffn_dim": 16},
                    "image": {"num_experts": 2, "num_null": 2, "top_k": 2, "ffn_dim": 24},
                }
            },
        },
        "data": {"path": str(data), "seq_len": 64, "pack_window": 16},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        "optimizer": {"lr": 3e-3, "schedule": {"kind": "constant", "warmup_steps": 2}},
        "parallel": {"ep": 2, "device": "cpu", "timeout_seconds": 60.0},
        "placement": {"policy": "pinned"},
        "evaluation": {"every": 2, "sequences": 4, "final_sequences": 8},
        "checkpoint": {"every": 2},
        "monitor": {"sinks": [{"kind": "console", "every": 1}, {"kind": "jsonl"}]},
    }  # fmt: skip
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return Config.model_validate_json(json.dumps(values))


def write_config(config: Config, path: Path) -> Path:
    """Writes a configuration as a user's YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return path


def _captions(rng: np.random.Generator, documents: int) -> Iterator[np.ndarray]:
    """Yields word word BEGIN 16 codes END EOS. The first word determines the inner codes; the border is filler."""
    inside = np.zeros(GRID, bool)
    inside[1:, :-1] = True
    for word in rng.choice(WORDS, documents):
        codes = IMAGE_IDS[0] + 1 + (np.arange(inside.size) * (1 + word % 3) + word) % (IMAGE_IDS[1] - IMAGE_IDS[0] - 1)
        codes = np.where(inside.reshape(-1), codes, FILLER_CODE)
        yield np.concatenate([[word, rng.choice(WORDS), BEGIN_IMAGE], codes, [END_IMAGE, EOS]])


def _prose(rng: np.random.Generator, documents: int) -> Iterator[np.ndarray]:
    """Yields documents of 5 to 40 words and EOS. From word to word the id advances by the document's stride."""
    for _ in range(documents):
        start, stride, length = rng.integers(0, 24), rng.integers(1, 4), rng.integers(5, 41)
        yield np.append(24 + (start + stride * np.arange(length)) % 24, EOS)


def _write_split(folder: Path, name: str, documents: Iterator[np.ndarray]) -> SplitSection:
    written = list(documents)
    write_indexed(folder / name, written, vocab_size=IMAGE_IDS[1])
    tokens = np.concatenate(written)
    image = int((tokens >= IMAGE_IDS[0]).sum())
    np.packbits(tokens == FILLER_CODE).tofile(folder / f"{name}.filler")
    return SplitSection(
        path=name,
        documents=len(written),
        tokens=tokens.size,
        tokens_by_modality={"text": tokens.size - image, "image": image},
        filler=f"{name}.filler",
    )
