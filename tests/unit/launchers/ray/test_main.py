"""Runs the command for Ray with a stand-in for Ray's job API, and tests errors, submission and stop."""

import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.ray import submit as ray_submit
from launchers.ray.__main__ import driver_line
from launchers.ray.job import check_job, path_on_nodes
from launchers.ray.submit import follow_job, stop, take_over, verdict, verdict_line
from moe_dist.config.bundled import source_root
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config


@dataclass
class Api:
    """Stands in for Ray's job API with one job. The log comes in `pieces`. The connection breaks once, after
    `breaks_after` pieces. The job has ended once its status has been requested more than `runs_for` times."""

    pieces: list[str]
    status: str = "SUCCEEDED"
    driver_exit_code: int | None = 0
    breaks_after: int | None = None
    runs_for: int = 0
    asked: int = 0
    submissions: list[dict[str, Any]] = field(default_factory=list)

    def submit_job(self, **request: Any) -> str:
        self.submissions.append(request)
        return "raysubmit_x"

    def stop_job(self, job_id: str) -> bool:
        if job_id != "raysubmit_x":
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for index, piece in enumerate(self.pieces):
            if index == self.breaks_after:
                self.breaks_after = None
                raise RuntimeError("connection closed")
            yield piece

    def get_job_logs(self, job_id: str) -> str:
        return "".join(self.pieces)

    def get_job_info(self, job_id: str) -> Any:
        self.asked += 1
        over = self.asked > self.runs_for

        class Status(str):
            def is_terminal(self) -> bool:
                return over

        return SimpleNamespace(status=Status(self.status), driver_exit_code=self.driver_exit_code, message="")


def answers(monkeypatch: pytest.MonkeyPatch, api: Api) -> Api:
    monkeypatch.setattr(ray_submit, "connect", lambda address: api)
    monkeypatch.setattr(ray_submit, "POLL_SECONDS", 0.0)
    return api


@pytest.fixture
def yaml(tmp_path: Path, tiny_data: Path) -> Path:
    return write_config(tiny_config(tiny_data, tmp_path / "runs"), tmp_path / "x.yaml")


def test_what_ray_ships_is_named_from_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source_root() / "configs")
    assert path_on_nodes(Path("x.yaml")) == Path("configs/x.yaml")
    assert path_on_nodes(Path("/elsewhere/x.yaml")) == Path("/elsewhere/x.yaml")


def test_a_submission_quotes_arguments_makes_paths_absolute_and_sets_the_grace(
    yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = answers(monkeypatch, Api([]))
    monkeypatch.chdir(yaml.parent)
    monkeypatch.setenv("MOE_DIST_TEST_KEY", "value")
    monkeypatch.setenv("MOE_DIST_CLUSTER", "cpu")
    line = driver_line(Path("x.yaml"), ["run.root=my runs"], options=["--max-restarts=2"], cluster=None)
    run, names = load_config(Path("x.yaml"), ["run.root=my runs"]), ["MOE_DIST_TEST_KEY"]
    assert ray_submit.submit("http://127.0.0.1:8265", line, grace_seconds=120, config=run, forwarded=names) == 0
    (request,) = api.submissions
    words = shlex.split(request["entrypoint"])
    assert words[:5] == ["python", "-m", "launchers.ray", str(yaml), "run.root=my runs"]
    assert f"run.root={yaml.parent}/my runs" in words[5:]
    assert words[-3:-1] == ["--max-restarts=2", "--cluster=cpu"]
    assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    file = Path(words[-1].removeprefix("--env-file="))
    assert file.parent == yaml.parent / "my runs" / run.run.name
    assert (file.read_text(), file.stat().st_mode & 0o777) == ('{"MOE_DIST_TEST_KEY": "value"}', 0o600)


def test_variables_reach_the_ranks_by_a_file_that_ray_does_not_show(
    yaml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable reaches the driver's plan, but nothing that Ray stores about the job contains the variable's value."""
    api = answers(monkeypatch, Api([]))
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-seen")
    run = load_config(yaml)
    ray_submit.submit("http://127.0.0.1:8265", "true", grace_seconds=1, config=run, forwarded=["WANDB_API_KEY"])
    assert "not-to-be-seen" not in str(api.submissions)
    monkeypatch.delenv("WANDB_API_KEY")
    file = Path(shlex.split(api.submissions[0]["entrypoint"])[-1].removeprefix("--env-file="))
    names = take_over(file)
    assert not file.exists()
    job = check_job(yaml, forwarded=names)
    assert job.variables == {"WANDB_API_KEY": "not-to-be-seen"}
    assert "not-to-be-seen" not in repr(job)
    with refused(ConfigError, "--env-file", golden=False):
        take_over(file)


def test_a_refused_submission_leaves_no_file(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers(monkeypatch, Api([])), "submit_job", None)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-seen")
    run = load_config(yaml)
    with pytest.raises(TypeError):
        ray_submit.submit("http://127.0.0.1:8265", "true", grace_seconds=1, config=run, forwarded=["WANDB_API_KEY"])
    assert not list(RunFolder.of(run).path.glob(".env_*"))


def test_a_variable_that_is_not_there_is_refused(yaml: Path) -> None:
    with refused(ConfigError, "--env"):
        run, names = load_config(yaml), ["MOE_DIST_TEST_NONE"]
        ray_submit.submit("http://127.0.0.1:1", "true", grace_seconds=1, config=run, forwarded=names)


@pytest.mark.parametrize(
    ("status", "exit_code", "log", "code"),
    [
        ("SUCCEEDED", 0, verdict_line(0), 0),
        ("FAILED", 70, verdict_line(70), 70),
        ("STOPPED", None, f"step 3\n{verdict_line(75)}\n", 75),
        ("STOPPED", None, f"{verdict_line(1)}\n{verdict_line(75)}\n", 75),
        ("STOPPED", None, "step 3\n", 1),
        ("FAILED", None, "", 1),
        ("FAILED", -9, "step 3\n", 1),  # a killed driver; some shells report -9 as 137
        ("FAILED", 137, "step 3\n", 1),
    ],
)
def test_the_verdict_is_the_exit_code_or_the_last_line_of_a_stopped_job(
    status: str, exit_code: int | None, log: str, code: int
) -> None:
    assert verdict(Api([], status, exit_code).get_job_info("x"), log) == code


def test_the_log_is_shown_once_though_the_connection_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = answers(monkeypatch, Api(["one\n", "two\n", "three\n"], "FAILED", 78, breaks_after=2, runs_for=1))
    assert follow_job(api, "raysubmit_x") == 78  # pyright: ignore
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\nthree\n"
    assert "connection closed" in shown.err


def test_a_stop_returns_the_verdict_and_knows_no_other_job(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, Api([verdict_line(75)], "STOPPED", None))
    assert stop("http://127.0.0.1:8265", "raysubmit_x") == 75
    with refused(ConfigError, "--stop"):
        stop("http://127.0.0.1:8265", "raysubmit_y")
