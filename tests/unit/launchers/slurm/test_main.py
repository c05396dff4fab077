"""Tests the submission to Slurm: plan, output, snapshot and errors. sbatch and sinfo are stand-ins on PATH."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from launchers.slurm.__main__ import main, prepare
from moe_dist.config.cluster import Cluster
from moe_dist.config.load import resolved_yaml
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError, ResourceError
from moe_dist.runtime.command_line import command_app
from moe_dist.runtime.run_folder import RunFolder
from tests.support.messages import refused
from tests.support.stand_ins import stand_in
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
CPU = Cluster.model_validate({"gpus": {"syntax": "none"}, "ranks_per_node": 1})
NO_NODES = "Requested node configuration is not available"


class Login:
    """A login node with stand-ins for Slurm's commands."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.bin, self.site = folder, folder / "bin", folder / "site.yaml"
        self.config: Config = tiny_config(data, folder / "runs", {"run.name": "it"})
        self.path = write_config(self.config, folder / "it.yaml")
        self.run = RunFolder.of(self.config)
        self.site.write_text("gpus: {syntax: none}\nranks_per_node: 1\n")
        stand_in(
            self.bin,
            sbatch='echo "$*" >asked; compgen -e SLURM >passed; echo "77;ci"',
            sinfo="printf 'n1|idle|text,big|8|(null)|all*\\nn2|idle|text|8|(null)|all*\\n'",
        )

    def refuses(self, words: str) -> None:
        stand_in(self.bin, sbatch=f"echo 'sbatch: error: {words}' >&2; exit 1")

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def launch(self, *arguments: str, code: int = 0) -> Result:
        words = [str(self.path), f"--cluster={self.site}", *arguments]
        done = CliRunner().invoke(command_app(main), words, env=self.env)
        assert done.exit_code == code, done.output
        return done

    @property
    def asked(self) -> list[str] | None:
        """Returns the arguments of sbatch, or None if nothing was submitted."""
        path = self.bin / "asked"
        return path.read_text().split() if path.exists() else None


@pytest.fixture
def login(tmp_path: Path, tiny_data: Path) -> Login:
    return Login(tmp_path, tiny_data)


def test_a_run_is_kept_and_submitted_without_the_variables_of_a_job_around(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOB_ID", "ARRAY_TASK_ID", "HET_SIZE", "RESTART_COUNT", "MEM_PER_CPU", "CONF"):
        monkeypatch.setenv(f"SLURM_{name}", "3")
    done = login.launch("train.steps=9", "--time=10:00", "--dependency=afterok:5")
    assert "WARNING" not in done.stderr
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:4])
    assert (printed["job"], printed["output"]) == ("77", f"{login.run.path}/slurm/slurm-77.out")
    script = Path(printed["snapshot"]) / "train.sbatch"
    assert login.asked == ["--parsable", "--dependency=afterok:5", "--kill-on-invalid-dep=yes", str(script)]
    assert (login.bin / "passed").read_text() == "SLURM_CONF\n"
    assert (
        "#SBATCH --nodes=2\n#SBATCH --ntasks=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --time=10:00\n" in script.read_text()
    )
    assert yaml.safe_load((script.parent / "config.yaml").read_text())["train"]["steps"] == 9
    assert (script.parent / "code" / "slurm" / "node_env.sh").is_file()


