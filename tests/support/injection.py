"""Training with planned faults: `python -m tests.support.injection CONFIG ...` trains like `moe_dist.train`, and fails
as the file in MOE_DIST_TEST_PLAN says.

Each fault strikes once, in whichever attempt reaches it.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.fault_plan import PLAN, PRELOADED, PROGRAM, Fault, FaultPlan
from tests.support.injector import Injector


class Injection:
    """Wraps the functions of each phase so that one rank's faults strike in them."""

    def __init__(self, injector: Injector) -> None:
        self._injector, self._data = injector, injector.plan.data
        self._step = 0  # steps taken so far

    # --- before torch is imported

    def around_start(self) -> None:
        """Covers the phase `import`, which lasts until the rank begins to build."""
        import moe_dist.train.__main__ as program
        from moe_dist.runtime.run_folder import RunFolder

        check, opened, train = program.check_file, RunFolder.open, program.train
        injector, fault = self._injector, self._injector.due("import", 0)
        wants = fault.kind if fault is not None else ""

        def check_file(*args: Any, **kwargs: Any) -> Any:
            if wants == "truncated file":
                os.truncate(f"{self._data}.idx", 50)
            return injector.around_files(fault if wants == "EIO" else None, ".idx", lambda: check(*args, **kwargs))

        def open_folder(*args: Any, **kwargs: Any) -> Any:
            return injector.around_files(fault if wants == "ENOSPC" else None, "/runs/", lambda: opened(*args, **kwargs))

        def train_with_faults(*args: Any, **kwargs: Any) -> Any:
            if fault is not None and wants not in ("EIO", "ENOSPC", "truncated file"):
                sys.meta_path.insert(0, _AtImport("torch", lambda: injector.strike(fault)))
            self._around_training()
            return train(*args, **kwargs)

        program.check_file, program.train = check_file, train_with_faults  # pyright: ignore
        RunFolder.open = open_folder  # pyright: ignore

    # --- in training and saving

    def _around_training(self) -> None:
        from moe_dist.checkpoint import manager
        from moe_dist.data.loader import TrainLoader
        from moe_dist.moe.layer import MoELayer
        from moe_dist.train.loop.trainer import Trainer
        from moe_dist.train.step import training_step
        from moe_dist.train.step.training_step import TrainingStep

        _wrap(Trainer, "fit", self._fit)
        _wrap(TrainingStep, "__call__", self._take_step)
        _wrap(TrainLoader, "batches", self._batches)
        _wrap(training_step, "forward", self._forward)
        _wrap(training_step, "micro_loss", self._micro_loss)
        _wrap(MoELayer, "forward", self._moe_forward)
        _wrap(manager, "write_shard", self._write_shard)
        _wrap(manager.CheckpointManager, "_commit", self._commit)

    def _fit(self, original: Callable[..., Any], trainer: Any) -> Any:
        self._step = trainer.progress.step
        trainer.take_step.optimizer.register_step_pre_hook(self._before_optimizer)
        return original(trainer)

    def _before_optimizer(self, *_: Any) -> None:
        self._strike_if_due("optimizer")

    def _take_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._step += 1
        return result

    def _batches(self, original: Callable[..., Any], *args: Any) -> Any:
        fault = self._injector.due("data", self._step + 1)
        if fault is not None and fault.kind == "truncated file":
            os.truncate(f"{self._data}.bin", 2)
        return self._injector.around_files(fault, ".bin", lambda: original(*args))

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = self._strike_if_due("forward")
        losses_BS, reports = original(*args, **kwargs)
        return (losses_BS * float("nan") if _spoils(fault) else losses_BS), reports

    def _micro_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import torch

        loss = original(*args, **kwargs)
        if torch.is_grad_enabled() and loss.total.requires_grad:

            def on_gradient(gradient: Any) -> Any:
                return gradient * float("nan") if _spoils(self._strike_if_due("backward")) else gradient

            loss.total.register_hook(on_gradient)
        return loss

    def _moe_forward(self, original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
        dispatcher = layer.dispatcher
        if "dispatch" not in vars(dispatcher):
            _wrap(dispatcher, "dispatch", self._dispatch)
            _wrap(dispatcher, "combine", self._combine)
        return original(layer, *args, **kwargs)

    def _dispatch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = self._strike_if_training("dispatch")
        dispatched = original(*args, **kwargs)
        return dataclasses.replace(dispatched, rows_RD=dispatched.rows_RD * float("nan")) if _spoils(fault) else dispatched

    def _combine(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = self._strike_if_training("combine")
        y_TD = original(*args, **kwargs)
        return y_TD * float("nan") if _spoils(fault) else y_TD

    def _write_shard(self, original: Callable[..., Any], folder: Path, number: int, *args: Any, **kwargs: Any) -> Any:
        fault = self._injector.due("checkpoint write", _step_of(folder))
        result = self._injector.around_files(fault, "/checkpoints/", lambda: original(folder, number, *args, **kwargs))
        if fault is not None and fault.kind == "truncated file":
            _halve(folder, number)
        return result

    def _commit(self, original: Callable[..., Any], manager: Any, temporary: Path, target: Path, *args: Any) -> Any:
        fault = self._injector.due("commit", _step_of(temporary))
        if fault is not None and fault.kind == "truncated file":
            _halve(temporary, fault.number % 2)
        return self._injector.around_files(fault, "/checkpoints/", lambda: original(manager, temporary, target, *args))

    def _strike_if_due(self, phase: str) -> Fault | None:
        fault = self._injector.due(phase, self._step + 1)
        if fault is not None:
            self._injector.strike(fault)
        return fault

    def _strike_if_training(self, phase: str) -> Fault | None:
        """Strikes only in training, because an evaluation belongs to no step."""
        import torch

        return self._strike_if_due(phase) if torch.is_grad_enabled() else None


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces `owner.name` by `wrapper`, which gets the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


class _AtImport:
    """Strikes at the first import of a module."""

    def __init__(self, name: str, strike: Callable[[], None]) -> None:
        self._name, self._strike = name, strike

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name == self._name:
            sys.meta_path.remove(self)  # pyright: ignore
            self._strike()


def _spoils(fault: Fault | None) -> bool:
    return fault is not None and fault.kind == "non-finite gradient"


def _step_of(folder: Path) -> int:
    return int(folder.name.split(".")[0].removeprefix("step_"))


def _halve(folder: Path, number: int) -> None:
    shard = folder / f"shard_{number:05d}.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


if __name__ == "__main__":
    if os.environ.get(PRELOADED) and os.environ.get("LD_PRELOAD") != os.environ[PRELOADED]:
        # Only the ranks preload the library. exec keeps the process id and the parent.
        os.environ["LD_PRELOAD"] = os.environ[PRELOADED]
        os.execv(sys.executable, [sys.executable, *PROGRAM, *sys.argv[1:]])

    import typer

    from moe_dist.train.__main__ import main

    if PLAN in os.environ:
        Injection(Injector(FaultPlan.read(Path(os.environ[PLAN])), int(os.environ["RANK"]))).around_start()
    typer.run(main)
