"""Writes subsets of a folder of router-tuning samples. The subsets are the same for all arms. Each subset is contained in
all larger subsets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.tuning_manifest import TuningManifest
from moe_dist.inference.questions.split import uniform
from moe_dist.train.router_tuning.samples import Samples, Scored, write_samples


def make_subsets(folder: Path, sizes: Sequence[int], *, labelled: bool = False) -> dict[str, dict[str, Any]]:
    """Writes a folder FOLDER-SIZE for each size, beside the folder of all samples. Keeps existing folders. Returns for each
    size the folder's path, number of samples and number of right answers.

    Args:
        labelled: Whether to use only samples with a label for `router_tuning.objective: choices`.

    Raises:
        ConfigError: the folder has fewer samples than a size.
        DataError: an existing folder was made from different samples.
    """
    samples = Samples(folder)
    order = [number for number in _dealt(_questions(folder)) if not labelled or samples.sample(number).choices[0] >= 0]
    if sizes and max(sizes) > len(order):
        which = "with a first token of their own" if labelled else "in all"
        raise ConfigError(
            f"measure.questions.sizes={list(sizes)}: {folder} has {len(order)} samples {which}; raise left, or take more "
            "tasks"
        )
    found = {}
    for size in sizes:
        out = folder.with_name(f"{folder.name}-{size}")
        manifest = Samples(out).manifest if out.is_dir() else _write(out, folder, samples, sorted(order[:size]))
        if manifest.samples != size or manifest.checkpoint != samples.manifest.checkpoint:
            raise DataError(f"{out}: was made from other samples than {folder}; remove it, and start again")
        found[str(size)] = {"folder": str(out), "samples": manifest.samples, "right": manifest.right}
    return found


def _questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def _dealt(questions: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the indices of all samples. The order is such that each prefix has about equally many samples of each task.
    Within a task, the order depends only on the ids of the questions, not on the answers of the model."""
    by_task: dict[str, list[int]] = {}
    for number in sorted(range(len(questions)), key=lambda number: uniform("subset", questions[number]["id"])):
        by_task.setdefault(questions[number]["task"], []).append(number)
    turns = [(turn, task, number) for task, of_task in by_task.items() for turn, number in enumerate(of_task)]
    return [number for _, _, number in sorted(turns)]


def _write(out: Path, folder: Path, samples: Samples, numbers: Sequence[int]) -> TuningManifest:
    lines = _questions(folder)
    scored = [
        Scored(line["task"], line["id"], line["text"], samples.sample(number), line["right"])
        for number, line in ((number, lines[number]) for number in numbers)
    ]
    rows = np.array(numbers, np.int64)
    return write_samples(out, scored, samples.embeddings_SE[rows], samples.routing_SLC[rows], samples.manifest)
