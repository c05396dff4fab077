"""Beginning a run with the weights of another model's checkpoint: what fits, what does not, and how that is told."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_dist.checkpoint.fits import differences
from moe_dist.checkpoint.index import Index
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, TensorSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Taken:
    """What a model took over.

    Attributes:
        folder: Of the checkpoint.
        taken: Parameters that were loaded.
        elements: How many numbers that are.
        kept: Parameters of the model that stay as they were initialised, with the reason.
        left: Parameters of the checkpoint that were not used.
    """

    folder: Path
    taken: tuple[str, ...]
    elements: int
    kept: Mapping[str, str]
    left: tuple[str, ...]

    def report(self) -> str:
        """What was taken and what was not; names that differ in layer or expert alone share a line."""
        reasons = sorted({reason for reason in self.kept.values()})
        lines = [f"weights from {self.folder}; optimizer, step and position in the data are new"]
        lines += [f"took {len(self.taken)} tensors, {self.elements:,} numbers:", *_families(self.taken)]
        lines.append(f"kept {len(self.kept)} tensors of the model as initialised{':' if self.kept else ''}")
        for reason in reasons:
            lines += _families((name for name, why in self.kept.items() if why == reason), f" ({reason})")
        lines.append(f"left {len(self.left)} tensors of the checkpoint{':' if self.left else ''}")
        return "\n".join([*lines, *_families(self.left)])


def fitting_names(index: Index, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Parameters that a checkpoint and a model share, by name, shape and dtype; the same on all ranks."""
    parameters = _parameters(specs)
    differ = {line.partition(": ")[0] for line in differences(index, parameters)}
    return {name for name in parameters if name in index.tensors and name not in differ}


def taken_from(folder: Path, index: Index, specs: Mapping[str, TensorSpec]) -> Taken:
    """What `fitting_names` takes of a checkpoint."""
    parameters, taken = _parameters(specs), fitting_names(index, specs)
    reasons = dict(line.split(": ", 1) for line in differences(index, parameters))
    return Taken(
        folder=folder,
        taken=tuple(name for name in parameters if name in taken),
        elements=sum(math.prod(parameters[name].shape) for name in taken),
        kept={name: reasons[name] for name in parameters if name in reasons},
        left=tuple(name for name in index.tensors if name not in taken and not name.startswith(OPTIMIZER_PREFIX)),
    )


def _parameters(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if not name.startswith(OPTIMIZER_PREFIX)}


def _families(names: Iterable[str], behind: str = "") -> list[str]:
    counts = Counter(_NUMBER.sub("*", name) for name in names)
    return [f"  {family}{f' x {count}' if count > 1 else ''}{behind}" for family, count in counts.items()]
