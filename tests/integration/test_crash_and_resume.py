"""A rank is killed while experts move. The run resumes from its last checkpoint with the same bits. tests/faults kills and
stops ranks in each phase of other runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launchers.local import launch
from moe_dist.monitor.tags import reproducible_part
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.runtime.run_folder import RunFolder
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

STEPS = 6
SETTINGS = {  # every rank has experts of both groups; moves are cheap, so that the controller accepts them
    "loss.balance.scope": "step",
    "train.steps": STEPS,
    "rank_balance": {"dealing": True, "moving": {"every": 2, "flops_per_byte": 1e-3}},
    "placement": {"policy": "interleaved"},
    "model.moe.groups": {
        "text": {"num_experts": 6, "num_null": 2, "top_k": 2, "ffn_dim": 16},
        "image": {"num_experts": 6, "num_null": 2, "top_k": 2, "ffn_dim": 24},
    },
    "checkpoint": {"every": 1, "asynchronous": False},
    "evaluation.every": 2,
    "evaluation.balance_efficiency": False,
    "monitor.trace": {"every": 1},
    "monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard"}],
}


def records(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]


def started(data: Path, root: Path, name: str) -> tuple[int, RunFolder]:
    """Starts or resumes the run of a name. Returns verdict and folder."""
    config = tiny_config(data, root, {**SETTINGS, "run.name": name})
    return launch(write_config(config, root / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)


def moves(lines: list[dict[str, Any]]) -> dict[int, list[list[int]]]:
    """Returns the steps after which experts moved, each with the experts of every rank after the move."""
    found = [(line["step"], each) for line in lines for each in line.get("rank_balance", [])]
    return {step: each["slots"] for step, each in found if each["lever"] == "moving" and each["taken"]}


@pytest.mark.full
def test_a_rank_killed_in_a_move_loses_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """The rank is killed after some expert stacks have moved and before the others, and again after the repeated move.
    Records and traces are those of an undisturbed run, and show the moves."""
    code, whole = started(tiny_data, tmp_path, "undisturbed")
    assert code == 0
    for step, phase, saved in ((2, "in_move", 1), (5, "before_step", 4)):
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in fault(rank=1, step=step, phase=phase, kind="kill").items():
                patch.setenv(variable, value)
            code, run = started(tiny_data, tmp_path, "broken")
        assert code not in (0, 75)
        assert (run.checkpoints / "latest").read_text().strip() == f"step_{saved}"
    code, run = started(tiny_data, tmp_path, "broken")
    assert code == 0
    seen = records(run)
    assert [line["step"] for line in seen if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [reproducible_part(line) for line in seen] == [reproducible_part(line) for line in records(whole)]
    moved = moves(seen)
    assert min(moved) == 2
    trace = read_trace(run.path)
    slots = [[e for e, rank in enumerate(trace.step(1).manifest.rank_of_expert) if rank == each] for each in (0, 1)]
    for line in (line for line in seen if line["kind"] == "step"):
        step = trace.step(line["step"])
        placement = ExpertPlacement(step.manifest.groups, tuple(map(tuple, slots)))
        assert step.manifest.rank_of_expert == placement.rank_of_expert
        assert step.choices().tolist() == line["arrays"]["choices_LC"]
        weights = np.array([16.0] * 6 + [24.0] * 6) * np.array(line["arrays"]["choices_LC"])[:, :12]
        expected_LR = [[row[each].sum() for each in slots] for row in weights]
        np.testing.assert_allclose(line["arrays"]["weighted_rows_LR"], expected_LR, rtol=1e-12)
        slots = moved.get(line["step"], slots)
    shown = EventAccumulator(str(run.tensorboard)).Reload().Tags()["tensors"]
    assert {"rank_balance/dealing/text_summary", "rank_balance/moving/text_summary"} <= set(shown)
