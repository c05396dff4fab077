"""Made-up samples for router tuning, in the format of `moe-dist prepare-router-tuning`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.checkpoint.base import content_hash
from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.formats.tuning_manifest import TuningManifest
from moe_dist.train.router_tuning.samples import Scored, TuningSample, write_samples

WIDTH = 6


def _choices(answer: int, number: int, ids: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Returns the first tokens of the answer and of one to three wrong choices. Every seventh sample has -1, because there
    the first tokens do not tell the choices apart."""
    others = rng.choice(np.setdiff1d(np.arange(*ids), [answer]), rng.integers(1, 4), replace=False)
    return np.array([-1] if number % 7 == 6 else [answer, *others])


def made_samples(
    out: Path,
    *,
    ids: tuple[int, int],
    layers: Sequence[int],
    columns: int,
    model: Mapping[str, Any],
    base: Path | None = None,
    count: int = 20,
    right: int = 12,
    longest: int = 9,
    seed: int = 0,
    choices: bool = True,
    told: bool = True,
    **changes: Any,
) -> Path:
    """Returns a folder of `count` samples with random tokens, embeddings of norm 1 and routing, of which `right`
    samples are successful.

    Args:
        model: The run's section `model` as JSON.
        base: A run or checkpoint that the manifest names as the base.
        longest: Largest number of tokens of a prompt. Answers have 1 to 3 tokens.
        choices: Whether the folder has choices. Folders of older versions have none.
        told: Whether first tokens tell the choices apart, except in every seventh sample.
        changes: Values of the manifest that differ from the defaults.
    """
    rng = np.random.default_rng(seed)
    choice_rng = np.random.default_rng([seed, 1])
    samples = [
        TuningSample(rng.integers(*ids, rng.integers(2, longest + 1)), rng.integers(*ids, rng.integers(1, 4)))
        for _ in range(count)
    ]
    if choices:
        samples = [
            replace(each, choices=_choices(int(each.answer[0]), number if told else 6, ids, choice_rng))
            for number, each in enumerate(samples)
        ]
    scored = [
        Scored("made-up", str(number), f"question {number}", sample, number % count < right)
        for number, sample in enumerate(samples)
    ]
    embeddings = rng.normal(size=(count, WIDTH)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    routing = np.exp(rng.normal(size=(count, len(layers), columns)))
    routing /= routing.sum(-1, keepdims=True)
    values: dict[str, Any] = {
        "checkpoint": "0" * 64 if base is None else content_hash(open_checkpoint(find_checkpoint(base)).index),
        "run": "runs/base",
        "step": 0,
        "model": dict(model),
        "tokenizer": "0" * 64,
        "embedder": "ab" * 32,
        "embedder_name": "made up",
        "layers": tuple(layers),
        "options": {},
        **dict.fromkeys(("samples", "right", "longest", "columns", "width"), 0),
        "tasks": {},
        "digests": {},
    }
    write_samples(out, scored, embeddings, routing, TuningManifest(**{**values, **changes}))
    return out
