"""Whether a checkpoint is of the model at hand: every difference, in a few lines first, then tensor by tensor."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from moe_dist.checkpoint.index import Index, index_problems, listed
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.errors import ConfigError
from moe_dist.placement.roles import EXPERT_NAME

# safetensors' names of the dtypes, see `index.ITEMSIZE`.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

ABSENT = "the model has it, the checkpoint does not"

_LAYER = re.compile(r"layers\.(\d+)\.")


def differences(index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> list[str]:
    """What a checkpoint and a model do not share: missing, surplus, other shape, other dtype; one line a tensor."""
    problems = []
    for name, spec in specs.items():
        entry = index.tensors.get(name)
        if not math.prod(spec.shape):
            continue  # nothing to keep, as the null experts of a group that has none
        if entry is None:
            problems.append(f"{name}: {ABSENT}")
        elif entry.shape != spec.shape:
            problems.append(f"{name}: shape {spec.shape} in the model, {entry.shape} in the checkpoint")
        elif DTYPES.get(entry.dtype) != spec.dtype:
            problems.append(f"{name}: {spec.dtype} in the model, {entry.dtype} in the checkpoint")
    surplus = index.tensors.keys() - specs.keys()
    problems += [
        f"{name}: the checkpoint has it, the model does not"
        for name in sorted(surplus)
        if ignore_prefix is None or not name.startswith(ignore_prefix)
    ]
    return problems


def check_fits(folder: Path, index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> None:
    """Refuses a checkpoint of another model.

    Raises:
        ConfigError: with all that differs.
    """
    problems = differences(index, specs, ignore_prefix=ignore_prefix)
    if problems:
        here = sizes({name: spec.shape for name, spec in specs.items()})
        there = sizes({name: entry.shape for name, entry in index.tensors.items()})
        heads = [
            f"{what}: {here.get(what, 'none')} in the model, {there.get(what, 'none')} in the checkpoint"
            for what in dict.fromkeys([*here, *there])
            if here.get(what) != there.get(what)
        ]
        raise ConfigError(
            listed(
                f"checkpoint {folder} is of another model ({len(problems)} tensors differ); resume with the configuration it "
                "was written with (config.yaml of its run), start a new run, or take over what fits with run.init_from",
                heads + problems,
            )
        )


def check_complete(index: Index, specs: Mapping[str, TensorSpec]) -> None:
    """Before a commit: every tensor of the model is in the index exactly once. A fault is a bug of ours."""
    problems = index_problems(index) + differences(index, specs)
    if problems:
        raise AssertionError(listed("the written shards are not the whole state", problems))


def sizes(shapes: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """Layers, experts of each group, width and vocabulary, as far as the names of a model's tensors tell them."""
    found: dict[str, int] = {}
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if layers:
        found["layers"] = len(layers)
    experts: dict[str, set[str]] = {}
    for name in shapes:
        if match := EXPERT_NAME.match(name):
            experts.setdefault(match["group"], set()).add(match["expert"])
    found |= {f"experts of group {group}": len(each) for group, each in sorted(experts.items())}
    embedding = tuple(shapes.get("embedding.weight", ()))
    if len(embedding) == 2:
        found |= {"vocabulary": embedding[0], "width": embedding[1]}
    return found
