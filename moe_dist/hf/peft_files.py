"""Reads adapters in PEFT's format, and converts the matrices of experts, whose layout `moe_dist.hf.adapters` describes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.config.experts.lora import HostedLoRASection
from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.source import AGAIN, inside, read_configuration

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PLAIN = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False}
_PLAIN |= dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"))


@contextmanager
def open_peft(folder: Path, lora: HostedLoRASection) -> Iterator[Any]:
    """Opens the tensors of a folder of adapters. Raises ConfigError if rank or alpha differ from `lora`, or if a field
    selects more than plain LoRA. Raises DataError if files are missing or damaged."""
    fields = {**_PLAIN, **read_configuration(folder, CONFIG_FILE)}
    needed = {**_PLAIN, "r": lora.rank, "lora_alpha": lora.alpha}
    if odd := [name for name, value in needed.items() if (fields.get(name) or None) != (value or None)]:
        raise ConfigError(
            f"model.lora.folder={str(folder)!r}: {CONFIG_FILE} has {odd[0]}={fields.get(odd[0])!r:.80}, but this run has "
            f"{needed[odd[0]]!r}; set model.lora.rank (r) and alpha (lora_alpha) to the folder's, or take other adapters"
        )
    path = inside(folder, WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise DataError(f"{path}: no safetensors file: {error}; {AGAIN}") from error


def joint(matrix: str, stack: Tensor) -> Tensor:
    """Returns PEFT's joint matrix for a stack of all experts' A [n, r, I] or B [n, O, r]. `matrix` is "A" or "B"."""
    return stack.flatten(0, 1) if matrix == "A" else stack.permute(1, 2, 0).flatten(1)


def stacked(matrix: str, whole: Tensor, num_experts: int) -> Tensor:
    """Undoes `joint`."""
    if matrix == "A":
        return whole.unflatten(0, (num_experts, -1))
    return whole.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
