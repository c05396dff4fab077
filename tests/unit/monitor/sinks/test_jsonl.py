"""After any number of resumes and crashes each step is in the file exactly once."""

import errno
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_dist.errors import CheckpointError, DataError
from moe_dist.monitor.metrics import evaluation_scalars
from moe_dist.monitor.sinks.jsonl import MOST_UNREADABLE, JsonlSink, drop_lines_after, read_lines
from moe_dist.monitor.sinks.sink import SinkContext
from moe_dist.monitor.statistics import EvaluationResult
from tests.support.messages import refused
from tests.unit.monitor.conftest import DEPTHS, MakeRecord


def evaluation(step: int) -> EvaluationResult:
    return EvaluationResult(step, {"text": 3.0, "image": 2.0}, {"text": 5, "image": 6}, {"text": 4.0}, None, 0.8, "no")


def write(path: Path, make_record: MakeRecord, steps: range, *, resume_step: int = 0, evaluate: int = 5) -> None:
    """Writes the records of one attempt that is killed after its last step, so that the sink is not closed."""
    sink = JsonlSink(SinkContext(path.parent, resume_step=resume_step), clock=lambda: 1000.0)
    for step in steps:
        sink.step(make_record(step))
        if step % evaluate == 0:
            sink.evaluation(evaluation(step), evaluation_scalars(evaluation(step), ("text", "image"), 2))


def steps_of(path: Path, kind: str = "step") -> list[int]:
    return [line["step"] for line in read_lines(path) if line["kind"] == kind]


def test_a_line_has_the_whole_record(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, make_record, range(5, 6))
    step, evaluated = (json.loads(text) for text in path.read_text().splitlines())
    record = make_record(5)
    assert not {"load", "mixture_of_depths", "rank_balance"} & {*step, *evaluated}, "only where the run has them"
    assert (step["step"], step["kind"], step["time"], step["skipped"]) == (5, "step", 1000.0, False)
    assert step["scalars"] == record.scalars
    assert step["arrays"]["choices_LC"] == record.arrays["choices_LC"].tolist()
    assert step["ledger"]["metadata_bytes"] == 640
    assert step["losses"] == record.losses
    assert step["epochs"] == {"text": 0.5, "image": 0.5}
    assert evaluated["kind"] == "evaluation"
    assert evaluated["scalars"] == {"eval/text": 3.0, "eval/image": 2.0, "moe/balance_efficiency_by_count": 0.8}
    assert evaluated["ablated_losses"] == {"text": 4.0}


def test_a_line_has_what_controllers_and_mixture_of_depths_did(tmp_path: Path, make_record: MakeRecord) -> None:
    record = make_record(1, active_target={"text": 1.5}, mixture_of_depths=DEPTHS)
    sink = JsonlSink(SinkContext(tmp_path))
    sink.step(record)
    sink.evaluation(replace(evaluation(1), mixture_of_depths=DEPTHS), {})
    step, evaluated = read_lines(tmp_path / "metrics.jsonl")
    assert step["load"] == {"text": dict(record.load["text"])}
    assert step["mixture_of_depths"]["layers"] == evaluated["mixture_of_depths"]["layers"] == [1, 3]
    assert step["arrays"]["choices_LC"] == make_record(1).arrays["choices_LC"].tolist()


def test_resuming_drops_what_is_written_again(tmp_path: Path, make_record: MakeRecord) -> None:
    path, once = tmp_path / "metrics.jsonl", tmp_path / "once" / "metrics.jsonl"
    write(path, make_record, range(1, 14))
    write(path, make_record, range(11, 18), resume_step=10)
    write(path, make_record, range(11, 13), resume_step=10)
    write(path, make_record, range(11, 21), resume_step=10)
    assert steps_of(path) == list(range(1, 21))
    assert steps_of(path, "evaluation") == [5, 10, 15, 20]
    write(once, make_record, range(1, 21))
    assert path.read_bytes() == once.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "once"], "nothing is left beside them"


def test_an_evaluation_that_is_owed_is_there_once(tmp_path: Path, make_record: MakeRecord) -> None:
    """An attempt stops after step 10 and saves before it evaluates. The next attempt evaluates, and dies before it
    saves."""
    path, once = tmp_path / "metrics.jsonl", tmp_path / "once" / "metrics.jsonl"
    write(path, make_record, range(1, 12))
    write(once, make_record, range(1, 11))
    drop_lines_after(path, 10)
    assert path.read_bytes() == once.read_bytes(), "an attempt that saved after it leaves it there"
    drop_lines_after(path, 10, evaluation_owed=True)
    assert steps_of(path, "evaluation") == [5]
    assert steps_of(path) == list(range(1, 11))


