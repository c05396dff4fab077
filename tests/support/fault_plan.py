"""The plan of a run's faults, as its ranks read it."""

import contextlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = ("-m", "tests.support.injection")
PLAN, PRELOADED = "MOE_DIST_TEST_PLAN", "MOE_DIST_TEST_PRELOADED"
IN_STEP = ("data", "forward", "dispatch", "combine", "backward", "optimizer")
SAVING = ("checkpoint write", "commit")
PHASES = ("import", *IN_STEP, *SAVING)
KINDS = ("exception", "SIGKILL", "SIGSTOP", "stop signals", "non-finite gradient", "ENOSPC", "EIO", "truncated file")


class Cell(NamedTuple):
    """A phase and a kind of fault."""

    phase: str
    kind: str

    @property
    def feasible(self) -> bool:
        """Returns whether the phase has the gradients, writes or files that this kind of fault needs
        (docs/reliability.md)."""
        if self.kind == "non-finite gradient":
            return self.phase in ("forward", "dispatch", "combine", "backward")
        if self.kind == "ENOSPC":
            return self.phase not in IN_STEP
        return self.kind not in ("EIO", "truncated file") or self.phase not in IN_STEP or self.phase == "data"


FEASIBLE = tuple(cell for phase in PHASES for kind in KINDS if (cell := Cell(phase, kind)).feasible)


@dataclass(frozen=True)
class Fault:
    """A fault that strikes once.

    Attributes:
        number: Position in the plan. A fault of phase `import` strikes at the first start after the previous fault.
        rank: The rank that fails.
        step: Optimizer step (1-based) of the fault; for phases of saving, the first save at this step or later.
        kind, phase: Members of KINDS and PHASES. The kind 'SIGKILL all' kills every rank.
        delay: Seconds from the beginning of the phase, for 'SIGKILL all'.
    """

    number: int
    rank: int
    step: int
    phase: str
    kind: str
    delay: float = 0.0


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a run.

    Attributes:
        folder: Each fault that has struck leaves a file here.
        data: Prefix of the indexed files to truncate, in the run's own copy of the data.
        disk: Folder on a small file system, which ENOSPC faults fill. If None, the interposer makes writes fail instead.
    """

    faults: tuple[Fault, ...]
    folder: Path
    data: Path
    disk: Path | None

    def write(self, path: Path) -> None:
        values = {**asdict(self), "folder": str(self.folder), "data": str(self.data)}
        path.write_text(json.dumps({**values, "disk": str(self.disk) if self.disk else None}))

    @classmethod
    def read(cls, path: Path) -> "FaultPlan":
        values = json.loads(path.read_text())
        disk = Path(values["disk"]) if values["disk"] else None
        return cls(tuple(Fault(**each) for each in values["faults"]), Path(values["folder"]), Path(values["data"]), disk)

    def struck(self, number: int) -> dict[str, Any] | None:
        """Returns the time, attempt and last step of a fault that has struck, or None before it strikes."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / f"struck_{number}").read_text())
        return None


def build_interposer(folder: Path) -> Path:
    """Compiles the library that makes system calls fail."""
    library = folder / "libinterpose.so"
    source = Path(__file__).with_name("interpose.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library


def environment(plan: Path, interposer: Path) -> dict[str, str]:
    """Returns the environment of a launcher whose ranks run `PROGRAM` with the plan."""
    return {PLAN: str(plan), PRELOADED: str(interposer)}
