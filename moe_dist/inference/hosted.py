"""Writes checkpoints of transformers' models (engine.kind=transformers) as Hugging Face folders of the family."""

import os
import shutil
from pathlib import Path

import torch

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.config.engines.base import EngineSection
from moe_dist.errors import ConfigError
from moe_dist.hf.exporting import new_folder
from moe_dist.hf.host.model import HostedModel
from moe_dist.hf.host.weights import write_folder
from moe_dist.hf.source import COMPANIONS
from moe_dist.inference.loaded_run import find_trained
from moe_dist.train.start.resume import saved_config


def stored_engine(checkpoint: Path) -> EngineSection:
    """Returns the section of the engine that trained a checkpoint."""
    folder = find_checkpoint(checkpoint)
    return saved_config(open_checkpoint(folder).state.values, folder).engine


def write_hosted(checkpoint: Path, out: Path, data: Path | None = None) -> str:
    """Writes a checkpoint as the new folder `out`, with the tokenizer of `model.folder`, and returns the family. Needs host
    memory for the whole model in fp32.

    Raises:
        ConfigError: `out` exists, or the run cannot be read (`find_trained`).
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; nothing is overwritten: remove it, or choose another folder")
    run = find_trained(checkpoint, data=data)
    model = run.load(torch.device("cpu"))
    assert isinstance(model, HostedModel), "stored_engine says so"
    source = run.config.model.folder
    with new_folder(out) as folder:
        write_folder(model, folder)
        for name in COMPANIONS if source is not None else ():
            if source is not None and (Path(source) / name).is_file() and not (folder / name).exists():
                shutil.copyfile(Path(source) / name, folder / name)
    return run.config.model.family or ""
