"""Messages of a slow start."""

import io
import time

from moe_dist.runtime.log import Startup


def wait_for(stream: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 600.0
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)


def test_a_slow_start_says_what_it_does_until_it_is_done() -> None:
    stream = io.StringIO()
    startup = Startup(enabled=True, quiet_seconds=0.05, stream=stream)
    startup.now("importing torch")
    wait_for(stream, "still starting after 0 s: importing torch\n")
    startup.now("reading data")
    wait_for(stream, ": reading data\n")
    startup.done()
    startup.done()
    wait_for(stream, "started after 0 s\n")
    assert stream.getvalue().endswith("started after 0 s\n")


def test_a_quick_start_and_other_ranks_print_nothing() -> None:
    stream = io.StringIO()
    Startup(enabled=False, quiet_seconds=0.0, stream=stream).now("x")
    quick = Startup(enabled=True, quiet_seconds=1000.0, stream=stream)
    quick.done()
    assert stream.getvalue() == ""
