"""Stops at random steps, and goes on with other ranks, threads and shards: the same sequence of samples."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data.corpus import Recipe
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.loader import ReadAhead, TrainLoader
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.formats.manifest import load_manifest
from tests.support.cover import exhaustive
from tests.support.picture_chats import picture_folder, rows, shards

COUNT, BATCH, EPOCHS = 60, 8, 2
Sample = tuple[tuple[int, ...], bytes]  # token ids, and pixels


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same conversations from one JSONL, and from 1, 4 and 7 shards that have them in order."""
    home = tmp_path_factory.mktemp("streams")
    folder, (file, _) = picture_folder(home / "model", "qwen3_vl_moe", weights=False), rows(home / "rows", COUNT)
    found = []
    for count in (0, 1, 4, 7):
        source = shards(home / f"shards{count}", file, count, in_order=True) if count else file
        recipe = Recipe(tokenizer=str(folder), val_fraction=0.0)
        prepare(home / f"data{count}", Inputs(messages=str(source)), recipe, lambda *_: None)
        found.append(home / f"data{count}")
    return found


def loaders(data: Path, ranks: int, micro_batch: int, threads: int) -> list[TrainLoader]:
    options: dict[str, Any] = {"seq_len": 192, "weights": {}, "pack_window": 16, "seed": 5, "global_batch": BATCH}
    options |= {"micro_batch": micro_batch, "world_size": ranks, "most_patches": 300}
    made: list[Any] = [TrainLoader(data, load_manifest(data), rank=rank, **options) for rank in range(ranks)]
    for each in made:
        each._maker._threads = ThreadPoolExecutor(threads)
    return made


def samples(batch: Any) -> list[Sample]:
    """Returns each sequence of a batch with the pixels of its pictures: four patches for a placeholder."""
    placeholders_B = (batch.tokens_BS == 3).sum(1).tolist()
    pixels = batch.family_inputs().get("pixel_values")
    parts = pixels.split([4 * each for each in placeholders_B]) if pixels is not None else [None] * len(placeholders_B)
    assert pixels is None or len(pixels) == 4 * sum(placeholders_B)
    tokens = [tuple(each) for each in batch.tokens_BS.tolist()]
    return [(row, b"" if part is None else part.numpy().tobytes()) for row, part in zip(tokens, parts, strict=True)]


def step(ranks: list[list[Any]]) -> list[Sample]:
    """Returns the samples of a step of all ranks, in the order of the stream."""
    return [sample for micro in zip(*ranks, strict=True) for batch in micro for sample in samples(batch)]


@pytest.mark.parametrize("stops", [20, exhaustive(1000)])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_sample_is_lost_or_repeated(sets: list[Path], stops: int) -> None:
    """A stop loses the step that was read ahead."""
    rng = np.random.default_rng(stops)
    (one,) = loaders(sets[0], 1, BATCH, 1)
    steps = -(-EPOCHS * one.sequences_per_epoch["messages"] // BATCH)
    expected = [sample for at in range(steps) for sample in step([one.batches(at * BATCH)])]
    split = IndexedSplit(sets[0], load_manifest(sets[0]).sources["messages"].train)
    whole = [split.tokens(*each).tolist() for each in zip(split.starts_D.tolist(), split.lengths_D.tolist(), strict=True)]
    for epoch in range(EPOCHS):  # the stream has each document once an epoch
        count = one.sequences_per_epoch["messages"]
        pieces = [piece for at in range(count) for piece in one.sequence(epoch * count + at)]
        assert Counter(tuple(each.tokens.tolist()) for each in pieces) == Counter(map(tuple, whole))
    done, found = 0, list[Sample]()
    for _ in range(stops):
        data, ranks = sets[int(rng.integers(len(sets)))], int(2 ** rng.integers(4))
        micro_batch = int(2 ** rng.integers(int(np.log2(BATCH // ranks)) + 1))
        readers = [ReadAhead(each.batches) for each in loaders(data, ranks, micro_batch, int(rng.integers(1, 4)))]
        for _ in range(int(rng.integers(1, 3))):
            if done == steps:
                assert found == expected
                done, found = 0, []
            read = [each.batches(done * BATCH, following=(done + 1) * BATCH) for each in readers]
            found += step(read)
            done += 1
        for each in readers:
            each.settle()
    assert found == expected[: len(found)]
    assert len({json.dumps(load_manifest(each).sources["messages"].train.tokens) for each in sets}) == 1
