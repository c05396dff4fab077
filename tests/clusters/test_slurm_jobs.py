"""Tests jobs on a real Slurm. Their ranks end as the test says, and do not import torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers.command import TRAIN
from launchers.slurm.nodes import leave_out
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, ResourceError, StoppedError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.cover import exhaustive
from tests.support.pretend import PROGRAM
from tests.support.shape import PREEMPTION, drawn
from tests.support.slurm import ROOT, SlurmCluster, SlurmJob, hosts
from tests.support.tiny import tiny_config, write_config

FIRST, SECOND, THIRD, _ = drawn().names
ANY = "|".join(map(re.escape, drawn().names)).join(("(?:", ")"))


class Stage:
    """A run of four pretended ranks on the cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder = cluster, folder
        groups = {"text": {"ranks": [0, 1]}, "image": {"ranks": [2, 3]}}
        changes = {"parallel.ep": 4, "run.name": "it", "placement.groups": groups}
        self.config = write_config(tiny_config(data, folder / "runs", changes), folder / "it.yaml")
        self.run = RunFolder(folder / "runs" / "it")
        self.site = folder / "site.yaml"
        self.set_site()

    def set_site(self, **keys: Any) -> None:
        self.site.write_text(drawn().site(**keys))

    def launch(self, ends: str, *arguments: str, **variables: str) -> SlurmJob:
        options = (f"--cluster={self.site}", f"--program={PROGRAM}")
        return self.cluster.launch(str(self.config), *options, *arguments, PRETEND=ends, **variables)

    def sbatch(self, ends: str, *arguments: str, clone: Path = ROOT) -> SlurmJob:
        """Submits slurm/train.sbatch by plain `sbatch`; `arguments` has the options, then the script."""
        variables = {"MOE_DIST_CLUSTER": str(self.site), "MOE_DIST_PROGRAM": PROGRAM, "MOE_DIST_PYTHON": sys.executable}
        return self.cluster.sbatch(*arguments, output=self.folder / "out.txt", cwd=clone, PRETEND=ends, **variables)

    def take_a_node(self) -> None:
        """Runs a job of higher priority on one node for a moment."""
        options = (
            f"--partition={drawn().urgent}",
            "--exclusive",
            f"--nodelist={SECOND}",
            "--wrap=true",
            "--output=/dev/null",
        )
        done = self.cluster.run("sbatch", *options)
        assert done.returncode == 0, done.stderr

    def verdicts(self) -> list[int | None]:
        return [ending.verdict for ending in self.run.read_status().attempts]


def up(stage: Stage, job: SlurmJob, *, attempt: int = 0) -> None:
    there = [stage.run.log_of(rank) for rank in range(4)]
    words = f"attempt {attempt}: rank"
    job.wait_for(lambda: all(log.exists() and words in log.read_text() for log in there), "up on all ranks")


@pytest.fixture
def stage(slurm: SlurmCluster, tmp_path: Path, tiny_data: Path) -> Stage:
    return Stage(slurm, tmp_path, tiny_data)


def test_75_alone_is_followed_by_a_requeue_until_the_site_has_enough(stage: Stage) -> None:
    stage.set_site(max_restarts=1)
    job = stage.launch("stop+5")
    assert job.end() == StoppedError.exit_code
    assert stage.verdicts() == [75, 75]
    assert "requeued" in job.said
    assert "not requeued: it was restarted 1 times already" in job.said
    again = re.search(r"to continue anyway: (sbatch .*train\.sbatch)", job.said)

    more = stage.cluster.sbatch(*shlex.split(again[1])[1:], output=stage.folder / "more.txt", PRETEND="done")
    assert more.end() == 0, more.said
    assert stage.verdicts() == [75, 75, 0], "the command that is printed works as printed"


@pytest.mark.exhaustive
def test_a_task_of_an_array_is_requeued_by_itself(stage: Stage) -> None:
    """The last task too is requeued alone, although its id is also the id of the whole array."""
    sweep = stage.folder / "sweep.txt"
    sweep.write_text("run.seed=0\nrun.seed=1\n")
    array = stage.launch("stop+5 done", f"--array={sweep}")
    for task in range(2):
        name = f"{array.number}_{task}"
        job = SlurmJob(stage.cluster, name, stage.run.path / "slurm" / f"slurm-{name}.out")
        assert job.end() == 0, job.said
        assert job.field("Restarts") == "1"
        attempts = RunFolder(stage.run.path / str(task)).read_status().attempts
        assert [each.verdict for each in attempts] == [75, 0], job.said


