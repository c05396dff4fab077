"""Each kind of failure ends with one line: what, rank, layer, modality, since which step, and what to do."""

import re
from pathlib import Path

import pytest

from launchers.run_progress import read_progress
from launchers.status import one_run
from launchers.verdict import Verdict, say_cause
from moe_dist.runtime.attempt import verdict_of
from moe_dist.runtime.cause import line_of_cause
from moe_dist.runtime.hints import RecordedHint
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.status import AttemptRecord
from tests.unit.launchers.test_status import Folder, text

SKIPPED = RecordedHint(
    51, "skipped", "step 51 was skipped on all ranks: the router of layer 3 is the first with scores that"
)
SPIKE = RecordedHint(48, "spike/image", "the image loss jumped in 3 of the last 50 steps")
OLD = RecordedHint(7, "busy/text", "text expert 1 takes 90% in layer 9")
NAN = (
    "loss or gradient not finite in 10 steps in a row, up to step 60 (train.steps=99); no checkpoint was saved, so that "
    "the same command begins at step 1, and without a change it will probably diverge again: lower optimizer.lr=1"
)
HANG = "collective 'combine rows' of layers.1 did not finish in 8 s at step 45; rank 1 did not enter it: all_to_all.py:9"
KILLED = "rank 1 on n1: killed by SIGKILL"
DRIFT = (
    "after step 45 the copies of layers.2.q.weight differ on rank 3, though all ranks compute the same update; the copies "
    "were equal when runs/a/checkpoints/step_40 was saved, and the same command resumes from it; test the hardware"
)
FULL = verdict_of(OSError(28, "No space left on device", "/runs/a/status.json"))[1]
FROM_40, FROM_1 = "the same command resumes from the checkpoint of step 40", "so the same command begins at step 1"
# Name -> verdict, reason, rank at fault, hints, committed step, and parts of the line in their order, parted by |.
FAILURES = {
    "nan": (70, NAN, 0, (OLD, SPIKE, SKIPPED), 0,
        "diverged: loss or gradient not finite|all ranks|layer 3|image|since step 48|to do: |lower optimizer.lr"),
    "oom of a GPU": (1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", 2, (), 40,
        f"out of memory: |rank 2 on n2|after step 50|to do: lower train.micro_batch|{FROM_40}"),
    "oom of the host": (1, f"{KILLED}, memory limit reached: oom_kill 1", 1, (), 0,
        f"out of memory: killed by SIGKILL|rank 1 on n1|after step 50|train.micro_batch|{FROM_1}"),
    "hang": (1, f"rank 1 on n1: {HANG}", 1, (), 40,
        f"hang: collective 'combine rows'|rank 1 on n1|layer 1|since step 45|to do: look at the machine|{FROM_40}"),
    "hang without a culprit": (1, "collective 'save' did not finish at step 45; all ranks have entered it", None, (), 40,
        f"hang: |no rank is known|since step 45|network|{FROM_40}"),
    "killed rank": (1, KILLED, 1, (), 40,
        f"killed: killed by SIGKILL|rank 1 on n1|after step 50|to do: look for who|{FROM_40}"),
    "native crash": (1, "rank 0: killed by SIGSEGV", 0, (), 0,
        f"crash of native code: |rank 0|to do: look at the end|{FROM_1}"),
    "lost node": (1, "ranks 2-3: Node failure on n2", 2, (), 0,
        f"lost node: Node failure on n2|ranks 2-3|to do: look at that node|{FROM_1}"),
    "bad data": (65, "data.path='/data': text.bin has 9 bytes; prepare it again", 3, (), 0,
        f"bad data: data.path='/data'|rank 3|to do: prepare it again|an unchanged restart would fail again|{FROM_1}"),
    "drift": (1, DRIFT, 3, (), 40,
        "copies of weights differ: after step 45|rank 3 on n2|layer 2|since step 45|resumes from it|test the hardware"),
    "full disk": (1, FULL, 0, (), 0,
        f"storage: /runs/a/status.json: No space left|rank 0 on n2|to do: repair this (free space|{FROM_1}"),
    "configuration": (78, "train.steps=0: must be at least 1; set train.steps=1", 0, (), 0,
        f"wrong configuration: train.steps=0|rank 0|to do: set train.steps=1|an unchanged restart|{FROM_1}"),
    "an exception": (1, "ValueError: x", 2, (), 40,
        f"failed: ValueError: x|rank 2 on n2|to do: look at the traceback|{FROM_40}"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_the_line_of_cause_of_each_failure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, reason, rank, hints, committed, told = FAILURES[name]
    parts = told.split("|")
    record = AttemptRecord("a0", 0, "n0", 1, 0.0, 9.0, code, reason, rank, 50, "n2")
    line = line_of_cause(record, hints, committed)
    assert "\n" not in line
    at = [line.find(part) for part in parts]
    assert at == sorted(at), (line, parts)
    assert -1 not in at, (line, parts)
    assert_consistent(line)
    folder = Folder(tmp_path)
    if committed:
        folder.checkpoint(committed)
    say_cause(RunFolder(folder.path), "a0", Verdict(code, reason, rank))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"cause: {parts[0]}")
    folder.attempt(0, code, reason)
    assert_consistent(text(one_run(read_progress(folder.path)), width=2000))


def assert_consistent(said: str) -> None:
    """Asserts that a text tells once, and not in two ways, from where the run goes on."""
    assert len(re.findall("the same command", said)) <= 2, "in `status` the table of attempts has the reason, too"
    assert "the last checkpoint" not in said
    begins = "begins at step 1" in said
    assert begins != ("resumes from" in said), said
    assert not (begins and "checkpoint  step" in said)


@pytest.mark.parametrize(("verdict", "committed"), [(0, 5), (75, 5), (None, 0)])
def test_only_failures_have_a_cause(verdict: int | None, committed: int) -> None:
    assert line_of_cause(AttemptRecord("a", 0, "n0", 1, 0.0, 9.0, verdict, "stopped on request"), (), committed) == ""
