"""Tests where the cluster file is found, what it may contain, and its errors."""

import re
from pathlib import Path

import pytest

from moe_dist.config.cluster import FOLDER, Cluster, PyxisContainer, load_cluster, seconds_of
from moe_dist.errors import ConfigError
from tests.support.messages import refused


def test_without_a_file_the_defaults_hold() -> None:
    assert load_cluster(None, {}) == Cluster()


def test_the_argument_goes_before_the_environment(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"account: {name}\n")
    env = {"MOE_DIST_CLUSTER": str(tmp_path / "b.yaml")}
    assert load_cluster(str(tmp_path / "a.yaml"), env).account == "a"
    assert load_cluster(None, env).account == "b"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_those_of_the_project_load_by_name(path: Path) -> None:
    assert load_cluster(path.stem, {}) == load_cluster(str(path), {})


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "account: proj-7\n"
        "gpus: {syntax: gpus-per-node, type: h100, per_node: 4}\n"
        "interface: ib0\n"
        "nccl:\n  NCCL_IB_HCA: {value: 'mlx5_0,mlx5_1', reason: the others are for storage}\n"
        "prelude: [module load cuda/12.4, 'eval \"$(conda shell.bash hook)\"']\n"
        "container: {kind: pyxis, image: /images/torch.sqsh, mounts: ['/data:/data:ro']}\n"
        "domain_nodes: 1\n"
    )
    cluster = load_cluster(str(path), {})
    assert cluster.gpus.per_node == 4
    assert cluster.nccl["NCCL_IB_HCA"].reason == "the others are for storage"
    assert cluster.container == PyxisContainer(image="/images/torch.sqsh", mounts=("/data:/data:ro",))


def test_all_faults_are_shown_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("acount: x\npartition: 'gpu; rm -rf /'\nnccl: {NCCL_DEBUG: {value: INFO}}\nprelude: [\"a\\nb\"]\n")
    with pytest.raises(ConfigError) as raised:
        load_cluster(str(path), {})
    text = str(raised.value)
    assert all(fault.startswith(f"{path}: ") for fault in raised.value.problems)
    assert "acount: unknown key; did you mean account?" in text
    assert "partition='gpu; rm -rf /': must be" in text
    assert "nccl.NCCL_DEBUG.reason: missing" in text
    assert "prelude.0" in text


def test_a_file_that_is_not_there_names_those_that_are() -> None:
    with refused(ConfigError, "nowhere.yaml"):
        load_cluster("nowhere", {})


@pytest.mark.parametrize(("time", "good"), [("5", False), ("4:59", False), ("5:01", True), ("0", True), ("1-0", True)])
def test_the_signal_comes_before_the_limit_and_not_at_once(tmp_path: Path, time: str, good: bool) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"time: '{time}'\nsignal_seconds: 300\n")
    if good:
        assert load_cluster(str(path), {}).time == time
    else:
        with pytest.raises(ConfigError, match=f"site.yaml: signal_seconds=300: must be shorter than time='{time}'"):
            load_cluster(str(path), {})


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("1:00:00", 3600), ("2-12", 216000), ("1-00:00:01", 86401), ("infinite", float("inf"))],
)
def test_times_as_slurm_writes_them(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--nodes=3", "options: --nodes=3: the launcher sets these options; use the other keys"),
        ("--gres", "options: --gres: the launcher sets these options"),
        ("-N3", "options.0='-N3': must be text that matches"),
        ("--mem = 0", "options.0='--mem = 0': must be"),
    ],
)
def test_options_that_the_plan_decides_are_refused(tmp_path: Path, option: str, words: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("options: [--mem=0, --exclusive]\n")
    assert load_cluster(str(path), {}).options == ("--mem=0", "--exclusive")
    path.write_text(f"options: ['{option}']\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {words}")):
        load_cluster(str(path), {})
