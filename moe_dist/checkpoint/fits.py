"""Compares a checkpoint with a model: a summary of the differences, then each tensor."""

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

ABSENT = "in the model, but not in the checkpoint"

_LAYER = re.compile(r"layers\.(\d+)\.")


def differences(index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> list[str]:
    """One line for each tensor that is missing, unexpected, or different in shape or dtype."""
    problems = []
    for name, spec in specs.items():
        entry = index.tensors.get(name)
        if not math.prod(spec.shape):
            continue  # empty tensors are not saved, as the null experts of a group without null experts
        if entry is None:
            problems.append(f"{name}: {ABSENT}")
        elif entry.shape != spec.shape:
            problems.append(f"{name}: shape {spec.shape} in the model, {entry.shape} in the checkpoint")
        elif DTYPES.get(entry.dtype) != spec.dtype:
            problems.append(f"{name}: {spec.dtype} in the model, {entry.dtype} in the checkpoint")
    surplus = index.tensors.keys() - specs.keys()
    problems += [
        f"{name}: in the checkpoint, but not in the model"
        for name in sorted(surplus)  # sorted, because sets have no order and messages should
        if ignore_prefix is None or not name.startswith(ignore_prefix)
    ]
    return problems


def check_fits(folder: Path, index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> None:
    """Checks that a checkpoint belongs to this model.

    Raises:
        ConfigError: it does not; lists all differences.
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
                f"checkpoint {folder} belongs to another model ({len(problems)} tensors differ); resume with its own "
                "configuration (config.yaml of its run), start a new run, or load matching tensors with run.init_from",
                heads + problems,
            )
        )


def check_complete(index: Index, specs: Mapping[str, TensorSpec]) -> None:
    """Before a commit: asserts that the index contains every tensor of the model exactly once. A failure is a bug."""
    problems = index_problems(index) + differences(index, specs)  # the index itself first: a gap would load as garbage
    if problems:
        raise AssertionError(listed("the written shards are incomplete", problems))


def sizes(shapes: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """Number of layers, experts of each group, width and vocabulary size, derived from the tensors' names and shapes."""
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
