"""A training that pauses at each step of a job's first start, but not after a requeue.

The pauses give slow events, such as Slurm's checks of time limits, time to happen within few steps. Rank 0 pauses
before it writes a record, and the other ranks wait for it.
"""

import os
import time

from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.lease import Lease
from moe_dist.train.__main__ import main

PROGRAM = "-m tests.support.slowed"
PAUSE_SECONDS = 2.5  # slurmctld checks time limits twice within 24 pauses


def slow_down() -> None:
    check = Lease.check

    def paused(lease: Lease) -> None:
        time.sleep(PAUSE_SECONDS)
        check(lease)

    Lease.check = paused


if __name__ == "__main__":
    if os.environ["MOE_DIST_ATTEMPT"] == "0" and os.environ["RANK"] == "0":
        slow_down()
    run_command(main)
