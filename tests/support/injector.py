"""Finds the due faults of one rank, and causes them."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.fault_plan import SAVING, Fault, FaultPlan


class Injector:
    """Causes each of one rank's faults once, in whichever attempt reaches it."""

    def __init__(self, plan: FaultPlan, rank: int) -> None:
        self.plan, self._rank = plan, rank
        self._lock = threading.Lock()
        full = [each for each in plan.faults if each.kind == "ENOSPC" and plan.struck(each.number) is not None]
        if rank == 0 and full and plan.disk is not None:  # a rank killed while it filled the disk has left it full
            (plan.disk / "filler").unlink(missing_ok=True)

    # --- find the due fault

    def due(self, phase: str, step: int) -> Fault | None:
        """Returns the fault that is due on this rank in a phase, and records that it struck."""
        for fault in self.plan.faults:
            if (fault.phase, fault.rank) != (phase, self._rank) or self.plan.struck(fault.number) is not None:
                continue
            if phase == "import":
                due = fault.number == 0 or self.plan.struck(fault.number - 1) is not None
            else:
                due = fault.step <= step if phase in SAVING else fault.step == step
            if due and self._claim(fault, step):
                return fault
        return None

    def _claim(self, fault: Fault, step: int) -> bool:
        path = self.plan.folder / f"struck_{fault.number}"
        record = {"time": time.time(), "attempt": os.environ["MOE_DIST_ATTEMPT_ID"], "step": step}
        with self._lock:
            if path.exists():
                return False
            new = path.with_suffix(".new")
            new.write_text(json.dumps(record))
            new.rename(path)
        return True

    # --- cause a fault

    def strike(self, fault: Fault) -> None:
        """Causes faults of the kinds that need only this process."""
        if fault.kind == "exception":
            raise RuntimeError("a fault that a test injected")
        if fault.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "SIGKILL all":
            threading.Thread(target=self._kill_all, args=(fault.delay,), daemon=True).start()
        if fault.kind == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.kind == "stop signals":
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(os.getpid(), number)

    def _kill_all(self, delay: float) -> None:
        time.sleep(delay)
        parent, me = os.getppid(), os.getpid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for pid in [int(each) for each in children if int(each) != me] + [me]:
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def _no_files(self, error: int, fragment: str) -> Iterator[None]:
        """Makes system calls on matching files fail within the block."""
        fail = ctypes.CDLL(None).moe_dist_fail_files
        fail(error, fragment.encode())
        try:
            yield
        finally:
            fail(0, b"")

    @contextlib.contextmanager
    def _full_disk(self, fragment: str) -> Iterator[None]:
        if self.plan.disk is None:
            with self._no_files(errno.ENOSPC, fragment):
                yield
            return
        filler = self.plan.disk / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while stream.write(b"x" * size):
                        pass
        try:
            yield
        finally:
            filler.unlink()

    def around_files(self, fault: Fault | None, fragment: str, call: Callable[[], Any]) -> Any:
        """Calls `call` while access to matching files fails as the fault says."""
        if fault is None:
            return call()
        if fault.kind == "ENOSPC":
            with self._full_disk(fragment):
                return call()
        if fault.kind == "EIO":
            with self._no_files(errno.EIO, fragment):
                return call()
        self.strike(fault)
        return call()
