"""Training with planned faults: `python -m tests.support.injection CONFIG ...` trains as `moe_dist.train` does, and breaks
where the plan that MOE_DIST_TEST_PLAN names says. Each fault strikes once, whatever number of attempts the run takes.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support.cells import SAVING

PROGRAM = ("-m", "tests.support.injection")
PLAN, PRELOADED = "MOE_DIST_TEST_PLAN", "MOE_DIST_TEST_PRELOADED"
LOG_SECONDS = 0.05


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong once.

    Attributes:
        number: Place in the plan; a fault of phase `import` strikes at the first start after its predecessor.
        rank: The rank that breaks.
        step: Optimizer step (1-based) in which it breaks; for the phases of saving, the first save at that step or later.
        kind, phase: See `tests.support.cells`; the kind 'SIGKILL all' takes every rank with it.
        delay: Seconds from the beginning of the phase, for 'SIGKILL all'.
    """

    number: int
    rank: int
    step: int
    phase: str
    kind: str
    delay: float = 0.0


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a run.

    Attributes:
        folder: Where each fault that struck leaves a file.
        data: Prefix of the indexed files that truncation is for, with the run's own copy of the data.
        disk: Folder on a small file system to fill for ENOSPC; None where there is none, then writes are interposed.
    """

    faults: tuple[Fault, ...]
    folder: Path
    data: Path
    disk: Path | None

    def write(self, path: Path) -> None:
        values = {**asdict(self), "folder": str(self.folder), "data": str(self.data)}
        path.write_text(json.dumps({**values, "disk": str(self.disk) if self.disk else None}))

    @classmethod
    def read(cls, path: Path) -> "FaultPlan":
        values = json.loads(path.read_text())
        disk = Path(values["disk"]) if values["disk"] else None
        return cls(tuple(Fault(**each) for each in values["faults"]), Path(values["folder"]), Path(values["data"]), disk)

    def struck(self, number: int) -> dict[str, Any] | None:
        """What a fault that struck left: time, attempt, step taken last; None before."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / f"struck_{number}").read_text())
        return None


