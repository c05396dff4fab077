"""A rank takes the GPU of its local rank, or the only visible GPU, and never another rank's."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moe_dist.config.schema import Config
from moe_dist.errors import ResourceError
from moe_dist.parallel import mesh
from moe_dist.runtime import rendezvous
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.environment import PUBLISHED, RankEnv
from moe_dist.runtime.rendezvous import StartError, StartWait
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop import session
from moe_dist.train.loop.session import choose_device, claim_gpu
from tests.support.tiny import tiny_config


def env_of(local_rank: int) -> RankEnv:
    return RankEnv(local_rank, 8, local_rank, 8, PUBLISHED, 0, "a1")


def config_of() -> Config:
    return SimpleNamespace(parallel=SimpleNamespace(device="auto"))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("seen", "local_rank", "index"), [(8, 5, 5), (1, 0, 0), (1, 5, 0)])
def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch, seen: int, local_rank: int, index: int) -> None:
    chosen: list[torch.device] = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: seen, "set_device": chosen.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert choose_device(config_of(), env_of(local_rank)) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize(("changes", "seconds"), [({}, 1800.0), ({"parallel.start_seconds": 77.0}, 77.0)])
def test_ranks_wait_for_each_other_as_long_as_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float], seconds: float
) -> None:
    waits: list[StartWait] = []

    def meeting(env: RankEnv, folder: Path, wait: StartWait) -> None:
        waits.append(wait)
        raise StartError("none came")

    now = [0.0]
    monkeypatch.setattr(session, "meeting", meeting)
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))
    config, env = tiny_config(tmp_path, tmp_path, changes), RankEnv(1, 2, 0, 1, PUBLISHED, 0, "a1")
    with pytest.raises(StartError, match="none came"):
        session.join_world(config, env, RunFolder.of(config), Attempt(env), stopped=lambda: False)
    (wait,) = waits
    now[0] = seconds - 1.0
    wait.pause("rank 0")
    now[0] = seconds
    with pytest.raises(StartError, match=f"rank 1 waited {seconds:g} s for rank 0"):
        wait.pause("rank 0")


def test_commands_take_the_gpu_that_a_run_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"device_count": lambda: 1, "set_device": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("init_world", "make_mesh", "destroy_world"):
        monkeypatch.setattr(mesh, name, lambda *_, **__: None)
    env = RankEnv(5, 8, 5, 8, "env://", 0, "a1")
    with mesh.one_group(env, torch.device("cuda")) as (_, device):
        assert device == torch.device("cuda", 0)


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": lambda: True, "device_count": lambda: 4}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(ResourceError, match="number 5 on its node, which shows 4 GPUs"):
        choose_device(config_of(), env_of(5))


def test_two_ranks_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = iter(["a", "b", "a"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=next(uuids)))
    store, device = HashStore(), torch.device("cuda", 0)
    claim_gpu(store, env_of(0), device)
    claim_gpu(store, env_of(1), device)
    with pytest.raises(ResourceError, match=r"rank 2, .* another rank uses the same GPU a"):
        claim_gpu(store, env_of(2), device)
    claim_gpu(store, env_of(3), torch.device("cpu"))
