"""Exact resume for transformers' Trainer with models that `from_pretrained(distributed_config=...)` has sharded.

    class ResumableTrainer(ExactResume, Trainer): ...  # or SFTTrainer

Trainer (transformers 5.24) refuses to save the optimizer of such a model. The mixin adds two folders of distributed
checkpoints to each `checkpoint-N`, written by all ranks, beside the whole model that Trainer writes. A resumed run on
the same number of ranks continues to the same bits; another number of ranks, or another `ep_size`, can load it as well.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from transformers.trainer import SCHEDULER_NAME

from moe_dist.errors import ConfigError

MODEL, OPTIMIZER = "sharded_model", "sharded_optimizer"  # folders of a checkpoint


class ExactResume(Trainer):
    """Saves and loads weights, optimizer and schedule of a sharded model. Other models are saved as Trainer does."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *values: Any, **named: Any) -> None:
        arguments = named.get("args", values[1] if len(values) > 1 else None)  # the second parameter of each Trainer
        if arguments is None or arguments.save_only_model:
            super().__init__(*values, **named)
            return
        arguments.save_only_model = True  # the constructor refuses anything else
        try:
            super().__init__(*values, **named)
        finally:
            arguments.save_only_model = False
        self.args.save_only_model = False  # some trainers copy their arguments

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        self.model.save_pretrained(folder / MODEL, distributed_checkpoint=True)
        save_optimizer_distributed(self.model, self.optimizer.optimizer, str(folder / OPTIMIZER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        missing = [name for name in (MODEL, OPTIMIZER, SCHEDULER_NAME) if not (folder / name).exists()]
        if missing:
            raise ConfigError(
                f"resume_from_checkpoint={folder} has no {', '.join(missing)}: it was saved with save_only_model=True, or "
                "the save was cut off; give an earlier checkpoint, or load its weights by from_pretrained"
            )
        _load_model_checkpoint_distributed(self.model, folder / MODEL)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(checkpoint) / OPTIMIZER))
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