def build_interposer(folder: Path) -> Path:
    """Compiles the library that makes system calls fail."""
    library = folder / "libinterpose.so"
    source = Path(__file__).with_name("interpose.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library


def environment(plan: Path, interposer: Path) -> dict[str, str]:
    """Variables of a launcher whose ranks run `PROGRAM`."""
    return {PLAN: str(plan), PRELOADED: str(interposer)}


class Injector:
    """The faults of one rank, put in place around the functions of their phases."""

    def __init__(self, plan: FaultPlan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._step = 0  # taken so far
        self._lock = threading.Lock()

    # --- which fault is due

    def _due(self, phase: str, step: int) -> Fault | None:
        """Takes the fault of this rank that is due in a phase: it counts as having struck."""
        for fault in self._plan.faults:
            if (fault.phase, fault.rank) != (phase, self._rank) or self._plan.struck(fault.number) is not None:
                continue
            if phase == "import":
                due = fault.number == 0 or self._plan.struck(fault.number - 1) is not None
            else:
                due = fault.step <= step if phase in SAVING else fault.step == step
            if due and self._claim(fault, step):
                return fault
        return None

    def _claim(self, fault: Fault, step: int) -> bool:
        path = self._plan.folder / f"struck_{fault.number}"
        record = {"time": time.time(), "attempt": os.environ["MOE_DIST_ATTEMPT_ID"], "step": step}
        with self._lock:
            if path.exists():
                return False
            new = path.with_suffix(".new")
            new.write_text(json.dumps(record))
            new.rename(path)
        return True

    # --- how it strikes

    def _strike(self, fault: Fault) -> None:
        """For the kinds that need no more than the process."""
        if fault.kind == "exception":
            raise RuntimeError("a fault that a test injected")
        if fault.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "SIGKILL all":
            threading.Thread(target=self._kill_all, args=(fault.delay,), daemon=True).start()
        if fault.kind == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.kind == "stop signals":
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(os.getpid(), number)

    def _kill_all(self, delay: float) -> None:
        time.sleep(delay)
        parent, me = os.getppid(), os.getpid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in [int(each) for each in children if int(each) != me] + [me]:
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def _no_files(self, error: int, fragment: str) -> Iterator[None]:
        """System calls on matching files fail for as long as the block lasts."""
        fail = ctypes.CDLL(None).moe_dist_fail_files
        fail(error, fragment.encode())
        try:
            yield
        finally:
            fail(0, b"")

    @contextlib.contextmanager
    def _full_disk(self, fragment: str) -> Iterator[None]:
        if self._plan.disk is None:
            with self._no_files(errno.ENOSPC, fragment):
                yield
            return
        filler = self._plan.disk / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while stream.write(b"x" * size):
                        pass
        try:
            yield
        finally:
            filler.unlink()

    def _around_files(self, fault: Fault | None, fragment: str, call: Callable[[], Any]) -> Any:
        """The call with its files failing, as the fault wants it."""
        if fault is None:
            return call()
        if fault.kind == "ENOSPC":
            with self._full_disk(fragment):
                return call()
        if fault.kind == "EIO":
            with self._no_files(errno.EIO, fragment):
                return call()
        self._strike(fault)
        return call()

    # --- where: before torch is there

    def around_start(self) -> None:
        """Phase import: until the rank begins to build."""
        import moe_dist.train as program
        from moe_dist.runtime.run_folder import RunFolder

        check, opened, train = program.check_file, RunFolder.open, program.train
        fault = self._due("import", 0)
        wants = fault.kind if fault is not None else ""

        def check_file(*args: Any, **kwargs: Any) -> Any:
            if wants == "truncated file":
                os.truncate(f"{self._plan.data}.idx", 50)
            return self._around_files(fault if wants == "EIO" else None, ".idx", lambda: check(*args, **kwargs))

        def open_folder(*args: Any, **kwargs: Any) -> Any:
            return self._around_files(fault if wants == "ENOSPC" else None, "/runs/", lambda: opened(*args, **kwargs))

        def train_with_faults(*args: Any, **kwargs: Any) -> Any:
            if fault is not None and wants not in ("EIO", "ENOSPC", "truncated file"):
                sys.meta_path.insert(0, _AtImport("torch", lambda: self._strike(fault)))
            self.around_training()
            return train(*args, **kwargs)

        program.check_file, program.train = check_file, train_with_faults  # pyright: ignore
        RunFolder.open = open_folder  # pyright: ignore

    # --- where: in training and saving

    def around_training(self) -> None:
        import torch

        from moe_dist import training_step
        from moe_dist.checkpoint import manager
        from moe_dist.data.loader import TrainLoader
        from moe_dist.moe.layer import MoELayer
        from moe_dist.trainer import Trainer
        from moe_dist.training_step import TrainingStep

        def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
            original = getattr(owner, name)
            setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

        def fit(original: Callable[..., Any], trainer: Trainer) -> Any:
            self._step = trainer.progress.step
            trainer._take_step.optimizer.register_step_pre_hook(before_optimizer)
            return original(trainer)

        def before_optimizer(*_: Any) -> None:
            self._simple("optimizer")

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._step += 1
            return result

        def batches(original: Callable[..., Any], *args: Any) -> Any:
            fault = self._due("data", self._step + 1)
            if fault is not None and fault.kind == "truncated file":
                os.truncate(f"{self._plan.data}.bin", 2)
            return self._around_files(fault, ".bin", lambda: original(*args))

        def forward(original: Callable[..., Any], *args: Any) -> Any:
            fault = self._simple("forward")
            logits, reports = original(*args)
            return (logits * float("nan") if _spoils(fault) else logits), reports

        def micro_loss(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            if torch.is_grad_enabled() and loss.total.requires_grad:

                def on_gradient(gradient: Any) -> Any:
                    return gradient * float("nan") if _spoils(self._simple("backward")) else gradient

                loss.total.register_hook(on_gradient)
            return loss

        def moe_forward(original: Callable[..., Any], layer: MoELayer, *args: Any, **kwargs: Any) -> Any:
            self._wrap_dispatcher(layer.dispatcher)
            return original(layer, *args, **kwargs)

        def write(original: Callable[..., Any], folder: Path, number: int, *args: Any, **kwargs: Any) -> Any:
            fault = self._due("checkpoint write", _step_of(folder))
            result = self._around_files(fault, "/checkpoints/", lambda: original(folder, number, *args, **kwargs))
            if fault is not None and fault.kind == "truncated file":
                _halve(folder, number)
            return result

        def commit(original: Callable[..., Any], manager: Any, temporary: Path, target: Path, *args: Any) -> Any:
            fault = self._due("commit", _step_of(temporary))
            if fault is not None and fault.kind == "truncated file":
                _halve(temporary, fault.number % 2)
            return self._around_files(fault, "/checkpoints/", lambda: original(manager, temporary, target, *args))

        wrap(Trainer, "fit", fit)
        wrap(TrainingStep, "__call__", step)
        wrap(TrainLoader, "batches", batches)
        wrap(training_step, "forward", forward)
        wrap(training_step, "micro_loss", micro_loss)
        wrap(MoELayer, "forward", moe_forward)
        wrap(manager, "write_shard", write)
        wrap(manager.CheckpointManager, "_commit", commit)

    def _simple(self, phase: str) -> Fault | None:
        fault = self._due(phase, self._step + 1)
        if fault is not None:
            self._strike(fault)
        return fault

    def _wrap_dispatcher(self, dispatcher: Any) -> None:
        if "dispatch" in vars(dispatcher):
            return
        import torch

        dispatch, combine = dispatcher.dispatch, dispatcher.combine

        def dispatch_with_faults(*args: Any, **kwargs: Any) -> Any:
            fault = self._simple("dispatch") if torch.is_grad_enabled() else None
            dispatched = dispatch(*args, **kwargs)
            if not _spoils(fault):
                return dispatched
            return dataclasses.replace(dispatched, rows_RD=dispatched.rows_RD * float("nan"), weight_Q=dispatched.weight_Q)

        def combine_with_faults(*args: Any, **kwargs: Any) -> Any:
            fault = self._simple("combine") if torch.is_grad_enabled() else None
            y_TD = combine(*args, **kwargs)
            return y_TD * float("nan") if _spoils(fault) else y_TD

        dispatcher.dispatch, dispatcher.combine = dispatch_with_faults, combine_with_faults


class _AtImport:
    """Strikes when a module is first looked for."""

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
        # Only the ranks get it, not the launcher; the process keeps its id and its parent.
        os.environ["LD_PRELOAD"] = os.environ[PRELOADED]
        os.execv(sys.executable, [sys.executable, *PROGRAM, *sys.argv[1:]])

    import typer

    from moe_dist.train import main

    if PLAN in os.environ:
        Injector(FaultPlan.read(Path(os.environ[PLAN])), int(os.environ["RANK"])).around_start()
    typer.run(main)
