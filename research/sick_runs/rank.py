"""One rank of a run with a planted fault: the program that `launchers.local.launch` starts in place of moe_dist.train."""

import os

from moe_dist.runtime.command_line import run_command
from moe_dist.train.__main__ import main

FAULT = "SICK_RUNS_FAULT"


def plant(fault: str) -> None:
    """Plants the fault when the rank makes its trainer."""
    from moe_dist.train.loop.trainer import Trainer
    from research.sick_runs.plants import PLANTS, before_build

    before_build(fault)
    begin = Trainer.__post_init__

    def post_init(self: Trainer) -> None:
        PLANTS.get(fault, lambda _: None)(self)
        begin(self)

    Trainer.__post_init__ = post_init


if __name__ == "__main__":
    if os.environ.get(FAULT):
        plant(os.environ[FAULT])
    run_command(main)
