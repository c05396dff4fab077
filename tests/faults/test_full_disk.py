"""A disk first has too little space for a checkpoint, and then no space. The log reports both, and the run continues when
there is space again."""

import re
from pathlib import Path

import pytest

from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.run_folder import RunFolder
from tests.support.site import Site, settings, started
from tests.support.tiny import tiny_config, write_config


def fill(disk: Path, leave: int) -> Path:
    """Fills the disk except for `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"x" * (1 << 16)):
                pass
        except OSError:
            pass
    with filler.open("r+b") as stream:
        stream.truncate(max(0, filler.stat().st_size - leave))
    return filler


def test_a_run_without_room_for_checkpoints_says_so_and_goes_on_when_there_is(site: Site) -> None:
    if site.disk is None:
        pytest.fail("this test needs a small file system: mounting a tmpfs is not permitted here")
    changes = settings("full", ranks=2, train__steps=12, checkpoint__every=4, train__max_skipped_in_a_row=10)
    config = tiny_config(site.data, site.runs, changes)
    path, run, log = write_config(config, site.folder / "full.yaml"), RunFolder.of(config), site.folder / "full.log"
    run.logs.mkdir(parents=True)
    filler = fill(site.disk, leave=700_000)  # enough for records and logs, but not for a checkpoint
    assert started(path, log, max_restarts=0) == 1
    text = log.read_text()
    assert re.search(r"needs [\d,]+ bytes, but [\d,]+ are free; free space", text)
    assert "training continues" in text
    assert not (run.checkpoints / "latest").exists() or "step_" not in (run.checkpoints / "latest").read_text()
    assert [line["step"] for line in read_lines(run.metrics_jsonl) if line["kind"] == "step"] == list(range(1, 13))
    filler.unlink()
    assert started(path, log, max_restarts=0) == 0
    assert [line["step"] for line in read_lines(run.metrics_jsonl) if line["kind"] == "step"] == list(range(1, 13))
