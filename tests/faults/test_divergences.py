"""Whole runs that diverge, drawn over causes, engines, places, and the moments of saves: each ends with 70, every
checkpoint that it leaves is finite, and its message says what is there. MOE_DIST_FAULT_SEED=<seed> draws the same runs."""

import os
import random
import re
from itertools import product
from pathlib import Path

import pytest

from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.checkpoint.verify import verify
from moe_dist.errors import DivergedError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.diverging import CAUSES, ENGINES, Divergence, launched
from tests.support.engine_run import config_of
from tests.support.tiny import write_config

SEED = int(os.environ.get("MOE_DIST_FAULT_SEED", random.SystemRandom().randrange(1_000_000)))
DRAWN = [*product(CAUSES, ENGINES)] * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_a_diverged_run_leaves_finite_checkpoints_and_one_true_sentence(
    tiny_data: Path, tmp_path: Path, number: int
) -> None:
    (cause, engine), rng = DRAWN[number], random.Random(f"{SEED} {number}")
    value = rng.choice([float("nan"), float("inf"), -float("inf")])
    divergence = Divergence(cause, rng.randint(2, 9), rng.randrange(1000), value, bad=20)
    changes = {
        "train.steps": 14,
        "train.max_skipped_in_a_row": rng.choice([1, 3, 10]),
        "evaluation.every": rng.choice([3, 14]),
        "evaluation.final_sequences": 4,
        "checkpoint.every": rng.randint(1, 4),
        "checkpoint.keep": rng.randint(1, 2),
        "checkpoint.asynchronous": rng.random() < 0.5,
    }
    print(f"seed {SEED}", divergence, engine, changes)
    config = config_of(tiny_data, tmp_path, changes | ENGINES[engine])
    run, done = RunFolder.of(config), launched(write_config(config, tmp_path / "config.yaml"), divergence)
    assert done.returncode == DivergedError.exit_code, done.stdout[-3000:]
    last = run.read_status().latest
    assert last is not None
    assert last.verdict == DivergedError.exit_code
    sentence = last.reason
    print(sentence)
    assert "\n" not in sentence
    directory = CheckpointDirectory(run.checkpoints)
    newest = directory.latest_step()
    assert [verify(directory.path_of(step))[1] for step in directory.steps()] == [[]] * len(directory.steps())
    good, every = divergence.after - 1, changes["checkpoint.every"]  # a weight is poisoned before the step's save
    if newest < 0:
        assert "no checkpoint was saved" in sentence
        assert good < every
    else:
        assert newest == directory.steps()[-1] >= good - good % every
        assert f"the newest checkpoint {directory.path_of(newest)} is finite" in sentence
    if before := re.search(r"before the first skipped step (\d+)", sentence):
        assert newest < int(before[1])
