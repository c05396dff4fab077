import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.sinks.console import ConsoleSink
from moe_dist.monitor.sinks.sink import GuardedSinks, SinkContext
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.placement.placement import ExpertGroup
from tests.unit.monitor.conftest import MakeRecord

LAYERS = (1, 3, 5)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80, highlight=False)


def ticking(seconds: float) -> Callable[[], float]:
    """Returns a clock that advances by `seconds` with each reading."""
    times: Iterator[float] = iter(i * seconds for i in range(10**6))
    return lambda: next(times)


def test_plain_lines_come_every_few_steps_and_stay_one_line(make_record: MakeRecord) -> None:
    console = plain()
    sink = ConsoleSink(SinkContext(Path(), total_steps=25), every=10, console=console, clock=ticking(2.0))
    for step in range(1, 26):
        sink.step(make_record(step))
    sink.close()
    lines = console.file.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 10", "step 20", "step 25"]
    scalars = make_record(10).scalars
    assert lines[-1].endswith("  evaluating")
    assert lines[1] == (
        f"step 10/25  loss {scalars['loss/total']:.3f} (text {scalars['loss/text']:.3f}, image {scalars['loss/image']:.3f})"
        f"  2.0k tokens/s  experts/token text {scalars['moe/experts_per_token/text']:.2f},"
        f" image {scalars['moe/experts_per_token/image']:.2f}  imbalance text {scalars['moe/load_imbalance/text']:.2f},"
        f" image {scalars['moe/load_imbalance/image']:.2f}  0:30 left"
    )


def test_evaluation_shows_what_changed_over_equal_tokens(make_record: MakeRecord) -> None:
    console = plain()
    sink = ConsoleSink(SinkContext(Path(), total_steps=10), console=console)
    sink.evaluation(EvaluationResult(5, {"text": 4.0, "image_no_filler": 3.0, "image": 3.0}, {"image": 50}), {})
    losses = {"text": 3.5, "image_no_filler": 3.25, "image": 2.5}
    sink.evaluation(EvaluationResult(10, losses, {"image": 60}, {}, 0.812, 0.9), {})  # with another set of image tokens
    assert console.file.getvalue().splitlines() == [
        "evaluation after step 5: held-out text 4.000, image no filler 3.000, image 3.000",
        "evaluation after step 10: held-out text 3.500 (-0.500), image no filler 3.250 (+0.250), image 2.500; balance "
        "efficiency 0.81 by time, 0.90 by count",
    ]


def test_hints_are_printed_and_logged_once(
    make_record: MakeRecord, groups: tuple[ExpertGroup, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    console = plain()
    sink = GuardedSinks(
        [ConsoleSink(SinkContext(Path(), total_steps=99), every=50, console=console)], HintWatch(groups, LAYERS)
    )
    for step in (2, 3, 4):
        sink.step(make_record(step, skipped=True, skipped_steps=step))
    hints = [line for line in console.file.getvalue().splitlines() if line.startswith("hint")]
    assert len(hints) == 1
    assert hints[0].startswith("hint (step 2): step 2 was skipped on all ranks")
    (logged,) = caplog.messages  # rank 0's log file gets this line
    assert f"hint (step 2): {logged.removeprefix('hint: ')}" == hints[0]


@pytest.mark.parametrize(
    ("width", "shown"), [(80, r"experts \d\.\d\d/\d\.\d\d · imb"), (140, r"experts text \d\.\d\d, image")]
)
def test_a_bar_on_a_terminal(make_record: MakeRecord, width: int, shown: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)
    sink = ConsoleSink(SinkContext(Path(), total_steps=200), console=console, clock=ticking(1.0))
    for step in range(1, 101):
        sink.step(make_record(step))
    sink.evaluation(EvaluationResult(100, {"text": 4.0}, {}), {})
    sink.close()
    sink.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    last = text.rstrip().splitlines()[-1].split("\r")[-1]
    assert "100/200" in last
    assert re.search(shown, last)
    assert f"loss {make_record(100).scalars['loss/total']:.3f}" in last
    assert last.rstrip().endswith("1:40")
    assert len(last) <= width
    assert "evaluation after step 100: held-out text 4.000" in text
    assert "step 10/200 " not in text, "no plain lines beside the bar"
