"""Problems of a checkpoint. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_dist.checkpoint.index import listed
from moe_dist.errors import DataError

Kind = Literal["missing", "truncated", "damaged", "mixed up", "foreign", "incomplete", "not finite"]


@dataclass(frozen=True)
class CheckpointProblem:
    """One problem of a checkpoint.

    Attributes:
        kind: missing (a file does not exist), truncated (a file is cut short), damaged (bits changed), mixed up (a file
            belongs to another save, or the folder's name to another step), foreign (no checkpoint file, or of another
            model), incomplete (a tensor is missing or duplicated), not finite (a tensor contains nan or inf).
        file: Name of the file in the checkpoint's folder; empty if the problem concerns the whole checkpoint.
        tensor: Logical name of the tensor; empty if the problem concerns a file.
    """

    kind: Kind
    file: str
    detail: str
    tensor: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {': '.join(part for part in (self.file, self.tensor, self.detail) if part)}"


class DamagedError(DataError):
    """A checkpoint differs from what was saved. `file_problems` lists each problem with its kind."""

    def __init__(self, head: str, problems: Sequence[CheckpointProblem], *, fix: str = "") -> None:
        self.head, self.file_problems = head, tuple(problems)
        text = listed(head, [str(problem) for problem in problems])
        super().__init__(text + (f"\n{fix}" if fix else ""), see="docs/checkpoints.md")
