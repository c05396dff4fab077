"""64 tasks run on 8 nodes with 8 fake GPUs each, and each task finds the place that the plan gives it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.command import plan_job
from moe_dist.config.cluster import load_cluster
from moe_dist.plan.preflight import check
from moe_dist.runtime.run_folder import RunFolder
from tests.support.shape import drawn
from tests.support.slurm import SlurmCluster
from tests.support.tiny import tiny_config, write_config


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Starts eight nodes with eight fake GPUs each: four nodes for text and four nodes for vision."""
    features = " ".join(drawn().features)
    with SlurmCluster(tmp_path_factory.mktemp("wide"), nodes=8, features=features, gpus=8, shape=drawn()) as cluster:
        yield cluster


def test_64_tasks_find_what_the_plan_says(wide: SlurmCluster, tmp_path: Path, tiny_data: Path) -> None:
    nodes = {"text": {"node": {"feature": "text"}}, "image": {"node": {"feature": "vision"}}}
    changes = {
        "parallel.device": "auto",
        "parallel.ep": 16,
        "parallel.edp": 4,
        "train.global_batch": 128,
        "model.moe.groups.text.num_experts": 8,
        "model.moe.groups.image.num_experts": 8,
        "placement.groups": {
            "text": {"ranks": [0, 1, 4, 5, 8, 9, 12, 13], **nodes["text"]},
            "image": {"ranks": [2, 3, 6, 7, 10, 11, 14, 15], **nodes["image"]},
        },
    }
    config = tiny_config(tiny_data, tmp_path / "runs", changes)
    site = tmp_path / "site.yaml"
    site.write_text(drawn().site(gpus=f"{{syntax: {drawn().gpus}, per_node: 8}}", domain_nodes=2))
    path = write_config(config, tmp_path / "x.yaml")
    job = wide.launch(str(path), f"--cluster={site}", "--program=slurm/probe.py")
    assert job.end() == 0, job.said

    run = RunFolder.of(config)
    logs = "".join(run.log_of(rank).read_text() for rank in range(64))
    found = sorted(re.findall(r"^probe (.*)$", logs, re.MULTILINE), key=lambda line: int(line.split()[0].partition("=")[2]))
    plan = plan_job(check(config), load_cluster(str(site), {}))
    names = list(zip(drawn().features, (*drawn().names, *drawn().more_names), strict=True))
    hosts = {kind: iter([name for has, name in names if has == kind]) for kind in ("text", "vision")}
    host_of = [next(hosts[node.feature or ""]) for node in plan.nodes]
    expected = [
        f"rank={rank} local_rank={place.local_rank} host={place.host} cuda=0,1,2,3,4,5,6,7 features={place.feature} "
        f"groups={'text' if place.feature == 'text' else 'image'} master={host_of[0]}"
        for rank, place in enumerate(plan.place_of(rank, host_of) for rank in range(64))
    ]
    assert found == expected
    assert {len(node.ranks) for node in plan.nodes} == {8}
    for first in range(0, 64, 16):  # the ranks of an EP group share two nodes that are neighbours in the plan
        assert len({plan.node_of(rank).index // 2 for rank in range(first, first + 16)}) == 1
