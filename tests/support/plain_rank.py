"""A rank of a launcher that does not know moe_dist, forked from a process that has imported torch."""

import json
import os
import sys
from collections.abc import Mapping, Sequence

from moe_dist.runtime.signals import child_of
from tests.support import faults, slow_close


def run(variables: Mapping[str, str], arguments: Sequence[str], log: str) -> None:
    """Trains like `python -m moe_dist.train ARGUMENTS` with these variables. Appends its output to the file `log`."""
    child_of(os.getppid(), ignore_stop=False)()
    os.environ.clear()
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(output, standard)
    sys.argv = ["moe_dist.train", *arguments]
    from moe_dist.runtime.command_line import run_command
    from moe_dist.train.__main__ import main

    if faults.VARIABLE in os.environ:
        faults.inject(json.loads(os.environ[faults.VARIABLE]))
    if slow_close.ENDS in os.environ:
        slow_close.prepare()
    run_command(main)
