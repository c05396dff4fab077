"""A training that pauses at each step after the first start of a job.

The pause gives slow events, such as Slurm's checks of time limits, time to happen without more steps. Rank 0 pauses
before it writes a record, and the other ranks wait for it.
"""

import os
import time

from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.lease import Lease
from moe_dist.train.__main__ import main

PROGRAM = "-m tests.support.slowed"
PAUSE_SECONDS = 2.5  # slurmctld checks time limits twice during the pauses of 24 steps


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
