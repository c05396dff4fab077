"""Each hint is computed once. The sinks, metrics.jsonl, `status`, the summary and the report all show it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launchers.run_progress import read_progress
from launchers.status import many_runs, one_run
from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.report.page import render
from moe_dist.monitor.report.routing import Subject as ReportSubject
from moe_dist.monitor.sinks.jsonl import JsonlSink, read_lines
from moe_dist.monitor.sinks.prometheus import PrometheusSink
from moe_dist.monitor.sinks.sink import GuardedSinks, ScalarSink, Sink, SinkContext
from moe_dist.monitor.sinks.tensorboard import TensorBoardSink
from moe_dist.runtime.hints import RecordedHint, read_hints, warning_lines
from tests.unit.launchers.test_status import Folder, text
from tests.unit.monitor.report.conftest import draw_routing

MakeRecord = Callable[..., Record]
SKIPPED = "step 3 was skipped on all ranks"


class TextSink(ScalarSink):
    """Keeps texts, as the sinks of W&B and MLflow do."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        assert "hints/skipped" not in scalars

    def text(self, tag: str, markdown: str) -> None:
        self.texts[tag] = markdown


def attempt(
    folder: Path, make_record: MakeRecord, subject: Subject, steps: range, *more: Sink, faulty: tuple[int, ...]
) -> None:
    """Runs an attempt over `steps` that is killed after its last step."""
    context = SinkContext(folder, run_name="demo", resume_step=steps[0] - 1, subject=subject)
    made = [JsonlSink(context), *more]
    said = {each.kind: each.step for each in read_hints(folder / "metrics.jsonl")}
    sinks = GuardedSinks(made, HintWatch(subject.groups, subject.moe_layers, quiet=10, said=said))
    for step in steps:
        sinks.step(make_record(step, skipped=step in faulty, skipped_steps=1))


def test_a_wrong_rule_ends_the_hints_and_not_the_run(
    make_record: MakeRecord, subject: Subject, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = GuardedSinks([TextSink()], HintWatch(subject.groups, subject.moe_layers))
    monkeypatch.setattr(HintWatch, "update", lambda *_: 1 // 0)
    for step in (1, 2):
        sinks.step(make_record(step))
    assert caplog.text.count("step 1: hints failed") == 1
    assert "step 2" not in caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Folder(tmp_path).attempt(0, 0, step=6).path


def test_every_place_says_the_same(folder: Path, make_record: MakeRecord, subject: Subject) -> None:
    texts, shown = TextSink(), SinkContext(folder, run_name="demo", subject=subject)
    board = TensorBoardSink(shown)
    attempt(folder, make_record, subject, range(1, 7), texts, board, PrometheusSink(shown), faulty=(3, 4))
    board.close()
    (line,) = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "hint"]
    assert (line["step"], line["hint"]) == (3, "skipped")
    assert line["text"].startswith(SKIPPED)
    assert texts.texts == {"hint/skipped": f"step 3: {line['text']}"}
    assert 'moe_dist_hints{run="demo",kind="skipped"} 1.0' in (folder / "metrics.prom").read_text()
    (event,) = EventAccumulator(str(folder / "tensorboard")).Reload().Tensors("hint/skipped/text_summary")
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (3, line["text"])
    run = read_progress(folder)
    assert "done, with 1 warning" in text(many_runs([run]))
    assert SKIPPED in text(one_run(run))
    page = render(ReportSubject(replace(draw_routing(), tokens=None, hints=run.hints), None, [], ()))
    assert "<h2>Look at loss; not judged: speed, data, memory</h2>" in page
    assert f"warned in step 3: {SKIPPED}" in page


def test_a_resumed_run_keeps_its_hints_and_repeats_none(folder: Path, make_record: MakeRecord, subject: Subject) -> None:
    attempt(folder, make_record, subject, range(1, 9), faulty=(3, 8))
    attempt(folder, make_record, subject, range(6, 18), faulty=(8,))  # within the 10 quiet steps after step 3
    assert [hint[:2] for hint in read_hints(folder / "metrics.jsonl")] == [(3, "skipped")]
    attempt(folder, make_record, subject, range(16, 20), faulty=(17,))
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "hint"] == [3, 17]
    attempt(folder, make_record, subject, range(2, 4), faulty=())
    assert read_hints(folder / "metrics.jsonl") == (), "the step of the hint is repeated, now without a fault"


def test_texts_out_of_reach_leave_the_count(folder: Path, make_record: MakeRecord, subject: Subject) -> None:
    attempt(folder, make_record, subject, range(1, 45), faulty=(3,))
    (hint,) = read_hints(folder / "metrics.jsonl", most_bytes=1 << 14)
    assert hint == RecordedHint(3, "skipped")
    assert warning_lines([hint]) == ["step 3: skipped"]
    assert warning_lines([hint] * 7)[-1] == "and 2 more in metrics.jsonl"


@pytest.mark.parametrize("hints", [None, 5, {"a": None, "b": "x"}])
def test_records_of_another_version_or_author_still_load(folder: Path, hints: object) -> None:
    line = {"step": 2, "kind": "step", "scalars": {}, **({} if hints is None else {"hints": hints})}
    (folder / "metrics.jsonl").write_text(
        f'{json.dumps(line, separators=(",", ":"))}\n{{"step":2,"kind":"hint","hint":[]}}\n'
    )
    assert [each.step for each in read_hints(folder / "metrics.jsonl")] == ([0, 0] if isinstance(hints, dict) else [])
    assert "done" in text(one_run(read_progress(folder)))
