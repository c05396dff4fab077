"""Tests the text of check results, and their combined exit code."""

import pytest

from moe_dist.errors import ConfigError, DataError, ResourceError
from moe_dist.runtime.node.check_result import CheckResult, error, exit_code, names, note, ok, raise_errors, warning
from tests.support.messages import refused

CONFIG = error("a", "x", "y", kind=ConfigError)
DATA = error("a", "x", "y", kind=DataError)
PLACE = error("a", "x", "y")


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([], 0), ([ok("a", "x"), note("a", "x")], 0), ([ok("a", "x"), warning("a", "x", "y")], 1),
        ([warning("a", "x", "y"), PLACE], 69), ([PLACE, DATA], 65), ([PLACE, DATA, CONFIG], 78),
    ],
)  # fmt: skip
def test_the_exit_code_says_the_worst(results: list[CheckResult], code: int) -> None:
    assert exit_code(results) == code


def test_errors_end_a_run_together_with_the_worst_verdict() -> None:
    raise_errors([ok("a", "x"), warning("a", "x", "y")])
    with refused(ConfigError):
        raise_errors([error("folder", "no", "mend", kind=ConfigError), error("nodes", "none", "wait")])
    with refused(ResourceError):
        raise_errors([error("nodes", "none", "wait")])


def test_nodes_in_a_sentence() -> None:
    assert [names(["a"]), names(["a", "b"]), names(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert names([f"n{i}" for i in range(64)], most=2) == "n0, n1, ... (64 nodes)"
