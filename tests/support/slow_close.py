"""A training with a sink that takes ten minutes to close; it records when each rank ends.

MOE_DIST_TEST_ENDS=FOLDER     gets a file `<rank>` with the time of the rank's end, in seconds of the machine's clock
"""

import os
import time
from pathlib import Path

from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.command_line import run_command
from moe_dist.train.__main__ import main

PROGRAM = "-m tests.support.slow_close"
ENDS = "MOE_DIST_TEST_ENDS"
CLOSE_SECONDS, BUDGET_SECONDS = 600.0, 15.0


def close_slowly() -> None:
    from moe_dist.monitor.sinks import sink
    from moe_dist.monitor.sinks.console import ConsoleSink

    sink.CLOSE_SECONDS = BUDGET_SECONDS
    ConsoleSink.close = lambda self: time.sleep(CLOSE_SECONDS)


def note_the_end() -> None:
    end = Attempt._end

    def noted(code: int) -> None:
        (Path(os.environ[ENDS]) / os.environ["RANK"]).write_text(str(time.monotonic()))
        end(code)

    Attempt._end = staticmethod(noted)  # pyright: ignore[reportAttributeAccessIssue]


def prepare() -> None:
    note_the_end()
    if os.environ["RANK"] == "0":
        close_slowly()


def seconds_apart(folder: Path) -> float:
    """Returns the seconds between the ends of the two ranks."""
    first, second = (float((folder / str(rank)).read_text()) for rank in range(2))
    return abs(first - second)


if __name__ == "__main__":
    prepare()
    run_command(main)