@pytest.mark.parametrize("keep", [1, 40, 400, -1])
def test_a_torn_last_line_goes(tmp_path: Path, make_record: MakeRecord, keep: int) -> None:
    """Only `keep` bytes of the last line were written; -1 means all but the newline."""
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 5))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    assert steps_of(path) == [1, 2, 3]
    drop_lines_after(path, 9)
    assert path.read_bytes() == b"".join(lines[:-1])
    write(path, make_record, range(4, 7), resume_step=3)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_zeros_of_a_power_cut_go(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 4))
    with path.open("ab") as file:
        file.write(b'{"step":2,' + b"\0" * 100 + b"}\n" + b"\0" * 50)
    write(path, make_record, range(4, 6), resume_step=3)
    assert steps_of(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1 << 40),  # a sparse file of a terabyte
        lambda path: path.write_bytes(path.read_bytes() + b"x" * MOST_UNREADABLE),
        lambda path: path.write_bytes(
            path.read_bytes() + b'{"step":4,"kind":"step","x":[%b]}\n' % (b"[]," * 200_000) * 120
        ),
    ],
    ids=["sparse", "no lines", "millions of lists"],
)
def test_a_file_of_more_than_records_is_refused_after_a_bounded_part_of_it(
    tmp_path: Path, make_record: MakeRecord, damage: Callable[[Path], object]
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 4))
    damage(path)
    size, began = path.stat().st_size, time.process_time()
    with pytest.raises(DataError, match="bytes that are no records"):
        drop_lines_after(path, 3)
    with pytest.raises(ValueError, match="line 4 is not a record"):
        list(read_lines(path))
    assert time.process_time() - began < 5.0
    assert path.stat().st_size == size
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def missing(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "missing or damaged" in record.message]
    caplog.clear()
    return found


def test_records_that_are_gone_are_told_and_the_others_stay(
    tmp_path: Path, make_record: MakeRecord, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 10))
    drop_lines_after(path, 8)
    assert missing(caplog) == []
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if not line.startswith((b'{"step":3,', b'{"step":6,'))))
    drop_lines_after(path, 8)
    assert "the records of 2 of the steps 3 to 6" in missing(caplog)[0]
    assert steps_of(path) == [1, 2, 4, 5, 7, 8]
    path.unlink()
    write(path, make_record, range(9, 10), resume_step=8)
    assert "the records of 8 of the steps 1 to 8" in missing(caplog)[0]
    assert steps_of(path) == [9]


@pytest.mark.parametrize("damage", [b"\xff" * 200, b"\0" * 200, b"", b'{"step":4,"kind":"step",'])
def test_a_line_damaged_inside_is_told_and_the_others_stay(
    tmp_path: Path, make_record: MakeRecord, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 10))
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(index for index, line in enumerate(lines) if line.startswith(b'{"step":4,'))
    lines[at] = lines[at][:60] + damage + lines[at][260:]
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="line 4 is not a record"):
        steps_of(path)
    drop_lines_after(path, 9)
    assert "the records of 1 of the steps 4 to 4" in missing(caplog)[0]
    assert steps_of(path) == [1, 2, 3, 5, 6, 7, 8, 9]


def test_a_crash_while_dropping_leaves_the_old_file(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, make_record, range(1, 8))
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moe_dist.monitor.sinks.jsonl.os.replace", crash)
        with refused(OSError):
            JsonlSink(SinkContext(path.parent, resume_step=3))
    assert path.read_bytes() == before
    write(path, make_record, range(4, 8), resume_step=3)
    assert path.read_bytes() == before


def test_lines_are_strict_json_with_odd_numbers_named(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlSink(SinkContext(path.parent)).step(
        make_record(1, grad_norm=-math.inf, nll_M=np.array([math.nan, 1.0]), skipped=True)
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["scalars"]["loss/total"] is None
    assert line["non_finite"] == {"loss/total": "nan", "loss/text": "nan", "optim/grad_norm": "-inf"}


def test_arrays_come_every_few_steps(tmp_path: Path, make_record: MakeRecord) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(SinkContext(path.parent), arrays_every=3)
    for step in range(1, 8):
        sink.step(make_record(step))
    assert [line["step"] for line in read_lines(path) if "arrays" in line] == [3, 6]


class FailingFile:
    """A file that accepts `room` bytes and then fails."""

    closed = False

    def __init__(self, file: io.FileIO, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(bytes(data[: self.room]))
        self.room -= taken
        return taken

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self.closed = True
        self._file.close()


@pytest.mark.parametrize("room", [0, 1, 100])
def test_lines_wait_for_room_and_no_checkpoint_is_saved_meanwhile(
    tmp_path: Path, make_record: MakeRecord, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    path, once = tmp_path / "metrics.jsonl", tmp_path / "once" / "metrics.jsonl"
    write(once, make_record, range(1, 5))
    sink = JsonlSink(SinkContext(path.parent), clock=lambda: 1000.0)
    sink.step(make_record(1))
    sink._file = full = FailingFile(sink._file, room)  # pyright: ignore
    sink.step(make_record(2))
    sink.step(make_record(3))
    assert caplog.text.count("No space left on device; lines wait in memory") == 1
    with refused(CheckpointError, "metrics.jsonl"):
        sink.flush()
    assert steps_of(path) == [1]  # an incomplete line does not count
    full.room = 1 << 20
    sink.step(make_record(4))
    sink.flush()
    assert path.read_bytes() == once.read_bytes()
    sink.close()


def test_a_disk_that_stays_full_does_not_keep_the_sink_from_closing(tmp_path: Path, make_record: MakeRecord) -> None:
    sink = JsonlSink(SinkContext(tmp_path))
    sink._file = FailingFile(sink._file, 10)  # pyright: ignore
    sink.step(make_record(1))
    sink.close()
    sink.close()
    drop_lines_after(tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
