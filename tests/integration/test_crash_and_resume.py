"""A rank is killed, or gets a stop signal, at a chosen place. The run resumes from its last checkpoint with the same
bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launchers.local import launch
from moe_dist.monitor.report.numbers import traffic
from moe_dist.monitor.tags import reproducible_part
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.runtime.run_folder import RunFolder
from tests.support.cover import exhaustive
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

STEPS = 6
ROW_BYTES = 4 * 32 * 4  # 32 fp32 numbers per row, in dispatch, combine, and backward of both
SETTINGS = {
    "loss.balance.scope": "step",
    "train.steps": STEPS,
    "checkpoint.every": 2,
    "evaluation.every": 2,
    "evaluation.balance_efficiency": False,
}


def records(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_jsonl.read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int, RunFolder]]:
    """Returns a function that starts or resumes the run of a name, and returns (verdict, folder)."""
    root = tmp_path_factory.mktemp("runs")

    def started(name: str) -> tuple[int, RunFolder]:
        changes = {**SETTINGS, "run.name": name, "checkpoint.asynchronous": name != "kill"}
        if name == "stop-kill":
            changes["monitor.sinks"] = [{"kind": "jsonl"}, {"kind": "tensorboard"}]
            changes["monitor.trace"] = {"every": 1}
        config = tiny_config(tiny_data, root, changes)
        path = write_config(config, root / f"{name}.yaml")
        return launch(path, program=PROGRAM), RunFolder.of(config)

    return started


@pytest.fixture(scope="module")
def undisturbed(start: Callable[[str], tuple[int, RunFolder]]) -> list[dict[str, Any]]:
    code, run = start("undisturbed")
    assert code == 0
    return records(run)


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        exhaustive("kill", [(fault(rank=1, step=4, phase="before_step", kind="kill"), 1, 2)]),
        pytest.param(
            "commit", [(fault(rank=0, step=4, phase="before_commit", kind="kill"), 1, 2)], marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "stop", [(fault(rank=1, step=3, phase="after_step", kind="stop"), 75, 4)], marks=pytest.mark.exhaustive
        ),
        # The stop comes before an evaluation is due. The second attempt evaluates and is killed; the third evaluates again.
        exhaustive(
            "stop-kill",
            [
                (fault(rank=1, step=3, phase="after_step", kind="stop"), 75, 4),
                (fault(rank=1, step=5, phase="before_step", kind="kill"), 1, 4),
            ],
        ),
    ],
)
def test_the_run_goes_on_to_the_same_bits(
    start: Callable[[str], tuple[int, RunFolder]],
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    breaks: list[tuple[dict[str, str], int, int]],
) -> None:
    for broken, verdict, resumed_from in breaks:
        with monkeypatch.context() as patch:
            for variable, value in broken.items():
                patch.setenv(variable, value)
            code, run = start(name)
        assert code == verdict or (verdict == 1 and code not in (0, 75))
        assert (run.checkpoints / "latest").read_text().strip() == f"step_{resumed_from}"
    code, run = start(name)
    assert code == 0
    seen = records(run)
    steps = [line["step"] for line in seen if line["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert [reproducible_part(line) for line in seen] == [reproducible_part(line) for line in undisturbed]
    if name == "stop-kill":
        events = EventAccumulator(str(run.tensorboard)).Reload()
        text = EventAccumulator(str(run.tensorboard / "text")).Reload()
        assert [event.step for event in text.Scalars("eval/modality")] == [2, 4, 6]
        trace = read_trace(run.path)
        assert len(trace.attempts) > 1
        manifest = trace.attempts[0].manifest
        slots = [[e for e, rank in enumerate(manifest.rank_of_expert) if rank == each] for each in (0, 1)]
        placement = ExpertPlacement(manifest.groups, tuple(map(tuple, slots)))
        counted = [line for line in seen if line["kind"] == "step"]
        assert trace.steps == tuple(line["step"] for line in counted)
        for line in counted:
            step = trace.step(line["step"])
            assert step.choices().tolist() == line["arrays"]["choices_LC"]
            sent = traffic(step.ids, step.tokens["sequence"] // 2 % 2, placement, (1,))
            names = ("pairs", "pairs_remote", "rows_remote", "payload_bytes")
            assert [line["ledger"][name] for name in names] == [*sent[:3], sent.rows * ROW_BYTES]
            assert sent.between == sent.between_hierarchical == {1: sent.rows}
        assert [event.step for event in events.Scalars("loss/total")] == list(range(1, STEPS + 1))
    shutil.rmtree(run.path)


MOVING = {  # every rank has experts of both groups; moves are cheap, so that the controller accepts them
    "rank_balance": {"dealing": True, "moving": {"every": 2, "flops_per_byte": 1e-3}},
    "placement": {"policy": "interleaved"},
    "model.moe.groups": {
        "text": {"num_experts": 6, "num_null": 2, "top_k": 2, "ffn_dim": 16},
        "image": {"num_experts": 6, "num_null": 2, "top_k": 2, "ffn_dim": 24},
    },
    "checkpoint": {"every": 1, "asynchronous": False},
    "monitor.trace": {"every": 1},
    "monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard"}],
}


def moves(lines: list[dict[str, Any]]) -> dict[int, list[list[int]]]:
    """Returns the steps after which experts moved, each with the experts of every rank after the move."""
    found = [(line["step"], each) for line in lines for each in line.get("rank_balance", [])]
    return {step: each["slots"] for step, each in found if each["lever"] == "moving" and each["taken"]}


@pytest.mark.full
def test_a_rank_killed_in_a_move_loses_nothing(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank is killed after some expert stacks have moved and before the others. The run resumes from the checkpoint
    before the move, repeats the move, is killed again, and ends with the bits of an undisturbed run. Traces and records
    also match."""

    def started(name: str) -> tuple[int, RunFolder]:
        config = tiny_config(tiny_data, tmp_path, {**SETTINGS, **MOVING, "run.name": name})
        return launch(write_config(config, tmp_path / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)

    code, whole = started("whole")
    assert code == 0
    expected, moved = records(whole), moves(records(whole))
    assert min(moved) == 2
    for step, phase, saved in ((2, "in_move", 1), (5, "before_step", 4)):  # in the move, and after it
        with monkeypatch.context() as patch:
            for variable, value in fault(rank=1, step=step, phase=phase, kind="kill").items():
                patch.setenv(variable, value)
            code, run = started("killed")
        assert code not in (0, 75)
        assert (run.checkpoints / "latest").read_text().strip() == f"step_{saved}"
    code, run = started("killed")
    assert code == 0
    assert [reproducible_part(line) for line in records(run)] == [reproducible_part(line) for line in expected]
    trace = read_trace(run.path)
    slots = [[e for e, rank in enumerate(trace.step(1).manifest.rank_of_expert) if rank == each] for each in (0, 1)]
    for line in (line for line in records(run) if line["kind"] == "step"):
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


REPLICATING = {**MOVING, "rank_balance": {"replicating": {"every": 2, "slots": 4, "flops_per_byte": 1e-3}}}


@pytest.mark.exhaustive
@pytest.mark.parametrize("pipelined", [{}, {"overlap": True, "chunks": 2}], ids=["plain", "overlap and chunks"])
def test_a_rank_killed_with_replicas_loses_nothing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelined: dict[str, Any]
) -> None:
    """The rank is killed in the first step with replicas, after some weights have arrived, and again after the resume. The
    run ends with the bits of an undisturbed run, and its records show the replicas."""
    dispatch = {"parallel.dispatch": {"kind": "all_to_all", **pipelined}}

    def started(name: str) -> tuple[int, RunFolder]:
        config = tiny_config(tiny_data, tmp_path, {**SETTINGS, **REPLICATING, **dispatch, "run.name": name})
        return launch(write_config(config, tmp_path / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)

    code, whole = started("whole")
    assert code == 0
    expected = records(whole)
    found = {line["step"]: each for line in expected for each in line.get("rank_balance", []) if each["taken"]}
    assert min(found) == 2
    for step, phase in ((2, "in_replicas"), (4, "before_step")):
        with monkeypatch.context() as patch:
            for variable, value in fault(rank=1, step=step, phase=phase, kind="kill").items():
                patch.setenv(variable, value)
            code, run = started("killed")
        assert code not in (0, 75)
        assert (run.checkpoints / "latest").read_text().strip() == f"step_{2 if phase == 'in_replicas' else 3}"
    code, run = started("killed")
    assert code == 0
    assert [reproducible_part(line) for line in records(run)] == [reproducible_part(line) for line in expected]
    steps = {line["step"]: line for line in expected if line["kind"] == "step"}
    replicas, widths = found[2]["replicas"], np.array([16.0] * 6 + [24.0] * 6)
    assert any(replicas)
    for layer, replicated in enumerate(replicas):  # with two ranks, each slot of a replicated expert has half of its load
        load_E = widths * np.array(steps[3]["arrays"]["choices_LC"])[layer, :12]
        shared, first = {expert for expert, _ in replicated}, {e for e in range(12) if e in found[2]["slots"][0]}
        expected_0 = sum(each / 2 if e in shared else each * (e in first) for e, each in enumerate(load_E))
        assert steps[3]["arrays"]["weighted_rows_LR"][layer] == pytest.approx([expected_0, load_E.sum() - expected_0])
    trace = read_trace(run.path)
    for number, line in steps.items():  # rows and bytes counted from the trace equal the run's
        step, before = trace.step(number), [found[each]["replicas"] for each in sorted(found) if each < number]
        assert [[[*each] for each in layer] for layer in step.manifest.replicas] == (before[-1] if before else [])
        sent = traffic(step.ids, step.tokens["sequence"] // 2 % 2, step.manifest.placement, (1,))
        names = ("pairs", "pairs_remote", "rows_remote", "payload_bytes")
        assert [line["ledger"][name] for name in names] == [*sent[:3], sent.rows * ROW_BYTES]
    shown = EventAccumulator(str(run.tensorboard)).Reload().Tags()["tensors"]
    assert "rank_balance/replicating/text_summary" in shown
