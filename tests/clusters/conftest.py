"""Starts real clusters once per session, and defines the settings with which their jobs train the default model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shape import SEED, drawn
from tests.support.slurm import SlurmCluster

AGAIN = f"{SEED}={drawn().seed} make test-clusters"


def pytest_report_header() -> str:
    return f"{AGAIN} makes this cluster again: {drawn()}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the seed a second time, after all failures, because -q hides the header, which has the seed too."""
    terminalreporter.write_line(f"{AGAIN} makes these clusters again")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Starts four nodes: two with the feature text, then two with the feature vision."""
    folder, features = tmp_path_factory.mktemp("slurm"), "text text vision vision"
    with SlurmCluster(folder, nodes=4, features=features, shape=drawn()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cluster file with one rank per node."""
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text(drawn().site())
    return path


# With these settings a step of the default model takes 0.3 s, and the learning rate does not depend on the last step.
QUICK = {
    "optimizer.schedule": "{kind: constant, warmup_steps: 5}",
    "evaluation.every": 100_000,
    "evaluation.final_sequences": 4,
    "evaluation.balance_efficiency": "false",
    "evaluation.ablate_experts": "false",
    "checkpoint.every": 100_000,
    "parallel.timeout_seconds": 300,
    "monitor.sinks": "[{kind: console, every: 1}, {kind: jsonl}]",
}
DEFAULT = "configs/adamoe_moma_tiny_cpu.yaml"
HOSTED = "configs/qwen3_moe_transformers_tiny_cpu.yaml"
NODES = {"placement.groups.text.node.feature": "text", "placement.groups.image.node.feature": "vision"}
