"""A run folder may have planted FIFOs, devices, endless files, bombs and links. No reader waits, fills the memory, or shows
the target of a link."""

import io
import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launchers.restart import committed_step
from launchers.run_progress import read_progress
from launchers.status import many_runs, one_run
from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import read_holder
from moe_dist.runtime.run_folder import RunFolder
from tests.support.messages import refused
from tests.support.special_files import SPECIAL, reads_little
from tests.support.tiny import tiny_config

ENV = RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="first")
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ENDLESS = ("fifo", "device", "endless")
READ_BY_STATUS = (
    "config.yaml", "status.json", "lease.json", "metrics.jsonl", "checkpoints/latest", "log/save_seconds.json",
)  # fmt: skip
# A resume accepts a bomb as lease.json, because it takes over a lease that has no holder. It accepts a bomb as
# metrics.jsonl, because it drops lines that are no records.
READ_BY_A_RESUME = [
    *((name, kind) for name in ("config.yaml", "status.json", "provenance.json") for kind in (*ENDLESS, "bomb")),
    *(("lease.json", kind) for kind in ENDLESS),
    *(("metrics.jsonl", kind) for kind in ("fifo", "device")),
]


def bomb(path: Path) -> None:
    path.write_text(BOMB)


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 36)  # a sparse file, without blocks on the disk


PLANTED: dict[str, Callable[[Path], None]] = {**SPECIAL, "endless": endless, "bomb": bomb}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was stopped."""
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    folder = RunFolder.of(config)
    lease = folder.open(config, ENV)
    folder.write_status(verdict=75, reason="stopped", last_step=2, attempt_id="first")
    lease.release()
    return folder


def plant(run: RunFolder, name: str, kind: str) -> Path:
    path = run.path / name
    path.unlink(missing_ok=True)
    PLANTED[kind](path)
    return path


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", READ_BY_STATUS)
@pytest.mark.slow
def test_the_state_of_a_run_is_shown_whatever_another_user_puts_there(run: RunFolder, name: str, kind: str) -> None:
    plant(run, name, kind)
    with reads_little():
        found = read_progress(run.path)
        console = Console(width=200, file=io.StringIO())
        console.print(many_runs([found]), one_run(found))
    assert found.attempts or name == "status.json"


@pytest.mark.parametrize("name", ["status.json", "lease.json", "metrics.jsonl", "log/save_seconds.json"])
def test_deeply_nested_json_is_damage(run: RunFolder, name: str) -> None:
    (run.path / name).write_text(f'{{"step":1,"kind":"step","scalars":{"[" * 60_000}\n')
    assert read_progress(run.path).attempts or name == "status.json"
    (run.path / name).write_text(f"{0:012d}\n{'[' * 60_000}\n")
    assert read_progress(run.path).attempts or name == "status.json"


@pytest.mark.parametrize(("name", "kind"), READ_BY_A_RESUME)
def test_a_resume_is_refused_by_the_files_name(run: RunFolder, name: str, kind: str) -> None:
    config = tiny_config(run.path.parents[1] / "data", run.path.parent)
    path = plant(run, name, kind)
    with reads_little(), pytest.raises((ConfigError, DataError)) as error:
        run.open(config, ENV)
    assert str(path) in str(error.value)
    assert error.value.exit_code in (65, 78)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_configuration_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.yaml"
    PLANTED[kind](path)
    with reads_little(), refused(ConfigError, "x.yaml"):
        load_config(path)


@pytest.mark.parametrize("kind", ENDLESS)
def test_latest_is_refused(run: RunFolder, kind: str) -> None:
    plant(run, "checkpoints/latest", kind)
    assert committed_step(run.checkpoints) == 0
    with reads_little(), refused(DataError, "latest"):
        CheckpointDirectory(run.checkpoints).latest_step()


@pytest.mark.parametrize("name", ["checkpoints/latest", "lease.json", "status.json", "config.yaml", "provenance.json"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link of another user")
@pytest.mark.needs_hardware
def test_nothing_is_read_through_a_link_of_another_user(run: RunFolder, tmp_path: Path, name: str) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    secret = tmp_path / "netrc"
    secret.write_text("machine api.example.org password hunter22\n")
    link = run.path / name
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    os.lchown(link, pwd.getpwnam("nobody").pw_uid, -1)
    texts = []
    for read in (
        lambda: run.inspect(config),
        lambda: run.open(config, ENV),
        run.read_status,
        run.read_config,
        CheckpointDirectory(run.checkpoints).latest_step,
        lambda: read_holder(run.lease_json),
    ):
        try:
            texts.append(str(read()))
        except (ConfigError, DataError, OSError) as error:
            texts.append(str(error))
    with pytest.raises(ConfigError, match="symbolic link created by nobody"):
        run.inspect(config)
    assert "hunter22" not in str([*texts, read_progress(run.path)])
    assert secret.read_text().startswith("machine")


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", '{"attempt_id": 1}', "[" * 100_000, "\0" * 40],
    ids=["empty", "cut", "number", "mapping", "nested", "zeros"],
)
def test_a_damaged_provenance_is_named(run: RunFolder, tmp_path: Path, content: str) -> None:
    config = tiny_config(tmp_path / "data", tmp_path / "runs")
    (run.path / "provenance.json").write_text(content)
    with refused(DataError, "provenance.json"):
        run.open(config, ENV)
    assert not run.lease_json.exists()
    (run.path / "provenance.json").rename(tmp_path / "aside")
    run.open(config, ENV).release()
    assert [entry["attempt_id"] for entry in json.loads((run.path / "provenance.json").read_text())] == ["first"]