def test_a_reader_that_ends_first_does_not_make_a_submission_a_failure(login: Login) -> None:
    """Standard output is a pipe that nobody reads, as in `... | head -0`. The submission must not fail."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    for options, submitted in (["--dry-run"], False), ([], True):
        command = [sys.executable, "-m", "launchers.slurm", str(login.path), f"--cluster={login.site}", *options]
        done = subprocess.run(command, cwd=ROOT, env=login.env, stdout=write_end, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert "run folder" not in done.stderr
        assert "Broken pipe" not in done.stderr
        assert (login.asked is not None) == submitted
    os.close(write_end)


def test_a_dry_run_shows_all_that_will_run_and_touches_nothing(login: Login) -> None:
    login.site.write_text(
        "gpus: {syntax: none}\nranks_per_node: 1\nsrun_options: [--mpi=none]\ninterface: ib0\n"
        "nccl: {NCCL_IB_HCA: {value: mlx5_0, reason: the other is for storage}}\n"
        "container: {kind: pyxis, image: /images/torch.sqsh, mounts: ['/fast:/fast']}\n"
    )
    done = login.launch("--dry-run", "data.path=/nowhere", "--dependency=afterok:5", "--time=6")
    script, submission, attempt, table = re.split(r"\n# (?:Submission|Each attempt|/\S+):\n", done.stdout)
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=it\n")
    assert submission.startswith("sbatch --parsable --dependency=afterok:5 --kill-on-invalid-dep=yes")
    assert attempt.startswith("srun ")
    for word in ("--ntasks=2", "--mpi=none", "--container-image=/images/torch.sqsh", "/nowhere:/nowhere,/fast:/fast"):
        assert word in attempt
    for word in ("NCCL_IB_HCA=mlx5_0", "NCCL_SOCKET_IFNAME=ib0", "NODE1/0) export", "RANK=1;", "moe_dist.train"):
        assert word in table
    assert "node  ranks  needs  experts of" in done.stderr
    assert "WARNING: the time limit of 360 s leaves an attempt 60 s" in done.stderr
    assert not login.run.path.exists()
    assert login.asked is None


@pytest.mark.parametrize(
    ("words", "overrides", "code", "said"),
    [
        (
            "Invalid feature specification",
            ["placement.groups.image.node.feature=vision", "placement.groups.text.node.feature=text"],
            *(69, "rank 1 (experts of image): the default partition has no node with the feature vision; its nodes have "),
        ),
        (NO_NODES, [], 69, f"the cluster has no such nodes: sbatch --parsable .*{NO_NODES}"),
        ("Invalid account or account/partition combination specified", [], 78, "Invalid account .* from the cluster file"),
    ],
)
def test_a_refusal_of_sbatch_names_ranks_and_feature_or_sbatchs_words(
    login: Login, words: str, overrides: list[str], code: int, said: str
) -> None:
    login.refuses(words)
    assert re.search(said.replace("(", r"\(").replace(")", r"\)"), login.launch(*overrides, code=code).stderr)
    assert not list((login.run.path / "slurm").iterdir()), "no snapshot of a refused job"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--time=soon"], "--time='soon': must be"),
        (["--time=5"], "--time=5: signal_seconds=300: must be shorter than time='5'"),
        (["--array=sweep.txt", "--overwrite"], "--overwrite: cannot be combined with --array;"),
    ],
)
def test_invalid_options_are_refused(login: Login, options: list[str], words: str) -> None:
    assert words in login.launch(*options, code=ConfigError.exit_code).stderr


def test_each_task_of_an_array_is_a_run_of_its_own_and_the_site_limits_their_number(login: Login) -> None:
    (login.folder / "sweep.txt").write_text("train.steps=5\noptimizer.lr=0.5 run.name=mine\nrun.seed=2\n")
    login.site.write_text(login.site.read_text() + "array_tasks: 2\n")
    login.launch(f"--array={login.folder}/sweep.txt")
    assert "--array=0-2%2" in login.asked
    folder = login.run.path
    job = prepare(login.path, [], CPU, sweep=[("train.steps=5",), ("optimizer.lr=0.5", "run.name=mine")])
    assert job.sweep == (
        ("train.steps=5", f"run.root={folder}", "run.name=0"),
        ("optimizer.lr=0.5", "run.name=mine", f"run.root={folder}", "run.name=1"),
    )
    assert f"--output={folder}/slurm/slurm-%A_%a.out" in job.text


@pytest.mark.parametrize(
    ("line", "overrides", "error", "words"),
    [
        ("optimizer.lr=fast", [], ConfigError, "--array"),
        ("data.path=/none", [], (ConfigError, DataError), "--array"),
        ("parallel.edp=2", [], ConfigError, "--array"),
        ("run.seed=1", ["placement.groups.image.node.feature=vision"], ConfigError, ""),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_any_is_submitted(
    login: Login, line: str, overrides: list[str], error: type[Exception], words: str
) -> None:
    with refused(error, words):
        prepare(login.path, overrides, CPU, sweep=[("run.seed=0",), (line,)])


def test_a_refused_job_overwrites_nothing(login: Login) -> None:
    login.run.prepare()
    login.run.config_yaml.write_text(resolved_yaml(login.config))
    login.refuses(NO_NODES)
    login.launch("optimizer.lr=0.5", "--overwrite", code=ResourceError.exit_code)
    assert login.run.read_config() == login.config
    assert [entry.name for entry in login.run.path.parent.iterdir()] == ["it"]

    stand_in(login.bin, sbatch="echo 78")
    done = login.launch("optimizer.lr=0.5", "--overwrite")
    assert f"{login.run.path} moved to {login.run.path}.old-1" in done.stderr
    assert RunFolder(f"{login.run.path}.old-1").read_config() == login.config
    assert not login.run.config_yaml.exists()
