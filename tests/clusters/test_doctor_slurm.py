"""On a real Slurm the doctor reports nothing if all is well, and exactly one line for each planted fault."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clusters.conftest import DEFAULT, NODES, QUICK
from tests.support.planted import Node, slow_pair
from tests.support.shape import drawn
from tests.support.slurm import ROOT, SlurmCluster, overrides

FIRST, SECOND, THIRD, FOURTH = drawn().names


class Doctor:
    """Examines the default run on the cluster.

    Args:
        root: Folder of the runs.
    """

    def __init__(self, cluster: SlurmCluster, site: Path, root: Path) -> None:
        self.cluster, self.site, self.root = cluster, site, root

    def says(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Runs the doctor, and returns its exit code and its lines of output."""
        fixed = [f"run.root={self.root}", "--on=slurm", f"--cluster={self.site}"]
        done = self.cluster.run(
            sys.executable, "-m", "launchers.doctor", DEFAULT, *fixed, *arguments, cwd=ROOT, **variables
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.splitlines()


@pytest.fixture
def doctor(slurm: SlurmCluster, site: Path, tmp_path: Path) -> Doctor:
    return Doctor(slurm, site, tmp_path)


def faults(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith(("WARN", "FAIL"))]


def assert_only(said: tuple[int, list[str]], code: int, pattern: str) -> None:
    """Requires that exactly one line reports a fault, and that this line matches the pattern."""
    found = faults(said[1])
    assert len(found) == 1, "\n".join(said[1])
    assert re.search(pattern, found[0]), found[0]
    assert said[0] == code


def test_a_healthy_cluster_gives_no_warning(doctor: Doctor) -> None:
    code, lines = doctor.says(*overrides(NODES), "--probe", "--fabric")
    assert (code, faults(lines)) == (0, []), "\n".join(lines)
    checks = [line[5:].partition(":")[0] for line in lines]
    assert checks == [
        *("configuration", "plan", "scheduler", "nodes", "time limit", "stop grace", "rendezvous host", "ports"),
        *("shared folder", "room", "data", "clocks", "versions", "apex", "/dev/shm", "open files", "cores", "fabric"),
    ]
    assert "6 pairs of 4 nodes" in lines[-1]
    assert not list(doctor.root.iterdir()), "nothing is left in run.root"


def test_a_run_folder_that_one_node_can_only_read(doctor: Doctor, slurm: SlurmCluster) -> None:
    with Node(slurm, SECOND).read_only(doctor.root):
        said = doctor.says("--probe")
    assert_only(said, 78, f"^FAIL shared folder: run.root=.* cannot be written on {SECOND}: .*Read-only file system;")


def test_a_slow_pair_of_nodes(doctor: Doctor, slurm: SlurmCluster) -> None:
    with slow_pair(Node(slurm, SECOND), Node(slurm, FOURTH), rate="200mbit"):
        said = doctor.says("--probe", "--fabric")
    assert_only(
        said,
        1,
        f"^WARN fabric: {SECOND} and {FOURTH} are slow with each other: [0-9.]+ MB/s in all-to-all, .* median pair has",
    )


def test_the_job_itself_names_what_differs_before_it_trains(slurm: SlurmCluster, site: Path, tmp_path: Path) -> None:
    values = {**QUICK, "run.root": tmp_path, "run.name": "mixed", "train.steps": 2}
    with Node(slurm, THIRD).other_version("torch", "2.11.0", tmp_path):
        job = slurm.launch(DEFAULT, *overrides(values), f"--cluster={site}")
        assert job.end() == 69, job.said
    assert f"2.11.0 on {THIRD}" in job.said
    assert not (tmp_path / "mixed" / "metrics.jsonl").exists()
