"""Trains the default model on four nodes of a real Slurm. Experts are on the nodes of their modality. After preemptions,
lost nodes and other events, the results are bit-equal."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launchers.command import TRAIN
from launchers.restart import committed_step
from moe_dist.errors import ResourceError, StoppedError
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.clusters.conftest import DEFAULT, HOSTED, NODES, QUICK
from tests.support import slow_close, slowed
from tests.support.cover import exhaustive
from tests.support.shape import drawn
from tests.support.slurm import ROOT, SlurmCluster, SlurmJob, hosts, overrides

pytestmark = pytest.mark.timeout(900)
STEPS = 25
SECOND = drawn().names[1]
AGAIN = re.compile(r"\(PreemptMode=CANCEL\); submitted again as job (\d+)")


class Runs:
    """Starts runs of the default model on the cluster, each in a new folder."""

    def __init__(self, cluster: SlurmCluster, site: Path, root: Path) -> None:
        self.cluster, self._site, self._root = cluster, site, root

    def start(
        self, name: str, steps: int, *arguments: str, config: str = DEFAULT, **changes: Any
    ) -> tuple[SlurmJob, RunFolder]:
        values = {**QUICK, "run.root": self._root, "run.name": name, "train.steps": steps, **changes}
        job = self.cluster.launch(config, *overrides(values), f"--cluster={self._site}", *arguments)
        return job, RunFolder(self._root / name)


@pytest.fixture(scope="module")
def runs(slurm: SlurmCluster, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(slurm, site, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[SlurmJob, RunFolder]:
    """Runs a heterogeneous job as one world: text experts on text nodes, image experts on vision nodes."""
    site = tmp_path_factory.mktemp("undisturbed") / "site.yaml"
    site.write_text(drawn().site(exclusive=True))
    job, run = runs.start("undisturbed", STEPS, f"--cluster={site}", **NODES)
    assert job.end() == 0, job.said
    assert threads(run) == {"1"}
    return job, run


def records(run: RunFolder) -> list[Mapping[str, Any]]:
    """Returns the step records without the fields that differ between runs of the same seed."""
    return [reproducible_part(line) for line in read_lines(run.metrics_jsonl) if line["kind"] == "step"]


def steps_taken(run: RunFolder) -> int:
    return len(records(run)) if run.metrics_jsonl.exists() else 0


def threads(run: RunFolder) -> set[str]:
    """Returns the numbers of threads that rank 0 had in the attempts."""
    return {entry["threads"] for entry in json.loads((run.path / "provenance.json").read_text())}


def test_experts_live_on_the_nodes_of_their_kind(undisturbed: tuple[SlurmJob, RunFolder], slurm: SlurmCluster) -> None:
    job, run = undisturbed
    kinds = {name: slurm.scontrol("show", "node", name).partition("ActiveFeatures=")[2].split()[0] for name in hosts(run)}
    assert [kinds[name] for name in hosts(run)] == ["text", "text", "vision", "vision"]
    assert len(kinds) == 4
    assert re.search(rf"^{drawn().names[0]} +0 +text +text", job.said, re.MULTILINE), "the plan stands in the job's output"
    assert job.field("HetJobId") == job.number
    assert [(each.verdict, each.last_step) for each in run.read_status().attempts] == [(0, STEPS)]


def lose_time(job: SlurmJob, run: RunFolder) -> SlurmJob:
    """Lowers the time limit, so that slurmctld ends the job within a minute and a half, at one of its checks."""
    hours, minutes, seconds = map(int, job.field("RunTime").split(":"))
    limit = 60 * hours + minutes + (1 if seconds < 30 else 2)  # in minutes; leaves enough time for a save
    job.cluster.scontrol("update", f"JobId={job.number}", f"TimeLimit={limit}")
    job.wait_for_requeue()
    job.cluster.scontrol("update", f"JobId={job.number}", "TimeLimit=30")
    return job


def preempt(job: SlurmJob, run: RunFolder) -> SlurmJob:
    """Runs a job of higher priority on one node for a moment."""
    urgent = [f"--partition={drawn().urgent}", "--exclusive", f"--nodelist={SECOND}", "--wrap=true", "-o", "/dev/null"]
    done = job.cluster.run("sbatch", *urgent)
    assert done.returncode == 0, done.stderr
    if drawn().preemption == "REQUEUE":
        job.wait_for_requeue()
        return job
    job.wait_for(lambda: AGAIN.search(job.said) is not None, "submitted again")
    (number,) = AGAIN.findall(job.said)
    return SlurmJob(job.cluster, number, run.path / "slurm" / f"slurm-{number}.out")


def lose_a_node(job: SlurmJob, run: RunFolder) -> SlurmJob:
    """Powers off the job's second node, which does not run the batch script."""
    job.cluster.kill_node(SECOND)
    job.wait_for_requeue()
    return job


