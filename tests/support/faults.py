"""Makes a rank fail at a chosen place: `python -m tests.support.faults CONFIG ...` trains like `moe_dist.train` until
it reaches the rank, step and phase in MOE_DIST_TEST_FAULT.

    MOE_DIST_TEST_FAULT='{"rank": 1, "step": 3, "phase": "before_step", "kind": "kill"}'

    phase            place
    before_step      before optimizer step `step` (1-based)
    after_step       after this step
    before_layer_1   before the second MoE layer's forward in this step
    in_move          in the fourth exchange of a move of experts after this step

    kind             effect on the rank itself
    kill             SIGKILL
    stop             SIGTERM, a stop request
    freeze           SIGSTOP
    raise            an exception
"""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROGRAM = ("-m", "tests.support.faults")
VARIABLE = "MOE_DIST_TEST_FAULT"


def fault(*, rank: int, step: int, phase: str, kind: str | Sequence[str]) -> dict[str, str]:
    """Returns the environment that makes one rank fail. If `kind` is a sequence, torchrun's attempts get one kind each,
    in order."""
    return {VARIABLE: json.dumps({"rank": rank, "step": step, "phase": phase, "kind": kind})}


def strike(kind: str) -> None:
    """Causes the fault in this process."""
    if kind == "raise":
        raise RuntimeError("a fault that a test injected")
    number = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "freeze": signal.SIGSTOP}[kind]
    os.kill(os.getpid(), number)


def inject(spec: Mapping[str, Any]) -> None:
    """Installs the fault on the rank that it names."""
    from moe_dist.runtime.environment import RankEnv

    if RankEnv.from_environment(os.environ).rank != spec["rank"]:
        return
    if not isinstance(spec["kind"], str):
        spec = {**spec, "kind": spec["kind"][int(os.environ["TORCHELASTIC_RESTART_COUNT"])]}
    from moe_dist.comm.all_to_all import AllToAll
    from moe_dist.comm.names import MOVED_EXPERTS
    from moe_dist.moe.layer import MoELayer
    from moe_dist.train.loop.trainer import Trainer
    from moe_dist.train.step.training_step import TrainingStep

    def around(owner: type, name: str, wrap: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda self, *args, **kwargs: wrap(original, self, *args, **kwargs))

    steps = {"taken": 0, "layers": 0, "exchanges": 0}

    def step(original: Callable[..., Any], self: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        due = steps["taken"] + 1 == spec["step"] - first["step"]
        if due and spec["phase"] == "before_step":
            strike(spec["kind"])
        steps["layers"] = 0 if due else -(1 << 30)
        result = original(self, *args, **kwargs)
        steps["taken"] += 1
        if due and spec["phase"] == "after_step":
            strike(spec["kind"])
        return result

    def layer(original: Callable[..., Any], self: MoELayer, *args: Any, **kwargs: Any) -> Any:
        if spec["phase"] == "before_layer_1" and steps["layers"] == 1:
            strike(spec["kind"])
        steps["layers"] += 1
        return original(self, *args, **kwargs)

    def exchange(original: Callable[..., Any], self: AllToAll, *args: Any, **kwargs: Any) -> Any:
        if spec["phase"] == "in_move" and kwargs["name"] == MOVED_EXPERTS:
            steps["exchanges"] += steps["taken"] == spec["step"] - first["step"]
            if steps["exchanges"] == 4:
                strike(spec["kind"])
        return original(self, *args, **kwargs)

    first = {"step": 0}

    def fit(original: Callable[..., Any], self: Trainer) -> Any:
        first["step"] = self.progress.step  # a resumed run does not count from 0
        return original(self)

    around(TrainingStep, "__call__", step)
    around(MoELayer, "forward", layer)
    around(Trainer, "fit", fit)
    around(AllToAll, "start", exchange)


if __name__ == "__main__":
    from moe_dist.runtime.command_line import run_command
    from moe_dist.train.__main__ import main

    if VARIABLE in os.environ:
        inject(json.loads(os.environ[VARIABLE]))
    run_command(main)
