"""A run that diverges, for each cause and by either engine: its newest checkpoint is finite and older than the first
skipped step, the message says so, and the ways out that the message offers lead to the end of the run. Many more draws:
tests/faults/test_divergences.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.verify import verify
from tests.support.cover import full_unless
from tests.support.diverging import CAUSES, ENGINES, Divergence, trained

STEPS, GOOD, PATIENCE = 12, 5, 3
CHANGES: dict[str, Any] = {
    "run.name": "diverging",
    "train.steps": STEPS,
    "train.max_skipped_in_a_row": PATIENCE,
    "checkpoint.every": 2,
    "checkpoint.keep": 1,
    "evaluation.every": STEPS,
    "evaluation.sequences": 4,
    "evaluation.final_sequences": 4,
}


@pytest.mark.parametrize(
    ("engine", "cause"),
    full_unless(
        lambda engine, cause: engine == "own" and cause in ("rate", "data", "weight"),
        [(engine, cause) for engine in ENGINES for cause in CAUSES],
    ),
)
def test_a_diverged_run_keeps_a_finite_checkpoint_and_its_ways_out_lead_on(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, engine: str, cause: str
) -> None:
    changes, divergence = CHANGES | ENGINES[engine], Divergence(cause, GOOD, draw=3, bad=PATIENCE)
    first, second = run_in_world(2, trained, str(tiny_data), tmp_path, changes, divergence)
    assert first.newest == second.newest == (6 if cause == "rate" else 4)
    checkpoint = tmp_path / "diverging" / "checkpoints" / f"step_{first.newest}"
    assert verify(checkpoint)[1] == []
    text = next(each.text for each in (first, second) if "see the log of rank" not in each.text)  # of a rank with a cause
    assert f"the newest checkpoint {checkpoint} is finite" in text
    if before := re.search(r"before the first skipped step (\d+)", text):
        assert int(before[1]) == first.step - PATIENCE + 1 > first.newest
    else:
        assert first.skipped == 0
        assert f"step {first.step} is not saved" in text
    way_out = {}
    if cause == "data":
        ((begin, end),) = re.findall(r"data\.skip='\[\[(\d+), (\d+)\]\]'", text)
        assert (int(begin), int(end)) == ((GOOD - 1) * 8, (GOOD + PATIENCE) * 8 - 1)  # of the last good step, too
        way_out = {"data.skip": [[int(begin), int(end)]]}
    elif cause == "rate":  # the checkpoint has the weights that the rate made: another one is gone, as keep=1 says
        return
    again, _ = run_in_world(2, trained, str(tiny_data), tmp_path, changes | way_out, divergence if way_out else None)
    assert (again.begun, again.step, again.text, again.newest) == (first.newest, STEPS, "", STEPS)
