"""Runs the command `doctor` on this machine."""

from pathlib import Path
from typing import Any

import pytest

from launchers.doctor.__main__ import main
from moe_dist.runtime.status import record_save_seconds
from tests.support.invoked import invoke
from tests.support.stand_ins import stand_in
from tests.support.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[4]


def says(*arguments: str | Path) -> tuple[int, list[str]]:
    """Returns exit code and output lines."""
    result = invoke(main, *arguments)
    return result.exit_code, result.output.splitlines()


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Path:
    return write_config(tiny_config(tiny_data, tmp_path / "runs"), tmp_path / "x.yaml")


def problems(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("WARN", "FAIL"))]


def test_a_good_machine(config: Path, tmp_path: Path) -> None:
    code, lines = says(config)
    assert (code, problems(lines)) == (0, [])
    assert len({line[5:].partition(":")[0] for line in lines}) == len(lines), "one line a check"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.yaml"], "nothing is made"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["train.stpes=3"], 78, "FAIL configuration: train.stpes: unknown key; did you mean train.steps?"),
        (["data.path=/none"], 78, "FAIL configuration: data.path='/none': "),
        (["run.root=/proc/runs"], 78, "FAIL shared folder: run.root='/proc/runs' cannot be written on "),
        (["run.root=/etc/passwd/x"], 78, "FAIL shared folder: run.root='/etc/passwd/x' cannot be written on "),
        (["--cluster=none"], 78, "FAIL configuration: cluster file "),
        (["--on=slrum"], 78, "FAIL configuration: launcher 'slrum': must be one of local, slurm, ray, kubernetes"),
    ],
)
def test_each_fault_is_its_own_line(arguments: list[str], code: int, line: str, config: Path) -> None:
    found, lines = says(config, *arguments)
    assert found == code
    assert len(problems(lines)) == 1, lines
    assert problems(lines)[0].startswith(line)


def test_a_save_that_takes_longer_than_a_stop_may(config: Path, tmp_path: Path) -> None:
    log = tmp_path / "runs" / "tiny" / "log" / "rank_0.log"
    log.parent.mkdir(parents=True)
    record_save_seconds(log.parent, 400.0)
    code, lines = says(config)
    assert code == 1
    (line,) = problems(lines)
    assert line.startswith(
        "WARN stop grace: 300 s until the launcher kills (--grace), but the last saves took up to 400.0 s"
    )


def test_relative_paths_are_no_paths_for_a_job_of_ray(config: Path) -> None:
    """The doctor reports a relative path with the same error as `launchers.ray`. It finds this error without Ray, and
    makes no further checks."""
    code, lines = says(config, "run.root=runs", "--on=ray", "--probe")
    assert code == 78
    assert [line.partition(": must")[0] for line in lines[1:]] == ["FAIL configuration: run.root='runs'"]


def test_kubernetes_is_examined_by_what_its_pods_mount(config: Path, tmp_path: Path) -> None:
    code, lines = says(config, "--on=kubernetes")
    assert code == 78
    keys = ["kubernetes.image=null", "run.root=", "data.path="]
    assert all(f"FAIL manifests: {key}" in line for key, line in zip(keys, problems(lines), strict=True))
    site = tmp_path / "site.yaml"
    site.write_text("gpus: {syntax: none}\nkubernetes: {image: x/moe-dist, claims: {all: /}}\n")
    assert says(config, "--on=kubernetes", f"--cluster={site}")[0] == 0


def test_without_a_slurm(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(command: Any, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    monkeypatch.setattr("launchers.slurm.nodes.subprocess.run", missing)
    code, lines = says(config, "--on=slurm", "--probe")
    assert code == 69
    assert [line.partition(";")[0] for line in problems(lines)] == [
        "FAIL scheduler: Slurm: sinfo: [Errno 2] No such file or directory: 'sinfo'"
    ]
    assert lines[-1] == "--   probe: not started: its job would wait for nodes that the cluster lacks"


def test_the_probe_shows_a_container_the_folders_of_the_run(
    config: Path, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("gpus: {syntax: none}\ncontainer: {kind: pyxis, image: /img/torch.sqsh}\n")
    commands = {
        "sinfo": "case $* in *--Node*) echo 'n1|idle|(null)|8|(null)|all*' ;; *) echo 'all*|infinite' ;; esac",
        "scontrol": "echo",
        "srun": 'echo "$*" >asked; exit 1',
    }
    stand_in(tmp_path / "bin", monkeypatch, **commands)
    code, _ = says(config, "--on=slurm", "--probe", f"--cluster={site}")
    assert code == 69
    mounts = f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path},{tiny_data}:{tiny_data}"  # run.root does not exist
    assert mounts in (tmp_path / "bin" / "asked").read_text().split()
