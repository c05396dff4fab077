"""A short run of Megatron-Core's engine on a cluster, and an equal run of moe_dist's engine on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.runtime.run_folder import RunFolder
from tests.support.ray_cluster import DATA, steps

ROOT = Path(__file__).parents[2]
CONFIG = "configs/adamoe_moma_megatron_cpu.yaml"
STEPS = 10
CHANGES = (
    f"data.path={DATA}",
    f"train.steps={STEPS}",
    "checkpoint.every=3",
    "evaluation.every=100000",
    "evaluation.final_sequences=4",
    "evaluation.balance_efficiency=false",
    "evaluation.ablate_experts=false",
    "optimizer.eps=1e-5",  # so large that rounding of a gradient near zero makes no full Adam step
)
# One rank reads the micro-batches of the pipeline's four ranks, so that balance losses have the same counts.
OWN = ("engine={kind: moe_dist}", "parallel.ep=1", "parallel.edp=1", "placement={policy: interleaved}")


def check_losses(run: RunFolder, root: Path) -> None:
    """Requires that every step's loss is within 1e-5 of a run with moe_dist's engine, which writes below `root`."""
    command = [sys.executable, "-m", "launchers.local", CONFIG, *CHANGES, *OWN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"run.root={root}", "run.name=own"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    own, found = ([line["scalars"]["loss/total"] for line in steps(each)] for each in (RunFolder(root / "own"), run))
    assert len(own) == STEPS
    assert found == pytest.approx(own, rel=1e-5)
