"""Profiles some steps of a run. Writes a torch trace, whose ranges are named by layer and phase, and a memory snapshot.

Layers have profiler ranges only while steps are profiled, so other steps have no overhead.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder

PARTS = ("attention", "moe", "ffn", "moe.router", "moe.experts", "moe.shared")  # parts of a layer that get a profiler range
CALLED_WITHOUT_HOOKS = ("attention", "ffn")  # parts that `moe_dist.model.two_batches` calls without hooks
MEMORY_EVENTS = 200_000  # number of allocations and releases that CUDA's memory history keeps
MIB = 2**20

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps `first` to `last` on this rank. Writes the files after step `last`, or in `close`.

    Args:
        model: The transformer. Its `layers` get profiler ranges.
        name: Beginning of the names of all files, such as 'rank_0'.
    """

    def __init__(self, model: nn.Module, folder: Path, name: str, *, first: int, last: int, device: torch.device) -> None:
        self._model, self._folder, self._name = model, folder, name
        self._first, self._last, self._device = first, last, device
        self._profile: profile | None = None
        self._undo: list[Callable[[], None]] = []
        self._began = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds step `number`, counted from 1. If a run resumes after step `first`, profiling begins with the first
        step of the resumed run."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._profile is None:
            self._start(number)
        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Ends a running profile and writes its files. If writing fails, logs the error; the run continues."""
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.__exit__(None, None, None)
        for undo in self._undo:
            undo()
        self._undo.clear()
        try:
            self._write(ended)
        except OSError as error:
            logger.error("monitor.profile: %s; the files of this profile are missing or incomplete", error)
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, ended: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"{self._name}_from_step_{self._began}"
        ended.export_chrome_trace(f"{stem}.json.gz")
        stem.with_suffix(".memory.json").write_text(json.dumps(self._memory(ended), indent=1), encoding="utf-8")
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")  # for pytorch.org/memory_viz

    def _start(self, number: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._began = number
        self._undo = list(name_ranges(self._model))
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.__enter__()

    def _memory(self, ended: profile) -> dict[str, Any]:
        """Returns the sizes of parameters and process, and the net memory that was allocated in each named range."""
        parameters = list(self._model.parameters())
        ranges = {each.key: each for each in ended.key_averages() if each.is_user_annotation}
        cuda = self._device.type == "cuda"
        return {
            "parameters_mib": sum(each.numel() * each.element_size() for each in parameters) / MIB,
            "process_mib": psutil.Process().memory_info().rss / MIB,
            "device_peak_mib": torch.cuda.max_memory_allocated(self._device) / MIB if cuda else None,
            "ranges_mib": {
                name: (each.device_memory_usage if cuda else each.cpu_memory_usage) / MIB for name, each in ranges.items()
            },
        }


@contextmanager
def profiled_steps(
    config: Config, model: nn.Module, device: torch.device, folder: RunFolder, env: RankEnv
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Yields the function that surrounds each step (`Trainer.profile`). Without `monitor.profile`, and on ranks that are
    not profiled, this function does nothing."""
    section = config.monitor.profile
    if section is None or env.rank not in section.ranks:
        yield lambda _: nullcontext()
        return
    first, last = section.steps
    profiler = StepProfiler(model, folder.profile, f"rank_{env.rank}", first=first, last=last, device=device)
    try:
        yield profiler.step
    finally:
        profiler.close()


def name_ranges(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Gives each part of each layer a profiler range, such as 'layer 3/moe.experts', and each exchange a range, such as
    'layer 3/dispatch'. Yields functions that remove the ranges. Recomputation in backward has the same ranges as forward.
    With two-batch overlap, each half of a micro-batch has several 'layer 3/moe' ranges, with the exchanges between them."""
    halves = model.args.two_batch_overlap if isinstance(model, Transformer) else False
    layers: dict[str, nn.Module] = {f"layer {i}": layer for i, layer in enumerate(model.get_submodule("layers").children())}
    entered: list[str] = []  # names of the running layers; the innermost layer is last
    for name, layer in layers.items():
        for part in PARTS:
            module = _part(layer, part)
            if module is not None and halves and part in CALLED_WITHOUT_HOOKS:
                yield _method_range(module, "forward", [], f"{name}/{part}")
            elif module is not None:
                yield from _module_range(module, f"{name}/{part}")
        moe = _part(layer, "moe")
        dispatcher = getattr(moe, "dispatcher", None)
        if moe is None or dispatcher is None:
            continue
        if halves:
            yield _pieces_range(moe, name, entered)
        yield moe.register_forward_pre_hook(lambda *_, name=name: entered.append(name), prepend=True).remove
        yield moe.register_forward_hook(lambda *_: (entered.pop(), None)[1], always_call=True).remove
        for method in ("plan", "dispatch", "combine"):
            if method in vars(dispatcher) or not hasattr(dispatcher, method):
                continue  # an earlier layer shares this dispatcher, or a pipelined dispatcher has no `dispatch`
            yield _method_range(dispatcher, method, entered)


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _module_range(module: nn.Module, name: str) -> Iterator[Callable[[], None]]:
    open_ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(begin, prepend=True).remove
    yield module.register_forward_hook(end, always_call=True).remove  # also runs after an error, to keep ranges nested


def _pieces_range(moe: Any, name: str, entered: list[str]) -> Callable[[], None]:
    """Gives each piece of the generator `MoELayer.steps` a profiler range."""
    inner = moe.steps

    def wrapped(*args: Any) -> Any:
        pieces = inner(*args)
        while True:
            entered.append(name)
            try:
                with record_function(f"{name}/moe"):
                    next(pieces)
            except StopIteration as end:
                return end.value
            finally:
                entered.pop()
            yield

    moe.steps = wrapped
    return lambda: delattr(moe, "steps")


def _method_range(owner: Any, method: str, entered: list[str], name: str | None = None) -> Callable[[], None]:
    inner = getattr(owner, method)

    def wrapped(*args: Any, **options: Any) -> Any:
        with record_function(name or (f"{entered[-1]}/{method}" if entered else method)):
            return inner(*args, **options)

    setattr(owner, method, wrapped)
    return lambda: delattr(owner, method)
