"""The driver for Ray, with ranks that run `tests.support.ray_rank`.

    python -m tests.support.ray_launch CONFIG [key=value ...] -- NAME ...

The arguments after `--` name environment variables that are passed on to the ranks. If PRETEND is among them, the ranks run
`tests.support.pretend`.
"""

import sys
from pathlib import Path

from launchers.ray.__main__ import launch
from moe_dist.errors import MoeDistError
from tests.support import pretend
from tests.support.ray_rank import PROGRAM


def run(config: str, arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        program = tuple(pretend.PROGRAM.split()) if "PRETEND" in arguments[at:] else PROGRAM
        return launch(Path(config), arguments[:at], forwarded=arguments[at + 1 :], program=program)
    except MoeDistError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
