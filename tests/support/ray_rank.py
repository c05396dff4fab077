"""A rank like `moe_dist.train` that first starts a process in another session, and may save slowly.

MOE_DIST_TEST_SAVE_SECONDS=30     each commit of a checkpoint takes 30 s longer
"""

import os
import subprocess
import sys
import time
from typing import Any

PROGRAM = ("-m", "tests.support.ray_rank")
SAVE_SECONDS = "MOE_DIST_TEST_SAVE_SECONDS"


def leave_a_process() -> None:
    """Starts a process that survives the end of its parent, and survives signals to its parent's process group."""
    sleeper = f"import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep({60 * 60})"
    subprocess.run([sys.executable, "-S", "-c", sleeper], check=True)


def save_slowly(seconds: float) -> None:
    """Makes each commit take longer."""
    from moe_dist.checkpoint.manager import CheckpointManager

    commit = CheckpointManager._commit

    def slow(self: CheckpointManager, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return commit(self, *args, **kwargs)

    CheckpointManager._commit = slow


if __name__ == "__main__":
    from moe_dist.runtime.command_line import run_command
    from moe_dist.train.__main__ import main

    leave_a_process()
    if SAVE_SECONDS in os.environ:
        save_slowly(float(os.environ[SAVE_SECONDS]))
    run_command(main)
