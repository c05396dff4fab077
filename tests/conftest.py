"""Fixtures of all tests, and the rule about skipped ones."""

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

# A time says nothing on a machine that does other work as well; a test that hangs ends by its timeout.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")
# Triton reads this when it is imported: its interpreter then runs kernels on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")
# pydantic looks for plugins in the metadata of all packages: a tenth of a second for each of the hundreds of programs that
# tests start. There are none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
LONG_FILES = ("test_fake_steps.py", "test_fake_matrix.py", "test_combinations.py")


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """The standing worlds of this session."""
    standing = Worlds()
    yield standing
    standing.close()


@pytest.fixture(scope="session")
def run_in_world(worlds: Worlds) -> Callable[..., list[Any]]:
    """`run_in_world(world_size, function, *arguments, seconds=600)`: results of all ranks, see `tests.support.worlds`."""
    return worlds.run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny prepared data set; not to be written to."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset(folder)
    return folder


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks a case `exhaustive` if it is marked `full` twice.

    Long files come first, so that no worker is left with one of them at the end.
    """
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    for item in items:
        if len(list(item.iter_markers("full"))) > 1:
            item.add_marker("exhaustive")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skipped test is a failure unless it is marked `needs_hardware`: what can run, must."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("needs_hardware") is None:
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for files that skip themselves as a whole."""
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
    """Modules and tests stay to the end: to walk them for garbage costs 3 % of the unit tests' CPU time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    write_new()
