"""Loads the matching weights of another model's checkpoint, and reports which ones were loaded."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.fits import differences
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Taken:
    """Result of a partial load.

    Attributes:
        taken: Parameters that were loaded.
        elements: Their number of elements.
        kept: Parameters of the model that keep their initial values, with the reason.
        left: Parameters of the checkpoint that were not used.
        made_of: For parameters of `taken` with another name in the checkpoint, that name.
    """

    folder: Path
    taken: tuple[str, ...]
    elements: int
    kept: Mapping[str, str]
    left: tuple[str, ...]
    made_of: Mapping[str, str] = field(default_factory=dict)

    def report(self) -> str:
        """A readable report; names that differ only in layer or expert share a line."""
        reasons = sorted({reason for reason in self.kept.values()})  # one block of the report per reason
        lines = [f"weights from {self.folder}; optimizer, step and position in the data start anew"]
        lines.append(f"loaded {len(self.taken)} tensors, {self.elements:,} numbers:")
        lines += _families(name for name in self.taken if name not in self.made_of)
        lines += _families(f"{name} of {self.made_of[name]}" for name in self.taken if name in self.made_of)
        lines.append(f"kept {len(self.kept)} tensors of the model as initialised{':' if self.kept else ''}")
        for reason in reasons:
            lines += _families((name for name, why in self.kept.items() if why == reason), f" ({reason})")
        lines.append(f"left {len(self.left)} tensors of the checkpoint{':' if self.left else ''}")
        return "\n".join([*lines, *_families(self.left)])


def fitting(contents: Contents, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The parameters that a checkpoint and a model share by name, shape and dtype, each loaded by its own name; the same on
    all ranks."""
    parameters = _parameters(specs)
    differ = {line.partition(": ")[0] for line in differences(contents.index, parameters)}
    return {name: name for name in parameters if name in contents.index.tensors and name not in differ}


def taken_from(contents: Contents, specs: Mapping[str, TensorSpec], sources: Mapping[str, str]) -> Taken:
    """The result of a partial load, given the name in the checkpoint of each loaded parameter."""
    index, parameters = contents.index, _parameters(specs)
    reasons = dict(line.split(": ", 1) for line in differences(index, parameters))
    used = set(sources.values())
    return Taken(
        folder=contents.folder,
        taken=tuple(name for name in parameters if name in sources),
        elements=sum(math.prod(parameters[name].shape) for name in sources),
        kept={name: reasons[name] for name in parameters if name in reasons and name not in sources},
        left=tuple(name for name in index.tensors if name not in used and not name.startswith(OPTIMIZER_PREFIX)),
        made_of={name: there for name, there in sources.items() if there != name},
    )


def _parameters(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if not name.startswith(OPTIMIZER_PREFIX)}


def _families(names: Iterable[str], behind: str = "") -> list[str]:
    counts = Counter(_NUMBER.sub("*", name) for name in names)
    return [f"  {family}{f' x {count}' if count > 1 else ''}{behind}" for family, count in counts.items()]
