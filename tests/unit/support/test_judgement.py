"""The requirements of campaigns: each accepts a correct run, and finds a faulty one."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from tests.support.fault_plan import Fault, FaultPlan
from tests.support.judgement import TRIED_AGAIN, look_back
from tests.support.tiny import tiny_config

ENOSPC = Fault(0, rank=1, step=4, phase="checkpoint write", kind="ENOSPC")
EXCEPTION = Fault(1, rank=0, step=12, phase="forward", kind="exception")


OTHER = Fault(1, rank=0, step=12, phase="commit", kind="EIO")
TOLD, SILENT, LATER = f"{TRIED_AGAIN}\n", "nothing\n", f"nothing\n--- attempt next, 3\n{TRIED_AGAIN}\n"
ENDED, UNTOLD = "a save that failed ended the attempt", "the log does not say that the next interval tries again"


@pytest.mark.parametrize(
    ("verdict", "log", "faults", "end", "problems"),
    [
        (0, TOLD, (ENOSPC,), {}, []),
        (1, TOLD, (ENOSPC,), {}, [ENDED]),
        (1, TOLD, (ENOSPC, EXCEPTION), {}, []),  # the exception ended the attempt
        (1, TOLD, (ENOSPC, OTHER), {}, [ENDED, ENDED]),  # two failed saves are no excuse for each other
        (0, SILENT, (ENOSPC,), {}, [UNTOLD]),
        (0, LATER, (ENOSPC,), {}, [UNTOLD]),
        (1, SILENT, (ENOSPC, EXCEPTION), {"step": 8, "committed": 0}, []),  # the attempt ended before it could tell
        (1, SILENT, (ENOSPC, EXCEPTION), {"step": 11, "committed": 0}, [UNTOLD, "are taken again"]),
        (0, TOLD, (ENOSPC,), {"committed": 5}, ["are taken again"]),
        (0, TOLD, (ENOSPC,), {"committed": 5, "trained": False}, []),  # the steps were lost by the attempt before
    ],
)
def test_a_run_after_faults(
    tmp_path: Path, verdict: int, log: str, faults: tuple[Fault, ...], end: dict[str, Any], problems: list[str]
) -> None:
    """A run of one attempt after some faults, as it is on disk."""
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    run, struck = RunFolder.of(config), tmp_path / "struck"
    struck.mkdir()
    lease = run.open(config, RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="first"))
    reason = "RuntimeError: a fault that a test injected" if verdict else "done"
    assert run.write_status(verdict=verdict, reason=reason, last_step=20, attempt_id="first")
    lease.release()
    for fault in faults:
        record = {"time": 100.0, "attempt": "first", "step": 5 if fault is ENOSPC else fault.step}
        (struck / f"struck_{fault.number}").write_text(json.dumps(record))
    for rank in (0, 1):
        run.log_of(rank).write_text(f"--- attempt none, 1\n{TRIED_AGAIN}\n--- attempt first, 2\n{log}")
    ends = [{"attempt": "first", "time": 101.0, "step": 20, "committed": 20, "trained": True, **end}]
    found = look_back(FaultPlan(faults, struck, tmp_path / "data", None), run, ends)[1]
    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))
