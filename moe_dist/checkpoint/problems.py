"""What can be wrong with a checkpoint, in the words that all messages use. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_dist.checkpoint.index import listed
from moe_dist.errors import DataError

Kind = Literal["missing", "truncated", "damaged", "mixed up", "foreign", "incomplete", "not finite"]


@dataclass(frozen=True)
class CheckpointProblem:
    """One fault of a checkpoint.

    Attributes:
        kind: missing (a file is not there), truncated (cut short), damaged (bits changed), mixed up (a file of another
            save, or a whole checkpoint under the name of another step), foreign (no file of a checkpoint of ours, or of
            another model), incomplete (a tensor is not there, or not once), not finite (a tensor holds nan or inf).
        file: Name of the file in the checkpoint's folder; empty where the fault is of the whole.
        tensor: Logical name; empty where the fault is of a file.
    """

    kind: Kind
    file: str
    detail: str
    tensor: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {': '.join(part for part in (self.file, self.tensor, self.detail) if part)}"


class DamagedError(DataError):
    """A checkpoint is not what was saved. `findings` has each fault with its kind."""

    def __init__(self, head: str, findings: Sequence[CheckpointProblem], *, fix: str = "") -> None:
        self.head, self.findings = head, tuple(findings)
        text = listed(head, [str(finding) for finding in findings])
        super().__init__(text + (f"\n{fix}" if fix else ""), see="docs/checkpoints.md")
