"""A run that diverges: the causes, put into a trainer of either engine, and the body of a standing world that trains one.

python -m tests.support.diverging CONFIG            # one rank, as `moe_dist.train`, that MOE_DIST_TEST_DIVERGENCE breaks
python -m tests.support.diverging --launch CONFIG   # all ranks, as the local launcher starts them
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.support.engine_run import megatron

PROGRAM = ("-m", "tests.support.diverging")
VARIABLE = "MOE_DIST_TEST_DIVERGENCE"
ENGINES: dict[str, dict[str, Any]] = {  # each with two ranks
    "own": {"parallel.ep": 2},
    "own, FSDP2": {"parallel.ep": 1, "parallel.edp": 2, "parallel.data": "fsdp2"},
    "megatron": {"parallel.ep": 2, **megatron()},
    "megatron, TP": {"parallel.ep": 1, "parallel.edp": 2, **megatron(tp=2, distributed_optimizer=True)},
}
CAUSES = ("rate", "data", "weight", "router", "moment")


@dataclass(frozen=True)
class Divergence:
    """Why and when a run diverges.

    Attributes:
        cause: rate (1e37 from then on), data (the sequences of `bad` steps give gradients without a finite norm), weight,
            router, moment (a number of one tensor of the state becomes `value`).
        after: Number of good steps.
        draw: Chooses the tensor.
        value: nan or inf.
    """

    cause: str
    after: int
    draw: int = 0
    value: float = math.nan
    bad: int = 3

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps({**asdict(self), "value": str(self.value)})}

    @classmethod
    def from_environment(cls) -> "Divergence | None":
        found = json.loads(os.environ.get(VARIABLE, "null"))
        return found and cls(**{**found, "value": float(found["value"])})


def diverge(trainer: Any, divergence: Divergence) -> None:
    """Makes a trainer diverge. The same call on each rank."""
    step, training, after = trainer._step, trainer.saver._training, divergence.after
    batch = trainer.plan.global_batch
    bad = range(after * batch, (after + divergence.bad) * batch)
    norm_squared, now = training.step._norm_squared, {"bad": False}

    def broken() -> Any:
        progress = trainer.progress
        read = {number for each in trainer.loader.numbers(progress.position) for number in each}
        now["bad"] = divergence.cause == "data" and not read.isdisjoint(bad)
        if divergence.cause == "rate" and progress.step == after:
            trainer.plan = replace(trainer.plan, lr=lambda _: 1e37)
        result = step()
        if progress.step == after and divergence.cause in ("weight", "router", "moment"):
            _poison(trainer, divergence)
        return result

    trainer._step = broken
    training.step._norm_squared = lambda: norm_squared() + (math.inf if now["bad"] else 0.0)


@torch.no_grad()
def _poison(trainer: Any, divergence: Divergence) -> None:
    state = trainer.saver._capture()
    kind = {"moment": "optimizer.exp_avg", "router": ".moe.router.", "weight": ""}[divergence.cause]
    moments = divergence.cause == "moment"
    named = [name for name in sorted(state.specs) if kind in name and name.startswith("optimizer.") == moments]
    tensor = state.tensors().get(named[divergence.draw % len(named)])
    if tensor is not None:  # an expert of another rank is not here
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local[(0,) * local.dim()] = divergence.value
    trainer.saver._training.loaded(state)


@dataclass(frozen=True)
class Ended:
    """How one rank's run ended: its first and last step, the text of its DivergedError, what `latest` names."""

    begun: int
    step: int
    skipped: int
    text: str
    newest: int


def trained(rank: Any, data: str, root: Path, changes: Mapping[str, Any], divergence: Divergence | None) -> Ended:
    """Body of a standing world: starts the run, or goes on with it, to its end or to its divergence."""
    from moe_dist.errors import DivergedError
    from tests.support.engine_run import started_run

    with started_run(rank, data, {"run.root": str(root), **changes}) as run:
        trainer = run.trainer(run.saver())
        begun, text = trainer.progress.step, ""
        if divergence is not None:
            diverge(trainer, divergence)
        try:
            trainer.fit()
        except DivergedError as error:
            text = str(error)
        trainer.saver.writer.wait()
        newest = trainer.saver._checkpoints.latest()
        ended = trainer.progress
        return Ended(begun, ended.step, ended.skipped_steps, text, -1 if newest is None else int(newest.name[5:]))


def launched(config: Path, divergence: Divergence) -> subprocess.CompletedProcess[str]:
    """The whole run by the local launcher."""
    return subprocess.run(
        [sys.executable, *PROGRAM, "--launch", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **divergence.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def main() -> None:
    if sys.argv[1] == "--launch":
        from launchers import local

        sys.exit(local.launch(Path(sys.argv[2]), program=PROGRAM))
    from moe_dist.runtime.command_line import run_command
    from moe_dist.train.__main__ import main as train

    if (divergence := Divergence.from_environment()) is not None:
        from moe_dist.train.loop.trainer import Trainer

        fit = Trainer.fit

        def broken(self: Trainer) -> Any:
            diverge(self, divergence)
            return fit(self)

        Trainer.fit = broken
    run_command(train)


if __name__ == "__main__":
    main()
