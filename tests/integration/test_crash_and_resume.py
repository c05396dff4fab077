"""A rank is killed, or gets a stop signal, at a chosen place. The run resumes from its last checkpoint with the same
bits."""

import json
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
from tests.support.faults import PROGRAM, fault
from tests.support.tiny import tiny_config, write_config

STEPS = 6
LEDGER = ("pairs", "pairs_remote", "rows_remote", "payload_bytes")
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


def started(data: Path, root: Path, name: str, changes: dict[str, Any]) -> tuple[int, RunFolder]:
    """Starts or resumes the run of a name. Returns verdict and folder."""
    config = tiny_config(data, root, {**SETTINGS, **changes, "run.name": name})
    return launch(write_config(config, root / f"{name}.yaml"), program=PROGRAM), RunFolder.of(config)


def goes_on_to_the_same_bits(
    data: Path, root: Path, changes: dict[str, Any], breaks: list[tuple[int, str, str, int]]
) -> tuple[RunFolder, list[dict[str, Any]]]:
    """Breaks rank 1 once in each attempt, and compares the records of the run with an undisturbed one's.

    Args:
        breaks: For each attempt the step, phase and kind of its fault, and the step of the checkpoint that it leaves.
    """
    code, whole = started(data, root, "undisturbed", changes)
    assert code == 0
    for step, phase, kind, saved in breaks:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in fault(rank=1, step=step, phase=phase, kind=kind).items():
                patch.setenv(variable, value)
            code, run = started(data, root, "broken", changes)
        assert code == 75 if kind == "stop" else code not in (0, 75)
        assert (run.checkpoints / "latest").read_text().strip() == f"step_{saved}"
    code, run = started(data, root, "broken", changes)
    assert code == 0
    seen = records(run)
    assert [line["step"] for line in seen if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [reproducible_part(line) for line in seen] == [reproducible_part(line) for line in records(whole)]
    return run, seen


@pytest.mark.exhaustive  # tests/faults breaks runs in every phase; here records, charts and traces are compared
def test_a_stopped_and_killed_run_goes_on_to_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    """The stop comes before an evaluation is due. The second attempt evaluates and is killed; the third evaluates again."""
    sinks = {"monitor.sinks": [{"kind": "jsonl"}, {"kind": "tensorboard"}], "monitor.trace": {"every": 1}}
    breaks = [(3, "after_step", "stop", 4), (5, "before_step", "kill", 4)]
    run, seen = goes_on_to_the_same_bits(tiny_data, tmp_path, sinks, breaks)
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
        assert [line["ledger"][name] for name in LEDGER] == [*sent[:3], sent.rows * ROW_BYTES]
        assert sent.between == sent.between_hierarchical == {1: sent.rows}
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, STEPS + 1))


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
def test_a_rank_killed_in_a_move_loses_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """The rank is killed after some expert stacks have moved and before the others, and again after the repeated move.
    Traces and records show the moves."""
    breaks = [(2, "in_move", "kill", 1), (5, "before_step", "kill", 4)]
    run, seen = goes_on_to_the_same_bits(tiny_data, tmp_path, MOVING, breaks)
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


REPLICATING = {**MOVING, "rank_balance": {"replicating": {"every": 2, "slots": 4, "flops_per_byte": 1e-3}}}


@pytest.mark.exhaustive
@pytest.mark.parametrize("pipelined", [{}, {"overlap": True, "chunks": 2}], ids=["plain", "overlap and chunks"])
def test_a_rank_killed_with_replicas_loses_nothing(tiny_data: Path, tmp_path: Path, pipelined: dict[str, Any]) -> None:
    """The rank is killed in the first step with replicas, after some weights have arrived, and again after the resume. The
    records show the replicas."""
    changes = {**REPLICATING, "parallel.dispatch": {"kind": "all_to_all", **pipelined}}
    breaks = [(2, "in_replicas", "kill", 2), (4, "before_step", "kill", 3)]
    run, seen = goes_on_to_the_same_bits(tiny_data, tmp_path, changes, breaks)
    found = {line["step"]: each for line in seen for each in line.get("rank_balance", []) if each["taken"]}
    assert min(found) == 2
    steps = {line["step"]: line for line in seen if line["kind"] == "step"}
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
        assert [line["ledger"][name] for name in LEDGER] == [*sent[:3], sent.rows * ROW_BYTES]
    shown = EventAccumulator(str(run.tensorboard)).Reload().Tags()["tensors"]
    assert "rank_balance/replicating/text_summary" in shown
