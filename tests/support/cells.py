"""The possible faults of a run: phases x kinds, with the reason for each infeasible cell."""

from typing import NamedTuple

IN_STEP = ("data", "forward", "dispatch", "combine", "backward", "optimizer")
SAVING = ("checkpoint write", "commit")
PHASES = ("import", *IN_STEP, *SAVING)
KINDS = ("exception", "SIGKILL", "SIGSTOP", "stop signals", "non-finite gradient", "ENOSPC", "EIO", "truncated file")


class Cell(NamedTuple):
    """A phase and a kind of fault."""

    phase: str
    kind: str


def _empty() -> dict[Cell, str]:
    reasons: dict[Cell, str] = {}
    for phase in PHASES:
        if phase not in ("forward", "dispatch", "combine", "backward"):
            reasons[Cell(phase, "non-finite gradient")] = {
                "data": "token ids are integers",
                "optimizer": "the vote on the gradients lies before it",
                "import": "there is no gradient yet",
            }.get(phase, "gradients are gone by then")
        if phase in IN_STEP:
            reasons[Cell(phase, "ENOSPC")] = "nothing is written"
        if phase in IN_STEP and phase != "data":
            reasons[Cell(phase, "EIO")] = "no file is touched"
            reasons[Cell(phase, "truncated file")] = "no file is touched"
    return reasons


EMPTY: dict[Cell, str] = _empty()
FEASIBLE: tuple[Cell, ...] = tuple(
    Cell(phase, kind) for phase in PHASES for kind in KINDS if Cell(phase, kind) not in EMPTY
)
