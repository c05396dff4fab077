"""During a slow start, the program prints its current activity."""

import io

from moe_dist.runtime.log import Startup
from tests.support.processes import wait_until


def test_a_slow_start_says_what_it_does_until_it_is_done() -> None:
    stream = io.StringIO()
    startup = Startup(enabled=True, quiet_seconds=0.05, stream=stream)
    startup.now("importing torch")
    wait_until(lambda: "still starting after 0 s: importing torch\n" in stream.getvalue())
    startup.now("reading data")
    wait_until(lambda: ": reading data\n" in stream.getvalue())
    startup.done()
    startup.done()
    wait_until(lambda: "started after 0 s\n" in stream.getvalue())
    assert stream.getvalue().endswith("started after 0 s\n")
