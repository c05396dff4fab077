"""Runs diverge from each cause under both engines. The newest checkpoint is then finite and older than the first skipped
step, and the message says so. A run that follows the message's advice reaches its last step."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.verify import verify
from moe_dist.errors import DivergedError
from tests.support.cover import full_unless
from tests.support.engine_run import megatron, started_run

STEPS, GOOD, PATIENCE = 12, 5, 3
CHANGES: dict[str, Any] = {
    "run.name": "diverging", "train.steps": STEPS, "train.max_skipped_in_a_row": PATIENCE, "checkpoint.every": 2,
    "checkpoint.keep": 1, "evaluation.every": STEPS, "evaluation.sequences": 4, "evaluation.final_sequences": 4,
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {  # each with two ranks
    "own": {"parallel.ep": 2},
    "own, FSDP2": {"parallel.ep": 1, "parallel.edp": 2, "parallel.data": "fsdp2"},
    "megatron": {"parallel.ep": 2, **megatron()},
    "megatron, TP": {"parallel.ep": 1, "parallel.edp": 2, **megatron(tp=2, distributed_optimizer=True)},
}
# rate: the learning rate becomes 1e37. data: the norms of PATIENCE steps are not finite. Others: one number of the
# state becomes nan.
CAUSES = ("rate", "data", "weight", "router", "moment")


def diverge(trainer: Any, cause: str) -> None:
    """Makes a trainer diverge after GOOD steps. All ranks must call it with the same cause."""
    step, training, batch = trainer._step, trainer.saver._training, trainer.plan.config.train.global_batch
    bad = range(GOOD * batch, (GOOD + PATIENCE) * batch)
    norm_squared, now = training.step._norm_squared, {"bad": False}

    def broken() -> Any:
        progress = trainer.progress
        read = {number for each in trainer.loader.numbers(progress.position) for number in each}
        now["bad"] = cause == "data" and not read.isdisjoint(bad)
        if cause == "rate" and progress.step == GOOD:
            trainer.plan = replace(trainer.plan, lr=lambda _: 1e37)
        result = step()
        if progress.step == GOOD and cause in ("weight", "router", "moment"):
            _poison(trainer, cause)
        return result

    trainer._step = broken
    training.step._norm_squared = lambda: norm_squared() + (math.inf if now["bad"] else 0.0)


@torch.no_grad()
def _poison(trainer: Any, cause: str) -> None:
    state = trainer.saver._capture()
    kind = {"moment": "optimizer.exp_avg", "router": ".moe.router.", "weight": ""}[cause]
    moments = cause == "moment"
    named = [name for name in sorted(state.specs) if kind in name and name.startswith("optimizer.") == moments]
    tensor = state.tensors().get(named[3 % len(named)])
    if tensor is not None:  # this rank lacks the tensor if it belongs to an expert of another rank
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local[(0,) * local.dim()] = math.nan
    trainer.saver._training.loaded(state)


@dataclass(frozen=True)
class Ended:
    """How one rank's run ended: its first, last and skipped steps, the text of its DivergedError, and the step of
    `latest`."""

    begun: int
    step: int
    skipped: int
    text: str
    newest: int


def trained(rank: Any, data: str, root: Path, changes: Mapping[str, Any], cause: str | None) -> Ended:
    """Starts or resumes the run on one rank of a standing world, and trains until it ends or diverges."""
    with started_run(rank, data, {"run.root": str(root), **changes}) as run:
        trainer = run.trainer(run.saver())
        begun, text = trainer.progress.step, ""
        if cause is not None:
            diverge(trainer, cause)
        try:
            trainer.fit()
        except DivergedError as error:
            text = str(error)
        trainer.saver.writer.wait()
        newest = trainer.saver._checkpoints.latest()
        ended = trainer.progress
        return Ended(begun, ended.step, ended.skipped_steps, text, -1 if newest is None else int(newest.name[5:]))


@pytest.mark.parametrize(
    ("engine", "cause"),
    full_unless(
        lambda engine, cause: engine == "own" and cause == "data",
        [(engine, cause) for engine in ENGINES for cause in CAUSES],
    ),
)
@pytest.mark.slow
def test_a_diverged_run_keeps_a_finite_checkpoint_and_its_ways_out_lead_on(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, engine: str, cause: str
) -> None:
    changes = CHANGES | ENGINES[engine]
    first, second = run_in_world(2, trained, str(tiny_data), tmp_path, changes, cause)
    assert first.newest == second.newest == (6 if cause == "rate" else 4)
    checkpoint = tmp_path / "diverging" / "checkpoints" / f"step_{first.newest}"
    assert verify(checkpoint)[1] == []
    text = next(each.text for each in (first, second) if "see the log of rank" not in each.text)  # of a rank with the cause
    assert f"the newest checkpoint {checkpoint} is finite" in text
    if before := re.search(r"before the first skipped step (\d+)", text):
        assert int(before[1]) == first.step - PATIENCE + 1 > first.newest
    else:
        assert first.skipped == 0
        assert f"step {first.step} is not saved" in text
    way_out = {}
    if cause == "data":
        ((begin, end),) = re.findall(r"data\.skip='\[\[(\d+), (\d+)\]\]'", text)
        assert (int(begin), int(end)) == ((GOOD - 1) * 8, (GOOD + PATIENCE) * 8 - 1)  # includes the last good step
        way_out = {"data.skip": [[int(begin), int(end)]]}
    elif cause == "rate":  # keep=1 leaves only weights from after the huge rate, so no run can resume
        return
    again, _ = run_in_world(2, trained, str(tiny_data), tmp_path, changes | way_out, cause if way_out else None)
    assert (again.begun, again.step, again.text, again.newest) == (first.newest, STEPS, "", STEPS)
