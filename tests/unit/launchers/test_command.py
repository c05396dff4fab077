"""Launchers turn a plan into the argv and environment of each rank."""

import importlib
from pathlib import Path

import pytest

from launchers.command import (
    JobPlan,
    LaunchPlan,
    NodePlan,
    absolute_paths,
    file_rendezvous,
    fit_world_size,
    plan_job,
    rank_commands,
)
from launchers.ray.nodes import nodes_sharing_ep_groups
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.plan.preflight import check
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.place import RunPlace
from tests.support.engine_run import megatron
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config


def plan(**changes: object) -> LaunchPlan:
    values: dict[str, object] = {
        "config": Path("configs/x.yaml"),
        "overrides": ("train.steps=3",),
        "job": JobPlan((NodePlan(0, (0, 1)), NodePlan(1, (2,)))),
        "rendezvous": {"MASTER_ADDR": "node1", "MASTER_PORT": "2345"},
        "attempt": 4,
        "attempt_id": "job.4",
    }
    return LaunchPlan(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_a_file_rendezvous_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = rank_commands(plan(rendezvous=file_rendezvous(Path("store"))))[0]
    assert RankEnv.from_environment(command.env).init_method == f"file://{tmp_path}/store"


def test_only_local_ranks_are_kept_on_the_loopback_and_cuda_is_left_alone() -> None:
    local = rank_commands(plan(loopback=True, threads=2))[0].env
    spread = rank_commands(plan())[0].env
    assert (local["GLOO_SOCKET_IFNAME"], local["OMP_NUM_THREADS"]) == ("lo", "2")
    assert not {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"} & spread.keys()
    assert not [name for name in local if "CUDA" in name or "NCCL" in name]


@pytest.mark.parametrize(("asked", "overrides"), [(None, ()), (4, ()), (6, ("parallel.edp=3",))])
def test_a_number_of_ranks_stretches_edp(tmp_path: Path, asked: int | None, overrides: tuple[str, ...]) -> None:
    config = tiny_config(tmp_path, tmp_path, {"parallel.ep": 2, "parallel.edp": 2})
    assert fit_world_size(config, asked) == overrides


@pytest.mark.parametrize("asked", [0, 3])
def test_ranks_that_make_no_whole_groups_are_refused(tmp_path: Path, asked: int) -> None:
    with pytest.raises(ConfigError, match=rf"{asked} ranks: must be a positive multiple of parallel\.ep=2"):
        fit_world_size(tiny_config(tmp_path, tmp_path), asked)


# --- the node of each rank


def job(data: Path, cluster: dict[str, object], changes: dict[str, object]) -> JobPlan:
    return plan_job(check(tiny_config(data, Path("/runs"), changes)), Cluster.model_validate(cluster))


def ranks(plan: JobPlan) -> list[tuple[str | None, tuple[int, ...]]]:
    return [(node.feature, node.ranks) for node in plan.nodes]


def pinned(text_ranks: list[int], image_ranks: list[int], **nodes: object) -> dict[str, object]:
    groups: dict[str, dict[str, object]] = {"text": {"ranks": text_ranks}, "image": {"ranks": image_ranks}}
    for name, node in nodes.items():
        groups[name]["node"] = node
    return {"parallel.ep": len(text_ranks) + len(image_ranks), "placement.groups": groups}


def test_groups_are_placed_on_matching_nodes_for_any_order_of_ranks(tiny_data: Path) -> None:
    changes = pinned([0, 2], [1, 3], text={"feature": "text"}, image={"feature": "vision", "labels": {"modality": "image"}})
    plan = job(tiny_data, {"ranks_per_node": 2}, changes)
    assert ranks(plan) == [("text", (0, 2)), ("vision", (1, 3))]
    assert plan.place_of(3, ("a", "b")) == RunPlace(
        3, 1, 1, groups=("image",), host="b", feature="vision", labels={"modality": "image"}
    )
    assert plan.place_of(0).labels == {"feature": "text"}, "without labels Ray goes by the feature"
    assert plan.table().splitlines()[2] == "1     1, 3   vision, modality=image  image"


def test_ranks_without_requirements_share_a_node_with_their_ep_group_unless_it_is_exclusive(tiny_data: Path) -> None:
    shared = pinned([0, 2], [1], image={"feature": "vision"}) | {"parallel.edp": 2, "train.global_batch": 12}
    assert ranks(job(tiny_data, {"ranks_per_node": 3, "domain_nodes": 1}, shared)) == [
        ("vision", (0, 1, 2)),
        ("vision", (3, 4, 5)),
    ]
    own = pinned([0, 2], [1], image={"feature": "vision", "own": True}) | {"parallel.edp": 2, "train.global_batch": 12}
    assert ranks(job(tiny_data, {"ranks_per_node": 4}, own)) == [(None, (0, 2, 3, 5)), ("vision", (1, 4))]


def test_ep_groups_stay_inside_the_domain(tiny_data: Path) -> None:
    changes: dict[str, object] = {"parallel.ep": 2, "parallel.edp": 4, "train.global_batch": 16}
    assert ranks(job(tiny_data, {"ranks_per_node": 3}, changes)) == [(None, (0, 1, 2)), (None, (3, 4, 5)), (None, (6, 7))]
    inside = job(tiny_data, {"ranks_per_node": 3, "domain_nodes": 1}, changes)
    assert ranks(inside) == [(None, (0, 1)), (None, (2, 3)), (None, (4, 5)), (None, (6, 7))]
    wider = job(tiny_data, {"ranks_per_node": 3, "domain_nodes": 2}, changes)
    assert ranks(wider) == [(None, (0, 1, 2)), (None, (3, 4, 5)), (None, (6, 7))], "three EP groups fill two nodes"


def test_a_pipeline_stage_that_fits_stays_inside_the_domain(tiny_data: Path) -> None:
    changes: dict[str, object] = {"parallel.ep": 2, "parallel.edp": 4, "train.global_batch": 16, "model.num_layers": 4}
    changes |= {**megatron(pp=2), "evaluation.balance_efficiency": False, "evaluation.ablate_experts": False}
    plan = job(tiny_data, {"ranks_per_node": 3, "domain_nodes": 2}, changes)
    assert ranks(plan) == [(None, (0, 1, 2)), (None, (3,)), (None, (4, 5, 6)), (None, (7,))], (
        "3 EP groups fit, a stage has 2"
    )
    assert nodes_sharing_ep_groups(plan, 2) == [(0, 1), (2, 3)], "Ray keeps each stage in a domain"
    small = job(tiny_data, {"ranks_per_node": 2, "domain_nodes": 1}, changes)
    assert ranks(small) == [(None, (0, 1)), (None, (2, 3)), (None, (4, 5)), (None, (6, 7))], "a stage has two domains"
    with refused(ConfigError, "parallel.ep=2: an EP group needs 2 nodes"):
        job(tiny_data, {"ranks_per_node": 1, "domain_nodes": 1}, changes)


def test_gpus_come_from_the_device_and_the_cluster(tiny_data: Path) -> None:
    cluster: dict[str, object] = {"gpus": {"per_node": 2}, "ranks_per_node": 1}
    assert job(tiny_data, cluster, {"parallel.device": "auto"}).gpus_per_node == 2
    assert job(tiny_data, cluster, {"parallel.device": "auto"}).place_of(1).gpu == 1
    assert len(job(tiny_data, cluster, {}).nodes) == 2, "on the CPU, ranks_per_node counts"
    with refused(ResourceError, "parallel.device=cuda"):
        job(tiny_data, {"gpus": {"syntax": "none"}}, {"parallel.device": "cuda"})


def test_the_dispatchers_nodes_are_the_plans(tiny_data: Path) -> None:
    changes: dict[str, object] = {"parallel.dispatch": {"kind": "hierarchical", "ranks_per_node": 2}}
    assert len(job(tiny_data, {"ranks_per_node": 2}, changes).nodes) == 1
    with refused(ConfigError, "ranks_per_node=2"):
        job(tiny_data, {"ranks_per_node": 1}, changes)


def test_a_rank_is_told_its_place() -> None:
    job_plan = JobPlan((NodePlan(0, (0, 2), feature="text"), NodePlan(1, (1,))), 8, (("text",), (), ("text",)))
    commands = rank_commands(plan(job=job_plan, hosts=("node5", "node9")))
    assert [RunPlace.from_environment(command.env) for command in commands] == [
        RunPlace(0, 0, 0, ("text",), "node5", "text", {"feature": "text"}, 0),
        RunPlace(1, 1, 0, (), "node9", None, {}, 0),
        RunPlace(2, 0, 1, ("text",), "node5", "text", {"feature": "text"}, 1),
    ]
    assert [(c.node, c.env["LOCAL_RANK"], c.env["LOCAL_WORLD_SIZE"]) for c in commands] == [
        (0, "0", "2"),
        (1, "0", "1"),
        (0, "1", "2"),
    ]


def test_paths_become_absolute() -> None:
    config = tiny_config(Path("data/x"), Path("/runs"), {"run.init_from": "old/../older"})
    assert absolute_paths(config, Path("/home/me")) == (
        "run.root=/runs",
        "data.path=/home/me/data/x",
        "run.init_from=/home/me/older",
    )


@pytest.mark.parametrize("module", ["launchers.local", "launchers.ray.__main__", "launchers.slurm.__main__"])
def test_a_dry_run_shows_the_ranks_and_the_sites_variables_without_data(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tiny_config(tmp_path / "no_data", tmp_path / "runs"), tmp_path / "x.yaml")
    site = tmp_path / "site.yaml"
    site.write_text(
        "gpus: {syntax: none}\nranks_per_node: 1\ninterface: ib0\n"
        "nccl: {NCCL_IB_HCA: {value: mlx5_0, reason: the other is for storage}}\n"
    )
    monkeypatch.setenv("MOE_DIST_CLUSTER", str(site))
    result = invoke(importlib.import_module(module).main, config, "--dry-run", code=0)
    shown = ["RANK=1", "WORLD_SIZE=2", "-m moe_dist.train"]
    shown += [] if module == "launchers.local" else ["NCCL_IB_HCA=mlx5_0", "GLOO_SOCKET_IFNAME=ib0"]
    assert not [each for each in shown if each not in result.output]
    assert not (tmp_path / "runs").exists()
