"""`python -m research.sick_runs.cost CONFIG [KEY=VALUE ...]` measures the processor time of all rules about a run's health.

It trains on one rank in this process, and counts processor time, which other jobs on the machine change little. It times
each call of a rule. A step that measures weights and outputs is compared with the steps before and after it.
"""

import functools
import time
from collections import defaultdict
from typing import Any

import numpy as np

from moe_dist.monitor.hints import HintWatch
from moe_dist.runtime.command_line import run_command
from moe_dist.train.__main__ import main
from moe_dist.train.loop import trainer
from moe_dist.train.step import training_step

EVERY = trainer.CHECK_EVERY
spent: dict[str, float] = defaultdict(float)  # seconds of processor time
steps: list[float] = []


def timed(owner: Any, name: str) -> None:
    """Adds the time of each call of a function to `spent`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*given: Any, **options: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*given, **options)
        finally:
            spent[name] += time.process_time() - begin

    setattr(owner, name, call)


def report() -> str:
    """Returns the share of each part in the processor time of all steps after the first window."""
    step_S, half = np.array(steps), EVERY // 2
    due_S = [at for at in range(EVERY - 1, len(steps) - half, EVERY) if at > EVERY]
    more_S = [step_S[at] - np.median([*step_S[at - half : at], *step_S[at + 1 : at + half + 1]]) for at in due_S]
    rng = np.random.default_rng(0)
    means = [np.mean(rng.choice(more_S, len(more_S))) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975]) / EVERY / np.median(step_S)
    shares = {name: seconds / step_S.sum() for name, seconds in sorted(spent.items())}
    total, measured = sum(shares.values()), float(np.mean(more_S)) / EVERY / np.median(step_S)
    lines = [f"{name}: {share:.3%}" for name, share in shares.items()]
    lines.append(f"weights and outputs, every {EVERY} steps: {measured:.3%} [{low:.3%}, {high:.3%}] ({len(due_S)} pairs)")
    size = f"{np.median(step_S):.3f} s a step, {len(steps)} steps"
    lines.append(f"all: {total + measured:.3%}, at most {total + high:.3%}, of {size}")
    return "\n".join(lines)


def measure() -> None:
    """Makes the trainer measure itself, and print the report at its end."""
    timed(HintWatch, "update")
    timed(HintWatch, "evaluate")
    timed(trainer.Trainer, "_problems")
    timed(trainer, "whole_documents")
    timed(trainer, "random_states")
    timed(trainer, "dropout")
    timed(training_step, "checksum")
    timed(training_step, "count_words")
    step = trainer.Trainer._step

    def counted(self: Any) -> Any:
        begin = time.process_time()
        try:
            return step(self)
        finally:
            steps.append(time.process_time() - begin)

    trainer.Trainer._step = counted
    fit = trainer.Trainer.fit

    def reported(self: Any) -> Any:
        found = fit(self)
        print(report(), flush=True)
        return found

    trainer.Trainer.fit = reported


if __name__ == "__main__":
    measure()
    run_command(main)
