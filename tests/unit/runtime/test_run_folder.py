"""Tests every case of a start in a run folder, and the verdicts in status.json."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import Lease, LeaseError
from moe_dist.runtime.run_folder import RunFolder, Start
from tests.support.messages import refused
from tests.support.tiny import tiny_config

ENV = RankEnv(0, 2, 0, 2, "file:///x", attempt=0, attempt_id="first")


def config_with(tmp_path: Path, changes: dict[str, Any] | None = None) -> Config:
    return tiny_config(tmp_path / "data", tmp_path / "runs", changes)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_with(tmp_path)


@pytest.fixture
def folder(config: Config) -> RunFolder:
    return RunFolder.of(config)


def attempt(config: Config, env: RankEnv = ENV, *, verdict: int | None, last_step: int = 0) -> RunFolder:
    """Runs one whole attempt. With `verdict=None` it dies without recording a verdict."""
    folder = RunFolder.of(config)
    lease = folder.open(config, env, wait_seconds=0.0)
    if verdict is not None:
        assert folder.write_status(verdict=verdict, reason="r", last_step=last_step, attempt_id=env.attempt_id)
    lease.release()
    return folder


def test_a_new_run_has_its_configuration_provenance_and_status(config: Config, folder: RunFolder, tmp_path: Path) -> None:
    assert folder.inspect(config) is Start.NEW
    assert not folder.path.exists()
    lease = folder.open(config, ENV)
    assert folder.path == tmp_path / "runs" / "tiny"
    assert folder.read_config() == config
    (entry,) = json.loads((folder.path / "provenance.json").read_text())
    assert (entry["attempt_id"], entry["packages"]["pydantic"] > "") == ("first", True)
    status = json.loads(folder.status_json.read_text())
    assert (status["verdict"], status["last_step"], status["restarts"]) == (None, 0, 0)
    assert (status["attempts"][0]["attempt_id"], status["attempts"][0]["pid"]) == ("first", os.getpid())
    lease.release()


@pytest.mark.parametrize("verdict", [None, 75, 1, 70])
def test_the_same_configuration_resumes_after_every_unsuccessful_end(config: Config, verdict: int | None) -> None:
    folder = attempt(config, verdict=verdict, last_step=2)
    assert folder.inspect(config) is Start.RESUME


def test_a_finished_run_is_finished_until_more_steps_are_asked_for(config: Config, tmp_path: Path) -> None:
    folder = attempt(config, verdict=0, last_step=4)
    assert folder.inspect(config) is Start.FINISHED
    assert folder.inspect(config_with(tmp_path, {"train.steps": 6})) is Start.RESUME
    assert "done after step 4" in folder.read_summary()
    folder.write_summary("all well\n")
    assert folder.read_summary() == "all well\n"


def test_a_run_of_a_former_default_says_how_it_resumes(tmp_path: Path) -> None:
    folder = attempt(config_with(tmp_path, {"loss.balance.scope": "micro_batch"}), verdict=75)
    with pytest.raises(ConfigError, match=r"default has changed: to resume this run, set loss.balance.scope=micro_batch"):
        folder.inspect(config_with(tmp_path))


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = attempt(config_with(tmp_path), verdict=75)
    other = config_with(tmp_path, {"optimizer.eps": 0.5, "model.moe.router": {"scale": 2.0}, "checkpoint.every": 9})
    with pytest.raises(ConfigError) as caught:
        folder.inspect(other)
    text = str(caught.value)
    assert caught.value.exit_code == 78
    assert "optimizer.eps: 1e-08 in the folder, 0.5 now" in text
    assert "model.moe.router.scale: 1.0 in the folder, 2.0 now" in text
    assert "checkpoint.every:" not in text
    assert "--overwrite" in text
    with pytest.raises(ConfigError):
        folder.open(other, ENV, wait_seconds=0.0)
    assert folder.read_config() == config_with(tmp_path)
    Lease(folder.lease_json, "next").acquire(0.0)  # the refused attempt has released the lease


def test_the_stored_configuration_is_that_of_the_last_resume(tmp_path: Path) -> None:
    attempt(config_with(tmp_path), verdict=75)
    longer = config_with(tmp_path, {"train.steps": 9})
    folder = attempt(longer, replace(ENV, attempt_id="second"), verdict=0, last_step=9)
    assert folder.read_config() == longer


def test_other_ranks_may_inspect_while_rank_0_opens_the_folder(
    config: Config, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing synchronises the ranks yet, so a folder that rank 0 has half opened must not look like the folder of
    another run."""
    seen: list[Start] = []
    for owner, name in ((Path, "mkdir"), (os, "replace")):
        original = getattr(owner, name)

        def look(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            seen.append(folder.inspect(config))
            result = _original(*args, **kwargs)
            seen.append(folder.inspect(config))
            return result

        monkeypatch.setattr(owner, name, look)
    lease = folder.open(config, ENV)
    monkeypatch.undo()
    lease.release()
    assert set(seen) == {Start.NEW, Start.RESUME}


def test_overwrite_moves_aside_as_often_as_it_is_asked(config: Config, folder: RunFolder, tmp_path: Path) -> None:
    for number in (1, 2):
        attempt(config_with(tmp_path, {"optimizer.lr": 0.1 * number}), verdict=0)
        assert folder.start(config, ENV, overwrite=True) is Start.NEW
        assert not folder.path.exists()
        old = RunFolder(tmp_path / "runs" / f"tiny.old-{number}")
        assert old.read_config().optimizer.lr == 0.1 * number
        assert not old.lease_json.exists()
    assert folder.start(config, ENV, overwrite=True) is Start.NEW  # no run is left to move


def test_overwrite_is_ignored_in_a_restart_and_left_to_rank_0(config: Config) -> None:
    folder = attempt(config, verdict=75)
    assert folder.start(config, replace(ENV, attempt=1), overwrite=True) is Start.RESUME
    assert folder.start(config, replace(ENV, rank=1), overwrite=True) is Start.NEW
    assert folder.config_yaml.is_file()


def test_overwrite_does_not_touch_a_run_that_somebody_writes_to(config: Config) -> None:
    lease = RunFolder.of(config).open(config, ENV)
    with refused(LeaseError):
        RunFolder.of(config).move_aside()
    lease.check()
    lease.release()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_neither_used_nor_moved(config: Config, folder: RunFolder, overwrite: bool) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("x")
    with refused(ConfigError, "config.yaml"):
        folder.start(config, ENV, overwrite=overwrite)
    assert (folder.path / "thesis.tex").exists()


def test_remains_of_a_start_that_never_opened_the_folder_are_accepted(config: Config, folder: RunFolder) -> None:
    folder.logs.mkdir(parents=True)
    folder.log_of(0).write_text("x")
    (folder.path / ".config.yaml.77").write_text("half")
    assert attempt(config, verdict=75).inspect(config) is Start.RESUME


def test_the_first_verdict_of_an_attempt_stays_whichever_rank_gives_it(config: Config, folder: RunFolder) -> None:
    lease = folder.open(config, ENV)
    write = {"last_step": 3, "attempt_id": "first"}
    assert folder.write_status(verdict=65, reason="damaged", rank=1, **write)
    assert not folder.write_status(verdict=1, reason="connection closed", rank=0, **write)
    latest = folder.read_status().attempts[-1]
    assert (latest.verdict, latest.reason, latest.rank, latest.last_step) == (65, "damaged", 1, 3)
    lease.release()


@pytest.mark.parametrize("then", ["nobody", "a holder", "one that has come and gone"])
def test_rank_0_may_release_the_lease_while_another_rank_records_the_verdict(
    config: Config, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    lease, fsync = folder.open(config, ENV), os.fsync

    def meanwhile(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        # False tells rank 0 that its attempt is over
        assert not folder.write_status(verdict=75, reason="late", last_step=3, attempt_id="first")
        lease.release()
        if then != "nobody":
            second = folder.open(config, replace(ENV, attempt_id="second"))
            if then == "one that has come and gone":
                second.release()

    monkeypatch.setattr(os, "fsync", meanwhile)
    written = folder.write_status(verdict=75, reason="saved", last_step=3, attempt_id="first", rank=1)
    assert written is (then == "nobody")
    latest = folder.read_status().attempts[-1]
    assert (latest.attempt_id, latest.verdict) == (("first", 75) if written else ("second", None))


def test_earlier_attempts_are_kept_and_a_later_one_has_its_own_verdict(config: Config) -> None:
    attempt(config, verdict=75, last_step=2)
    attempt(config, replace(ENV, attempt_id="died", attempt=1), verdict=None)
    folder = attempt(config, replace(ENV, attempt_id="third", attempt=2), verdict=0, last_step=4)
    raw = json.loads(folder.status_json.read_text())
    assert (raw["verdict"], raw["last_step"], raw["restarts"]) == (0, 4, 2)
    assert [(a["attempt_id"], a["verdict"], a["last_step"]) for a in raw["attempts"]] == [
        ("first", 75, 2),
        ("died", None, 2),
        ("third", 0, 4),
    ]
    assert not list(folder.path.glob(".verdict_first"))


def test_times_come_from_the_clock_of_the_file_system(
    config: Config, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clocks of hosts differ: the attempt begins on one host, and ends on another whose clock is two hours ahead."""
    lease, now = folder.open(config, ENV), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200.0)
    assert folder.write_status(verdict=1, reason="killed", last_step=0, attempt_id=ENV.attempt_id)
    lease.release()
    assert folder.amend_status("never-opened", verdict=1, reason="killed", rank=0, restarts=1, lasted=5.0)
    opened, never = folder.read_status().attempts
    assert 0.0 <= (opened.ended or 0.0) - opened.started < 600.0
    assert (never.restarts, never.verdict, round((never.ended or 0.0) - never.started)) == (1, 1, 5)


def test_a_killed_attempt_shows_its_last_record(config: Config, folder: RunFolder) -> None:
    lease = folder.open(config, ENV)
    folder.metrics_jsonl.write_text('{"step":5,"kind":"step"}\n{"step":6,"ki')  # the kill has cut the last line
    lease.release()
    assert folder.amend_status(ENV.attempt_id, verdict=1, reason="killed", rank=0, last_step=0)
    assert json.loads(folder.status_json.read_text())["last_step"] == 5
