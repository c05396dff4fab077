"""Makes the head of a report: one verdict each for loss, speed, data, memory and routing. A verdict is "well" only if its
rules had enough records to judge; otherwise it says why they had not."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from moe_dist.monitor.report.findings import problems, too_few
from moe_dist.monitor.report.routing import History, Routing

# First part of a hint's kind -> subject. All other hints are about loss and weights.
SUBJECTS = {
    **dict.fromkeys(("slow", "speed", "reading"), "Speed"),
    **dict.fromkeys(("repeats", "data", "unread", "source", "labels", "padding", "unlabelled", "words"), "Data"),
    "contaminated": "Data",
    **dict.fromkeys(("memory", "leak"), "Memory"),
    **dict.fromkeys(("busy", "dead", "layer", "dropped", "null", "starved", "rank", "router", "saturated"), "Routing"),
}
LOSS_STEPS, SPEED_STEPS, DATA_STEPS = 100, 30, 50  # steps that the rules of hints need


class Verdict(NamedTuple):
    """A subject of the report's head. `state` is "well", "bad" or "few" (not judged). `text` has a line a finding."""

    subject: str
    state: str
    text: str


def verdicts(routing: Routing) -> list[Verdict]:
    """Returns the five verdicts. A hint of the run makes its subject bad."""
    found = []
    judged = {"Loss": _loss, "Speed": _speed, "Data": _data, "Memory": _memory}
    for subject, judge in judged.items():
        state, text = ("few", "a trace has no such records") if routing.history is None else judge(routing.history)
        found.append(_warned(subject, routing.hints, state, text))
    return [*found, _warned("Routing", routing.hints, *_routing(routing))]


def headline(found: Sequence[Verdict]) -> tuple[str, str]:
    """Returns state and text of the whole head."""
    bad, few = ([each.subject.lower() for each in found if each.state == state] for state in ("bad", "few"))
    head = f"Look at {' and '.join(bad)}" if bad else "No rule finds a fault"
    state = "bad" if bad else "few" if len(few) == len(found) else "well"
    return state, head + (f"; not judged: {', '.join(few)}" if few else "")


def _warned(subject: str, hints: Sequence[tuple[int, str, str]], state: str, text: str) -> Verdict:
    told = [hint for hint in hints if SUBJECTS.get(hint[1].partition("/")[0], "Loss") == subject]
    if not told:
        return Verdict(subject, state, text)
    lines = [f"warned in step {step}: {words or kind}" for step, kind, words in reversed(told)]
    figures = [text] if state == "bad" or (state == "well" and subject in ("Loss", "Speed")) else []
    return Verdict(subject, "bad", "\n".join([*lines, *figures]))


def _loss(history: History) -> tuple[str, str]:
    if not history.last_losses:
        return "few", "no step has a finite loss"
    before, now = median(history.first_losses), median(history.last_losses)
    text = f"{before:.3f} in the first steps, {now:.3f} in the last of {history.steps:,}"
    if history.skipped:
        return "bad", f"{text}; {history.skipped} steps had a loss or gradient that was not finite"
    if history.steps < LOSS_STEPS:
        return "few", f"{text}: too few to judge (needs {LOSS_STEPS})"
    if now > before:
        return "bad", f"it rose: {text}"
    held = f"held-out after step {history.held_out[0]}: {history.held_out[1]}" if history.held_out else ""
    return "well", f"{text}; {held or 'not evaluated, so that overfitting is not judged'}"


def _speed(history: History) -> tuple[str, str]:
    if len(history.speeds) < SPEED_STEPS:
        return "few", f"{len(history.speeds)} timed steps are too few to judge (needs {SPEED_STEPS})"
    text = f"{median([*history.speeds][-10:]):,.0f} tokens a second (median of the last 10 steps)"
    if history.slowest is None:
        return "well", f"{text}; one rank, so that none waits"
    rank, seconds, others = history.slowest
    return "well", f"{text}; in the last step rank {rank:.0f} computed longest, {seconds:.3f} s, the others {others:.3f} s"


def _data(history: History) -> tuple[str, str]:
    if not history.epochs:
        return "few", "the records do not tell what was read (another program reads the data)"
    text = f"epochs so far: {', '.join(f'{name} {value:.2f}' for name, value in history.epochs.items())}"
    if history.steps < DATA_STEPS:
        return "few", f"{history.steps} steps are too few to judge (needs {DATA_STEPS}); {text}"
    return "well", f"no rank repeats or lacks data; {text}"


def _memory(history: History) -> tuple[str, str]:
    if history.memory is None or not history.memory[1]:
        mib = f"; the largest process has {history.memory[0]:,.0f} MiB" if history.memory else ""
        return "few", f"only the memory of GPUs is judged{mib}"
    return "well", f"no allocator ran out of memory; at most {history.memory[0]:,.0f} MiB reserved on a GPU"


def _routing(routing: Routing) -> tuple[str, str]:
    wrong, (unjudged, few) = problems(routing), too_few(routing)
    if wrong:
        return "bad", f"in {routing.window.words}: {' '.join(wrong)}"
    if unjudged == len(routing.layers) * routing.placement.num_experts:
        return "few", few
    return "well", f"no fault in {routing.window.words}" + (f"; {few}" if few else "")
