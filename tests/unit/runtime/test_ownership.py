"""Tests with real users who may use a run folder: a process that drops root starts, resumes and reads other users' runs."""

import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.ownership import RunFolderError, in_words
from moe_dist.runtime.run_folder import RunFolder, Start
from tests.support.cover import full
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ENV = RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="first")
BOB = pwd.getpwnam("nobody")
PROGRAM = """
import os, sys, traceback
from moe_dist.config.load import load_config
from moe_dist.errors import MoeDistError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder, Start
import tempfile, pwd, encodings.idna, importlib.metadata, email.parser
_ = [d.name for d in importlib.metadata.distributions()]  # what is imported late is out of reach later
config = load_config(sys.argv[1])
folder = RunFolder.of(config)
env = RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="of-bob")
os.setgroups(eval(sys.argv[4])); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2])); os.umask(int(sys.argv[5], 8))
try:
    {body}
except MoeDistError as error:
    print(type(error).__name__, error.exit_code, error)
"""


def needs_root(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    return pytest.mark.needs_hardware(skipped(test))


@pytest.fixture
def place() -> Iterator[Path]:
    """Returns a folder that every user can read, unlike pytest's temporary folders."""
    folder = Path(tempfile.mkdtemp(prefix="moe_dist_test_"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_bob(config: Config, body: str, *, groups: tuple[int, ...] = (), umask: int = 0o022) -> str:
    """Returns the output of a process of another user, whose modules were imported as root."""
    path = write_config(config, Path(config.run.root).parent / "x.yaml")
    program = PROGRAM.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(BOB.pw_uid), str(BOB.pw_gid), repr(list(groups)), f"{umask:o}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def a_run(root: Path, *, verdict: int = 75, steps: int = 2, **changes: object) -> tuple[Config, RunFolder]:
    config = tiny_config(root / "data", root / "runs", changes)
    folder = RunFolder.of(config)
    lease = folder.open(config, ENV)
    folder.write_status(verdict=verdict, reason="r", last_step=steps, attempt_id="first")
    lease.release()
    return config, folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@needs_root
@pytest.mark.parametrize("mode", [0o755, full(0o777), full(0o700)])
def test_another_users_run_is_refused_for_any_permissions(place: Path, mode: int) -> None:
    config, folder = a_run(place)
    folder.path.chmod(mode)
    (place / "runs").chmod(0o777)
    before = snapshot(place / "runs")
    # One process runs all three cases, because each start of Python takes a second.
    said = as_bob(
        config,
        """
        for action in (lambda: folder.inspect(config), lambda: folder.open(config, env), folder.move_aside):
            try: action()
            except MoeDistError as error: print(type(error).__name__, error.exit_code, error, end=chr(0))
        """,
    ).split(chr(0))
    assert len(said) == 3 + 1, "one of them was not refused"
    for number, each in enumerate(said[:3]):
        assert each.startswith("ConfigError 78")
        assert "root (uid 0)" in each or (mode == 0o700 and "Permission denied" in each and number == 2)
    assert snapshot(place / "runs") == before


@needs_root
def test_another_users_finished_run_is_shown(place: Path) -> None:
    config, folder = a_run(place, verdict=0, steps=4)
    folder.write_summary("all well\n")
    assert as_bob(config, "print(folder.start(config, env), folder.read_summary())") == "Start.FINISHED all well\n\n"


@needs_root
def test_root_does_not_write_into_somebodys_run_either(place: Path) -> None:
    config, folder = a_run(place)
    for path in [folder.path, *folder.path.rglob("*")]:
        os.chown(path, BOB.pw_uid, BOB.pw_gid)
    with refused(ConfigError):
        folder.inspect(config)


@needs_root
@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o027, 0o640, 0o750), full(0o077, 0o600, 0o700), full(0o002, 0o664, 0o775)]
)
def test_run_group_owns_new_files_and_the_umask_sets_its_permissions(
    place: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    team = grp.getgrnam("users")
    place.chmod(0o777)
    config = tiny_config(place / "data", place / "runs", {"run.group": team.gr_name})
    as_bob(
        config,
        "folder.prepare(); lease = folder.open(config, env); folder.write_summary('x')",
        groups=(team.gr_gid,),
        umask=umask,
    )
    folder = RunFolder.of(config)
    for path in [folder.path, *folder.path.rglob("*")]:
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (BOB.pw_uid, team.gr_gid), path
        if path.is_dir():
            assert stat.S_IMODE(found.st_mode) == folder_mode | stat.S_ISGID, path
        elif path.name not in ("lease.json",) and not path.name.startswith(".verdict"):
            assert stat.S_IMODE(found.st_mode) == file_mode, path


def test_a_resumed_run_is_given_to_a_new_group(place: Path) -> None:
    _, folder = a_run(place)
    mine = grp.getgrgid(os.getegid()).gr_name
    shared = tiny_config(place / "data", place / "runs", {"run.group": mine})
    assert folder.inspect(shared) is Start.RESUME
    RunFolder.of(shared).prepare()
    for path in (folder.path, folder.logs, folder.checkpoints):
        assert path.stat().st_mode & stat.S_ISGID


def test_an_owner_mapped_by_the_file_system_is_accepted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root over NFS, the folder and all files that root creates belong to the user nobody."""
    config, folder = a_run(place)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert folder.inspect(config) is Start.RESUME  # the probe file has the folder's owner, too
    assert not list(folder.path.glob(".owner_*"))


@pytest.mark.parametrize(
    "where",
    ["log", "log/rank_0.log", "checkpoints", "checkpoints/step_4", "tensorboard", "trace", "trace/part/rank_0.tokens",
     "traces", "traces/step_4", "adapters/one/model.pt", "profile", "slurm", "metrics.jsonl", "wandb", "summary.txt"],
)  # fmt: skip
def test_nothing_is_written_through_a_link_out_of_the_run_folder(place: Path, where: str) -> None:
    config, folder = a_run(place)
    outside, link = place / "outside", folder.path / where
    outside.mkdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(outside)
    for start in (folder.inspect, lambda config: folder.open(config, ENV)):
        with refused(ConfigError, str(link), golden=False):
            start(config)
    assert list(outside.iterdir()) == []
    link.unlink()
    link.symlink_to(folder.config_yaml)  # a link inside the run folder is allowed
    assert folder.inspect(config) is Start.RESUME


@needs_root
@pytest.mark.parametrize("where", ["metrics.jsonl", "log/rank_0.log", "checkpoints2", "tensorboard/text/events"])
def test_a_link_planted_by_another_user_is_refused(place: Path, where: str) -> None:
    config, folder = a_run(place)
    target = folder.path / "precious"
    target.write_text("x")
    link = folder.path / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    assert folder.inspect(config) is Start.RESUME  # a link of the user is accepted
    os.lchown(link, BOB.pw_uid, BOB.pw_gid)
    with refused(ConfigError):
        folder.inspect(config)
    assert target.read_text() == "x"


def test_writing_never_goes_through_a_link_or_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    precious = tmp_path / "precious"
    precious.write_text("x")
    path.symlink_to(precious)
    write_atomically(path, "new")
    assert (precious.read_text(), path.read_text(), path.is_symlink()) == ("x", "new", False)

    def refuse() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, "newer", before_rename=refuse)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["precious", "status.json"]
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", '{"attempts": 3}', '{"attempts": [{"attempt_id": "a"}]}', "\0" * 50,
    ],
)  # fmt: skip
def test_an_error_about_a_damaged_status_names_the_fix(tmp_path: Path, content: str) -> None:
    config, folder = a_run(tmp_path)
    folder.status_json.write_text(content)
    for act in (lambda: folder.inspect(config), lambda: folder.open(config, ENV), folder.last_step):
        with refused(DataError, "status.json"):
            act()
    folder.status_json.unlink()
    assert folder.inspect(config) is Start.RESUME
    assert not folder.lease_json.exists()


def test_file_system_errors_are_distinguished(tmp_path: Path) -> None:
    for number, kind in (
        (13, ConfigError),
        (30, ConfigError),
        (28, RunFolderError),
        (5, RunFolderError),
        (116, RunFolderError),
    ):
        with pytest.raises(kind, match=f"run folder {tmp_path}: {os.strerror(number)}") as raised, in_words(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path / "x"))
        assert raised.value.retry is (kind is RunFolderError)