def test_the_node_of_the_rank_at_fault_is_left_out_and_not_that_of_its_peers(stage: Stage) -> None:
    """Each node has two ranks. One rank is killed, one freezes until its peers' watchdogs report it, and one ends by a
    native exit. In each of the three cases the peers of this rank raise an exception and end before it."""
    stage.set_site(ranks_per_node=2)  # the job has two of the four nodes, and two nodes remain
    victims = drawn().victims
    job = stage.launch("kill:{}+2 freeze:{}+1 exit:{}+1 done".format(*victims))
    assert job.end() == 0, job.said
    killed, frozen, left, done = stage.run.read_status().attempts
    assert [(each.verdict, each.rank) for each in (killed, frozen, left)] == [(1, rank) for rank in victims]
    assert done.verdict == 0
    at_fault = [hosts(stage.run, attempt=attempt)[rank] for attempt, rank in enumerate(victims)]
    of_killed, of_frozen, of_left = (f"rank {rank} on {at_fault[at]}: " for at, rank in enumerate(victims))
    assert killed.reason == f"{of_killed}killed by SIGKILL"
    assert frozen.reason.startswith(f"{of_frozen}collective 'combine rows' of layers.1 did not finish in 4 s")
    assert left.reason == f"{of_left}exit code 3; attempt 2: rank {victims[2]} is here"
    for attempt in (1, 2):
        assert not {*at_fault[:attempt]} & {*hosts(stage.run, attempt=attempt)}, "the next attempt leaves it out"
    assert f"nodes at fault: {at_fault[0]}, {at_fault[1]}; the next attempt leaves them out" in job.said
    assert f"rank {victims[2]} failed first (exit code 3) on {at_fault[2]}" in job.said


def test_data_that_one_node_lacks_are_named_at_once_with_node_and_path(stage: Stage) -> None:
    # The data are copied, because the mount over them stays on its node after the test.
    data = shutil.copytree(load_config(stage.config).data.path, stage.folder / "data")
    stage.set_site(prelude=[f'[ "$SLURMD_NODENAME" != {THIRD} ] || mount -t tmpfs none {data}'])
    job = stage.launch("", f"--program={shlex.join(TRAIN)}", "train.steps=3", f"data.path={data}")
    assert job.end() == ConfigError.exit_code, job.said
    (ending,) = stage.run.read_status().attempts
    assert (ending.verdict, ending.rank) == (ConfigError.exit_code, 2)
    assert ending.reason.startswith(f"rank 2 on {THIRD}: exit code {ConfigError.exit_code}; ")
    assert str(data) in ending.reason
    seconds = (ending.ended or 0.0) - ending.started
    assert seconds < 60.0, "srun's own wait for the other tasks"


@pytest.mark.exhaustive  # test_slurm_training.py preempts a job in the mode of the drawn cluster
@pytest.mark.parametrize("mode", PREEMPTION)
def test_a_job_that_is_preempted_again_and_again_goes_on_in_either_mode(stage: Stage, mode: str) -> None:
    """Slurm requeues the job in one mode. In the other mode Slurm cancels the job, and its batch script submits it again.
    Only the last attempt has a checkpoint."""
    stage.cluster.scontrol("update", f"PartitionName={drawn().partition}", f"PreemptMode={mode}")
    try:
        first = job = stage.launch("wait wait wait done")
        for times in range(1, 4):
            up(stage, job, attempt=times - 1)
            stage.take_a_node()
            if mode == "REQUEUE":
                job.wait_for_requeue(times)
                continue
            words = r"\(PreemptMode=CANCEL\); submitted again as job (\d+)"
            job.wait_for(lambda words=words, job=job: re.search(words, job.said) is not None, "submitted again")
            (number,) = re.findall(words, job.said)
            job = SlurmJob(stage.cluster, number, stage.run.path / "slurm" / f"slurm-{number}.out")
        assert job.end() == 0, job.said
    finally:
        stage.cluster.scontrol("update", f"PartitionName={drawn().partition}", f"PreemptMode={drawn().preemption}")
    assert first.field("JobState") == ("PREEMPTED" if mode == "CANCEL" else "COMPLETED")
    assert stage.verdicts() == [75, 75, 75, 0]


@pytest.mark.exhaustive
def test_a_rank_that_diverges_while_its_peers_are_killed_gives_the_code_and_speaks_first(stage: Stage) -> None:
    job = stage.launch("diverge")
    assert job.end() == 70
    words = ["rank 2 failed first", "loss was nan for 10 steps in a row", "the other ranks ended after it", "by SIGKILL"]
    places = [job.said.find(each) for each in words]
    assert -1 not in places
    assert places == sorted(places), job.said
    assert stage.verdicts() == [70]