@pytest.mark.parametrize(
    ("disturb", "verdict", "per_node"),
    [exhaustive(lose_time, 75, 1), (preempt, 75, 1), (lose_a_node, 1, 2)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_cluster_does_to_a_job_leaves_no_trace_in_the_losses(
    runs: Runs,
    undisturbed: tuple[SlurmJob, RunFolder],
    tmp_path: Path,
    disturb: Callable[[SlurmJob, RunFolder], SlurmJob],
    verdict: int,
    per_node: int,
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(drawn().site(ranks_per_node=per_node))
    every = 5 if disturb is lose_a_node else 100_000  # a lost node has no time to save
    program = slowed.PROGRAM if disturb is lose_time else shlex.join(TRAIN)
    options = (f"--cluster={site}", f"--program={program}")
    job, run = runs.start(disturb.__name__, STEPS, *options, **{"checkpoint.every": every})
    job.wait_for(lambda: steps_taken(run) >= 7, "at step 7")
    last = disturb(job, run)
    assert last.end() == 0, last.said
    runs.cluster.start_node(SECOND)

    first, second = run.read_status().attempts
    assert (first.verdict, second.verdict, second.last_step) == (verdict, 0, STEPS)
    assert [line["step"] for line in records(run)] == list(range(1, STEPS + 1))
    assert threads(run) == {"1"}, f"by {drawn().threads}"
    assert records(run) == records(undisturbed[1])
    if verdict == StoppedError.exit_code:
        assert first.reason.startswith(f"stopped on request after step {first.last_step};")
        assert f"step {first.last_step + 1}/{STEPS}" in last.said, "the output of a requeued job is appended"
        decided = "requeued" if disturb is lose_time else "Slurm has requeued the job"
        assert decided in job.said or last is not job
    else:
        assert re.fullmatch(rf"ranks \d-\d: Node failure on {SECOND}", first.reason), "whatever its peers have seen"
        assert SECOND in hosts(run)
        assert SECOND not in hosts(run, attempt=1)


@pytest.mark.exhaustive
def test_a_model_of_transformers_goes_on_after_its_job_is_preempted(runs: Runs) -> None:
    first, whole = runs.start("hosted_undisturbed", STEPS, config=HOSTED)
    assert first.end() == 0, first.said
    job, run = runs.start("hosted", STEPS, config=HOSTED)
    job.wait_for(lambda: steps_taken(run) >= 7, "at step 7")
    last = preempt(job, run)
    assert last.end() == 0, last.said
    assert [each.verdict for each in run.read_status().attempts] == [75, 0]
    assert records(run) == records(whole)


@pytest.mark.exhaustive
def test_a_node_that_takes_the_batch_script_along_is_named_by_the_next_attempt(
    runs: Runs, undisturbed: tuple[SlurmJob, RunFolder], tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(drawn().site(ranks_per_node=2))
    job, run = runs.start("batch_node", STEPS, f"--cluster={site}", **{"checkpoint.every": 5})
    job.wait_for(lambda: steps_taken(run) >= 7, "at step 7")
    node = job.field("BatchHost")
    runs.cluster.kill_node(node)
    job.wait_for_requeue()
    assert job.end() == 0, job.said
    runs.cluster.start_node(node)
    first, second = run.read_status().attempts
    assert (first.verdict, second.verdict) == (1, 0)
    assert first.reason.endswith(f": Node failure on {node}")
    assert records(run) == records(undisturbed[1])


@pytest.mark.exhaustive
def test_a_suspended_job_goes_on_and_one_with_a_frozen_rank_is_requeued(
    runs: Runs, undisturbed: tuple[SlurmJob, RunFolder]
) -> None:
    """If all ranks are suspended, no rank waits for another. If one rank freezes, its peers wait until the timeout."""
    job, run = runs.start("suspended", STEPS, **{"parallel.timeout_seconds": 60, "checkpoint.every": 5})
    job.wait_for(lambda: steps_taken(run) >= 7, "at step 7")
    job.cluster.scontrol("suspend", job.number)
    time.sleep(10.0)
    taken = steps_taken(run)
    job.cluster.scontrol("resume", job.number)
    job.wait_for(lambda: steps_taken(run) > taken, "resumed")
    assert job.field("Restarts") == "0"
    frozen = job.processes(rank=1)
    assert frozen
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    job.wait_for_requeue()
    assert job.end() == 0, job.said
    first, second = run.read_status().attempts
    assert (first.verdict, first.rank, second.verdict) == (1, 1, 0)
    assert f"nodes at fault: {hosts(run)[1]};" in job.said, "not the node of a rank that waited"
    assert records(run) == records(undisturbed[1])


@pytest.mark.exhaustive
def test_a_sink_that_does_not_close_leaves_the_job_completed(slurm: SlurmCluster, site: Path, tmp_path: Path) -> None:
    """srun kills a task that still runs a minute after another task has ended."""
    values = {**QUICK, "run.root": tmp_path, "run.name": "slow", "train.steps": 3}
    program, ends = f"--program={slow_close.PROGRAM}", {slow_close.ENDS: str(tmp_path)}
    job = slurm.launch(DEFAULT, *overrides(values), f"--cluster={site}", program, **ends)
    assert job.end() == 0, job.said
    assert job.field("JobState") == "COMPLETED"
    assert [each.verdict for each in RunFolder(tmp_path / "slow").read_status().attempts] == [0]


@pytest.mark.parametrize("when", ["training", exhaustive("importing")])
def test_a_burst_of_signals_to_every_process_saves_once(runs: Runs, when: str) -> None:
    job, run = runs.start(f"burst_{when}", STEPS)
    if when == "training":
        job.wait_for(lambda: steps_taken(run) >= 5, "at step 5")
    else:
        job.wait_for(lambda: any(imports_torch(pid) for pid in job.processes()), "importing torch")
        assert not run.status_json.exists()
    assert job.burst() >= 5, "a batch script and four ranks"
    job.wait_for_requeue()
    job.cancel()
    (ending,) = run.read_status().attempts
    assert ending.verdict == StoppedError.exit_code
    assert committed_step(run.checkpoints) == ending.last_step
    saved = [path.name for path in run.checkpoints.glob("step_*")]
    if when == "importing" and not saved:  # rank 0 still waits for the other ranks
        assert (ending.reason.partition(" while rank 0 waited for rank")[0], ending.last_step) == ("stopped on request", 0)
    else:
        assert ending.reason.startswith(f"stopped on request after step {ending.last_step};")
        assert saved == [f"step_{ending.last_step}"]
    assert "Traceback" not in "".join(run.log_of(rank).read_text() for rank in range(4)) + job.said


def imports_torch(pid: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def test_a_plan_that_nobody_can_satisfy_ends_with_69_and_names_ranks_and_feature(runs: Runs, tmp_path: Path) -> None:
    values = {**NODES, "placement.groups.image.node.feature": "holography"}
    values["run.root"] = str(tmp_path)
    done = runs.cluster.run(sys.executable, "-m", "launchers.slurm", DEFAULT, *overrides(values))
    assert done.returncode == ResourceError.exit_code, done.stderr
    assert "(experts of image): the default partition has no node with the feature holography;" in done.stderr


def test_the_readmes_sbatch_works_as_written(slurm: SlurmCluster) -> None:
    """Submits the default job on one node, with the default cluster file. Then stops the job, which saves."""
    readme = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^\$ (sbatch slurm/train\.sbatch .*)$", readme, re.MULTILINE)
    assert "configs/adamoe_moma_tiny_cpu.yaml" in line
    name = f"slurm-test-{uuid.uuid4().hex[:8]}"  # no user's run has this name
    done = slurm.run("bash", "-c", f"{line} run.name={name}")
    assert done.returncode == 0, done.stderr
    number = done.stdout.removeprefix("Submitted batch job ").strip()
    job, run = SlurmJob(slurm, number, ROOT / f"slurm-{number}.out"), RunFolder(ROOT / "runs" / name)
    try:
        job.wait_for(lambda: steps_taken(run) >= 2, "at step 2")
        job.cancel()
        job.wait_for(lambda: "verdict 75" in job.said, "saved")
        assert committed_step(run.checkpoints) >= 2
    finally:
        job.output.unlink(missing_ok=True)
        for pointer in (ROOT / ".moe_dist").glob(f"job_*_{number}"):
            pointer.unlink()
        shutil.rmtree(run.path, ignore_errors=True)
