"""A rank is killed while experts move. The run resumes from its last checkpoint and ends bit-equal. tests/faults kills
and stops ranks in each phase of other runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.local import launch
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

STEPS = 6
GROUP = {"num_experts": 6, "num_null": 2, "top_k": 2, "ffn_dim": 16}
SETTINGS = {  # both ranks have experts of both groups, and moves are cheap, so that the controller accepts them
    "loss.balance.scope": "step",
    "train.steps": STEPS,
    "rank_balance": {"dealing": True, "moving": {"every": 2, "flops_per_byte": 1e-3}},
    "placement": {"policy": "interleaved"},
    "model.moe.groups": {"text": GROUP, "image": GROUP},
    "checkpoint": {"every": 1, "asynchronous": False},
    "evaluation.every": 100,
    "evaluation.balance_efficiency": False,
    "monitor.sinks": [{"kind": "jsonl"}],
}


def started(data: Path, root: Path, name: str) -> tuple[int, RunFolder]:
    """Starts or resumes the run `name`. Returns its verdict and folder."""
    config = tiny_config(data, root, {**SETTINGS, "run.name": name})
    return launch(write_config(config, root / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)


def records(run: RunFolder) -> list[dict[str, Any]]:
    lines = map(json.loads, run.metrics_jsonl.read_text().splitlines())
    return [reproducible_part(line) for line in lines if line["kind"] != "hint"]  # some hints depend on times


@pytest.mark.full
def test_a_rank_killed_in_a_move_loses_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """The rank is killed when only some expert stacks have moved. It is killed again after the move is repeated."""
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
    assert seen == records(whole)
    levers = [(line["step"], each) for line in seen for each in line.get("rank_balance", [])]
    moved = [step for step, each in levers if each["lever"] == "moving" and each["taken"]]
    assert moved[0] == 2
