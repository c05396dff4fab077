"""Records the routing of a model that the Trainer of transformers trains.

Trainer(model=model, callbacks=[RecordRouting("runs/qwen3")], ...)
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_dist.monitor.attached.attach import Attached


class RecordRouting(TrainerCallback):
    """Writes a record of each optimizer step, like `attach`.

    A step is recorded when the next one begins, because Trainer tells a step's loss, gradient norm and learning rate after
    the step, and only for steps that it logs. `perf/step_seconds` therefore includes the time of saves and evaluations.

    Args:
        folder: Folder for the records; None for the folder `routing` in `TrainingArguments.output_dir`.
        options: Arguments of `Attached`. If training resumes, records after its checkpoint are dropped.
    """

    def __init__(self, folder: str | Path | None = None, **options: Any) -> None:
        self._folder, self._options = folder, options
        self._attached: Attached | None = None
        self._logs: dict[str, float] | None = None  # None before the first step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        folder = Path(args.output_dir or ".") / "routing" if self._folder is None else self._folder
        self._attached = Attached(objects["model"], folder, last_step=state.global_step, **self._options)
        self._logs = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        self._record()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        self._logs = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        if self._logs is not None and logs is not None:
            self._logs.update(logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        self._record()
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    def _record(self) -> None:
        """Records the step that has ended, if there is one."""
        if self._attached is None or self._logs is None:
            return
        logs, self._logs = self._logs, None
        self._attached.step(logs.get("loss"), lr=logs.get("learning_rate"), grad_norm=logs.get("grad_norm"))
