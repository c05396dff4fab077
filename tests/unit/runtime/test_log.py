"""Tests where log lines are written, and their prefixes."""

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.log import setup_logging
from moe_dist.runtime.run_folder import RunFolder

ENV = RankEnv(0, 4, 0, 4, "file:///x", attempt=0, attempt_id="a")


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:  # the set-up must not close pytest's handlers
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("moe_dist").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("rank", "launched", "on_stderr", "in_file"),
    [
        (0, True, ["warned"], ["told"]),  # the launcher copies standard error into the file
        (3, True, ["told", "warned"], []),  # standard error is the file
        (0, False, ["warned"], ["told", "warned"]),
        (3, False, ["warned"], ["told", "warned"]),
    ],
)
def test_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, launched: bool, on_stderr: list[str], in_file: list[str]
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    folder = RunFolder(tmp_path / "run")
    setup_logging(replace(ENV, rank=rank, launched=launched), folder)
    logger = logging.getLogger("moe_dist.somewhere")
    logger.debug("whispered")
    logger.info("told")
    logger.warning("warned")
    logging.getLogger("a_library").info("chatted")
    log = folder.log_of(rank)
    assert [line.rpartition(": ")[2] for line in stderr.getvalue().splitlines()] == on_stderr
    assert [line.rpartition(": ")[2] for line in (log.read_text().splitlines() if log.exists() else [])] == in_file


def test_the_prefix_shows_rank_and_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    prefix = setup_logging(replace(ENV, rank=2), folder)
    logging.getLogger("moe_dist.x").info("before")
    step = 119
    prefix.follow(lambda: step)
    step = 120
    logging.getLogger("moe_dist.x").info("after")
    before, after = folder.log_of(2).read_text().splitlines()
    assert "[2] INFO moe_dist.x: before" in before
    assert "[2 @120] INFO moe_dist.x: after" in after
