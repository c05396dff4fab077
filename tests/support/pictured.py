"""A small user's data set with pictures, captions, texts, tokenizer and codebook, and a run on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from moe_dist.data.corpus import Recipe
from moe_dist.data.prepare import Inputs, prepare
from tests.support.one_rank import OneRank, world_of_one

VOCAB = 300 + 16


def pictured_data(folder: Path) -> Path:
    """Prepares 24 pictures with captions like 'odd picture 7', and 30 texts, in a folder below `folder`."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        image = Image.new("RGBA", (48, 48))
        for _ in range(4):
            x, y = rng.integers(0, 36, 2).tolist()
            ImageDraw.Draw(image).ellipse((x, y, x + 14, y + 14), fill=(*rng.integers(0, 256, 3).tolist(), 255))
        image.save(folder / f"pictures/{number:02}.png")
        (folder / f"pictures/{number:02}.txt").write_text(f"{'odd' if number % 2 else 'even'} picture {number}")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"text {number} " * 3}) for number in range(30)))
    recipe = Recipe(renders=2, heldout_renders=2, codes=16, vocab_size=300, val_fraction=0.25)
    inputs = Inputs(text=str(folder / "texts.jsonl"), images=str(folder / "pictures"), licence="CC0-1.0")
    prepare(folder / "data", inputs, recipe, lambda *_: None)
    return folder / "data"


def pictured_run(
    data: Path, root: Path, *, max_seq_len: int = 96, begin: Callable[[OneRank], None] | None = None, **changes: Any
) -> Path:
    """Returns the folder of a run that took two steps with made-up gradients. It has mixture of depths unless `changes`
    (of `OneRank`) turn it off. `begin` may change the model before the steps."""
    options: dict[str, Any] = {
        "model__vocab_size": VOCAB,
        "model__max_seq_len": max_seq_len,
        "data__seq_len": 96,
        "model__mixture_of_depths": {"capacity": 0.5},
        "model__moe__groups": {
            name: {"num_experts": 2, "num_null": 1, "top_k": 2, "ffn_dim": 8} for name in ("text", "image")
        },
        **changes,
    }
    with world_of_one():
        made = OneRank(data, root, **options)
        if begin is not None:
            begin(made)
        made.train_and_save()
    return made.folder.parent