def test_a_job_that_was_cancelled_saves_and_stays_away(stage: Stage) -> None:
    job = stage.launch("wait+2")
    up(stage, job)
    job.cancel()
    job.wait_for(lambda: "verdict 75" in job.said, "concluded")
    assert "Slurm is ending the job (COMPLETING) for good; continue it with: sbatch " in job.said
    assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0")
    assert stage.verdicts() == [75]


def plain(stage: Stage) -> list[str]:
    return ["slurm/train.sbatch", str(stage.config)]


def test_the_first_attempts_code_and_configuration_run_whatever_becomes_of_the_clone(stage: Stage) -> None:
    clone = stage.folder / "clone"
    for part in ("moe_dist", "launchers", "slurm", "configs", "tests/support"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    shutil.copy(stage.config, clone / "it.yaml")
    options = ("--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "slurm/train.sbatch", "it.yaml", "optimizer.lr=0.125")
    job = stage.sbatch("stop+2 done", *options, clone=clone)
    job.wait_for_requeue()
    for part in ("moe_dist", "launchers", "slurm", "tests"):
        shutil.rmtree(clone / part)
    (clone / "it.yaml").write_text("broken: [")
    assert job.end() == 0, job.said
    assert stage.verdicts() == [75, 0]
    assert stage.run.read_config().optimizer.lr == 0.125


def test_another_allocation_ends_with_78_and_the_line_that_is_right(stage: Stage) -> None:
    job = stage.sbatch("done", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", *plain(stage))
    assert job.end() == ConfigError.exit_code
    assert "the plan needs 4 nodes, the job has 2 nodes" in job.said
    (line,) = (line.strip() for line in job.said.splitlines() if line.strip().startswith("sbatch "))
    assert not stage.run.path.exists(), "nothing was begun"
    right = stage.sbatch("done", *shlex.split(line)[1:])
    assert right.end() == 0, right.said


def test_nodes_without_the_feature_end_with_78_and_the_heterogeneous_line_that_is_right(stage: Stage) -> None:
    asked = ["placement.groups.text.node.feature=text", "placement.groups.image.node.feature=vision"]
    job = stage.sbatch("done", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", *plain(stage), *asked)
    assert job.end() == ConfigError.exit_code
    assert "the plan needs 2 kinds of nodes, the job has 1 component" in job.said
    (line,) = (line.strip() for line in job.said.splitlines() if line.strip().startswith("sbatch "))
    right = stage.sbatch("done", *shlex.split(line)[1:])
    assert right.end() == 0, right.said

    one = ["placement.groups.text.node.feature=vision", "placement.groups.image.node.feature=vision", "run.name=other"]
    stage.set_site(ranks_per_node=2)
    nodes = [f"--nodelist={FIRST},{THIRD}", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    wrong = stage.sbatch("done", *nodes, *plain(stage), *one)
    assert wrong.end() == ConfigError.exit_code
    assert f"the plan needs nodes with the feature 'vision', missing on {FIRST}" in wrong.said


def test_a_rank_whose_node_is_another_than_planned_ends_the_job_with_69(stage: Stage) -> None:
    # as if somebody had replaced the node
    changed = f'[ "$SLURMD_NODENAME" != {THIRD} ] || export MOE_DIST_NODE_FEATURES=text'
    stage.set_site(prelude=[changed])
    asked = ["placement.groups.text.node.feature=text", "placement.groups.image.node.feature=vision"]
    job = stage.launch("done", *asked)
    assert job.end() == ResourceError.exit_code
    assert "verdict 69" in job.said
    assert "rank 2 (experts of image) is not on its planned node: its node must have the feature 'vision'" in job.said
    assert f"to do: {THIRD} has text; " in job.said
    assert stage.verdicts() == [69]


# --- nested jobs, faulty nodes, options of the site


@pytest.mark.exhaustive
def test_a_job_that_another_job_submits_believes_none_of_its_variables(stage: Stage) -> None:
    """The outer job is an array task with memory per CPU. Its variables claim a requeue and two components."""
    shape = ["--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--mem=50"]
    inner = shlex.join(["sbatch", "--parsable", f"--output={stage.folder}/inner.txt", *shape, *plain(stage)])
    outer = "SLURM_RESTART_COUNT=3 SLURM_HET_SIZE=2 SLURM_CPU_BIND=none MOE_DIST_SNAPSHOT=/elsewhere"
    job = stage.sbatch("done", "--array=5", "--ntasks=1", "--mem-per-cpu=10", f"--wrap={outer} {inner}")
    assert job.end() == 0, job.said
    found = SlurmJob(stage.cluster, job.said.strip(), stage.folder / "inner.txt")
    assert found.end() == 0, found.said
    assert [each.attempt_id for each in stage.run.read_status().attempts] == [f"slurm-ci-{found.number}-0"]


def test_a_requeued_job_leaves_out_a_node_at_fault_unless_it_needs_all_nodes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(stage.cluster.folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    stage.set_site(ranks_per_node=2, exclude=f"[{SECOND}]")
    job = stage.launch("wait+2 done")
    up(stage, job)
    at_fault, other = job.hosts
    assert SECOND not in (at_fault, other)
    (script,) = (stage.run.path / "slurm").glob("*/train.sbatch")
    assert leave_out(job.number, [at_fault], script) == f"nodes at fault: {at_fault}", "it was not requeued"
    stage.cluster.scontrol("requeue", job.number)
    assert "may use them again: sbatch" in leave_out(job.number, [at_fault, other], script), "one node would be left"
    assert leave_out(job.number, [at_fault], script) == f"nodes at fault: {at_fault}; the next attempt leaves them out"
    assert job.end() == 0, job.said
    assert set(job.hosts) == {*drawn().names} - {SECOND, at_fault}


def test_a_spare_node_replaces_the_one_at_fault_and_the_sites_options_reach_srun(stage: Stage) -> None:
    stage.set_site(ranks_per_node=2, spare_nodes=1, srun_options="[--cpu-bind=none, --mpi=none]")
    job = stage.launch("wait+2 done")
    up(stage, job)
    given = tuple(job.hosts)
    assert len(given) == 3
    (script,) = (stage.run.path / "slurm").glob("*/train.sbatch")
    (script.parent / f"job_{job.number}_faults").write_text(given[0])
    stage.cluster.run("scancel", "--signal=USR2", job.number)
    assert job.end() == 0, job.said
    assert stage.verdicts() == [75, 0]
    first, second = re.findall(rf"^node .*\n({ANY}) .*\n({ANY}) ", job.said, re.MULTILINE)
    assert (first, second) == (given[:2], given[1:])


# --- preludes and containers, which the site runs around a rank


RUNTIMES = {
    "apptainer": ("apptainer", 'while [ "${1##*.}" != sif ]; do shift; done; shift; IN_BOX=1 "$@"; exit $?'),
    # pyxis is a plugin of srun, so this srun removes the plugin's options
    "pyxis": (
        "srun",
        'for word; do shift; case $word in --container-*) ;; *) set -- "$@" "$word" ;; esac; done; IN_BOX=1 exec REAL "$@"',
    ),
}
ASKED = {
    "apptainer": r"exec --bind=FOLDER:FOLDER .*--bind=/data:/data:ro --pwd=\S+/code /img/torch\.sif \S+ -c",
    "pyxis": r"--container-image=/img/torch\.sif --container-mounts=FOLDER:FOLDER,\S+,/data:/data:ro env --block-signal",
}


@pytest.mark.parametrize("kind", ["apptainer", exhaustive("pyxis")])
def test_a_container_passes_on_environment_signals_and_exit_code(stage: Stage, tmp_path: Path, kind: str) -> None:
    """A stand-in for the runtime prints its arguments, then runs the command."""
    name, body = RUNTIMES[kind]
    runtime = tmp_path / "bin" / name
    runtime.parent.mkdir()
    runtime.write_text(f'#!/bin/bash\necho "asked: $*" >&2\n{body.replace("REAL", str(shutil.which("srun")))}\n')
    runtime.chmod(0o755)
    container = f"{{kind: {kind}, image: /img/torch.sif, mounts: ['/data:/data:ro']}}"
    stage.set_site(container=container, python=sys.executable)
    path = {"PATH": f"{runtime.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}

    there = tmp_path / "there"  # the first rank that exits with 7 ends the others, so each waits until all have printed
    there.mkdir()
    show = f"""
import os, pathlib, sys, time
print('box', os.environ['IN_BOX'], os.environ['RANK'], file=sys.stderr, flush=True)
pathlib.Path({str(there)!r}, os.environ['RANK']).touch()
while len(os.listdir({str(there)!r})) < 4: time.sleep(0.02)
sys.exit(7)"""
    options = (f"--cluster={stage.site}", f"--program={shlex.join(['-c', show])}", "run.name=shown")
    job = stage.cluster.launch(str(stage.config), *options, **path)
    assert job.end() == 1, f"an exit code of another program; {job.said}"
    shown = RunFolder(tmp_path / "runs" / "shown")
    assert [f"box 1 {rank}" in shown.log_of(rank).read_text() for rank in range(4)] == [True] * 4
    assert re.search(ASKED[kind].replace("FOLDER", str(shown.path)), job.said + shown.log_of(1).read_text())

    waiting = stage.launch("wait+1 done", **path)
    up(stage, waiting)
    stage.cluster.run("scancel", "--signal=USR2", waiting.number)
    assert waiting.end() == 0, waiting.said
    assert stage.verdicts() == [75, 0]
