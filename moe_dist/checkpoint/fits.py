"""Compares the tensors of a checkpoint and a model. Checks that all can be loaded, or selects those that can."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.index import Entry, Index, Source, index_problems, listed, stored_name
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import EXPERT_NAME

# Torch dtypes by their names in safetensors files; `index.ITEMSIZE` has the same names.
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
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def misfit(entry: Entry, spec: TensorSpec, source: str = "the checkpoint") -> str:
    """Returns the reason why a stored tensor cannot be loaded into a tensor of the model; an empty text if it can. The text
    calls the stored tensor `source`."""
    if entry.shape != spec.shape:
        return f"shape {spec.shape} in the model, {entry.shape} in {source}"
    return "" if DTYPES.get(entry.dtype) == spec.dtype else f"{spec.dtype} in the model, {entry.dtype} in {source}"


def differences(index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> dict[str, str]:
    """Maps the name of each tensor that differs between checkpoint and model to a text that states the difference. A tensor
    differs if one of the two lacks it, or if its shape or dtype differs."""
    problems = {
        name: ABSENT if (entry := index.tensors.get(name)) is None else misfit(entry, spec)
        for name, spec in specs.items()
        if math.prod(spec.shape)  # a tensor without elements, such as the null rows of 0 null experts, is not saved
    }
    surplus = sorted(index.tensors.keys() - specs.keys())  # sorted, so that messages always have the same order
    problems |= {
        name: "in the checkpoint, but not in the model"
        for name in surplus
        if ignore_prefix is None or not name.startswith(ignore_prefix)
    }
    return {name: problem for name, problem in problems.items() if problem}


def check_fits(folder: Path, index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> None:
    """Raises ConfigError, which lists all differences, unless the tensors of checkpoint and model have equal names, shapes
    and dtypes."""
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
                heads + _lines(problems),
            )
        )


def check_complete(index: Index, specs: Mapping[str, TensorSpec]) -> None:
    """Asserts that a checkpoint's index contains every element of every tensor of the model exactly once. A save calls this
    function before its commit. A failure is a bug of moe_dist."""
    problems = index_problems(index) + _lines(differences(index, specs))  # also finds elements that no shard contains
    if problems:
        raise AssertionError(listed("the written shards are incomplete", problems))


def sizes(shapes: Mapping[str, Iterable[int]]) -> dict[str, int]:
    """Finds four kinds of sizes from the tensors' names and shapes: number of layers, number of experts per group, hidden
    width and vocabulary size."""
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


@dataclass(frozen=True)
class Taken:
    """Records which parameters were loaded from a checkpoint and which were not.

    Attributes:
        folder: Folder of the checkpoint.
        taken: Parameters that were loaded.
        elements: Total number of elements of the loaded parameters.
        kept: Maps each parameter of the model that keeps its initial values to the reason.
        left: Parameters of the checkpoint that were not loaded.
        made_of: Maps each loaded parameter whose name in the checkpoint differs to its name in the checkpoint.
    """

    folder: Path
    taken: tuple[str, ...]
    elements: int
    kept: Mapping[str, str]
    left: tuple[str, ...]
    made_of: Mapping[str, str]

    def report(self) -> str:
        """Returns a report of the load for the user. Parameters whose names differ only in numbers share one line."""
        lines = [f"weights from {self.folder}; optimizer, step and position in the data start anew"]
        lines.append(f"loaded {len(self.taken)} tensors, {self.elements:,} numbers:")
        lines += _families(name for name in self.taken if name not in self.made_of)
        lines += _families(f"{name} of {self.made_of[name]}" for name in self.taken if name in self.made_of)
        lines.append(f"kept {len(self.kept)} tensors of the model as initialised{':' if self.kept else ''}")
        for reason in sorted(set(self.kept.values())):
            lines += _families((name for name, why in self.kept.items() if why == reason), f" ({reason})")
        lines.append(f"left {len(self.left)} tensors of the checkpoint{':' if self.left else ''}")
        return "\n".join([*lines, *_families(self.left)])


def fitting(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Maps each parameter with equal shape and dtype in checkpoint and model to itself. The result is equal on all
    ranks."""
    parameters = _parameters(specs)
    differ = differences(contents.index, parameters)
    return {name: name for name in parameters if name in contents.index.tensors and name not in differ}


def taken_from(contents: Contents, specs: Mapping[str, TensorSpec], sources: Mapping[str, Source]) -> Taken:
    """Returns the `Taken` of a load. `sources` maps each loaded parameter to its source in the checkpoint."""
    index, parameters = contents.index, _parameters(specs)
    there = {name: stored_name(source) for name, source in sources.items()}
    reasons, used = differences(index, parameters), set(there.values())
    return Taken(
        folder=contents.folder,
        taken=tuple(name for name in parameters if name in sources),
        elements=sum(math.prod(parameters[name].shape) for name in sources),
        kept={name: reasons[name] for name in parameters if name in reasons and name not in sources},
        left=tuple(name for name in index.tensors if name not in used and not name.startswith(OPTIMIZER_PREFIX)),
        made_of={name: stored for name, stored in there.items() if sources[name] != name},
    )


def _parameters(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if not name.startswith(OPTIMIZER_PREFIX)}


def _lines(problems: Mapping[str, str]) -> list[str]:
    return [f"{name}: {problem}" for name, problem in problems.items()]


def _families(names: Iterable[str], suffix: str = "") -> list[str]:
    """Returns one line per set of names that differ only in numbers."""
    counts = Counter(_NUMBER.sub("*", name) for name in names)
    return [f"  {family}{f' x {count}' if count > 1 else ''}{suffix}" for family, count in counts.items()]
