"""Fixtures of all tests, and the rule that skipped tests fail in CI."""

import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.messages import write_new
from tests.support.tiny import tiny_dataset
from tests.support.worlds import Worlds

# hypothesis gets no deadlines, because other programs slow down the tests. Timeouts end a test that hangs.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")
# Triton reads this variable at import. With it, Triton's interpreter runs kernels on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
# pydantic would search the metadata of all packages for plugins. There are none, and the search takes 0.1 s in each of
# hundreds of started programs.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
LONG_FILES = ("test_fake_steps.py", "test_combinations.py")


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """All tests of a session share these worlds (groups of rank processes)."""
    standing = Worlds()
    yield standing
    standing.close()


@pytest.fixture(scope="session")
def run_in_world(worlds: Worlds) -> Callable[..., list[Any]]:
    """`run_in_world(world_size, function, *arguments, seconds=600)` returns the results of all ranks
    (tests.support.worlds)."""
    return worlds.run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny prepared data set. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset(folder)
    return folder


@pytest.hookimpl(tryfirst=True)  # runs before `-m` selects the tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks a case `exhaustive` if it is marked `full` twice.

    Moves long test files to the front, so that no worker starts one of them when the other workers are almost done.
    """
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if len(list(item.iter_markers("full"))) > 1:
            item.add_marker("exhaustive")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skipped test fails unless it is marked `needs_hardware`."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("needs_hardware") is None:
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With CI=true a test file that skips itself fails too."""
    report = yield
    if report.skipped:
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI=true does not allow: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Calls `gc.freeze` after pytest has collected the tests, so that garbage collection skips the imported modules and
    the tests. Without this, walking these objects would take 3 % of the unit tests' CPU time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    write_new()
