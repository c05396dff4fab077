"""With the public API, used as in docs/examples, N ranks train the same model as one rank, in a plain loop and under
frameworks."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moe_dist
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.objective.loss import forward
from tests.support.cover import exhaustive, full
from tests.support.engine_run import losses as trainer_losses
from tests.support.engine_run import started_run
from tests.support.worlds import RankContext

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "own_model.py"))


def trained(_: RankContext) -> tuple[dict[str, Any], float]:
    """Returns the full weights, and the loss that the example prints."""
    names = example()
    model = names["train"]()
    loss = names["sum_loss"](model, names["TOKENS_BT"])[0] / names["TOKENS_BT"][:, 1:].numel()
    return {name: tensor.numpy() for name, tensor in moe_dist.full_state_dict(model).items()}, loss.item()


def test_two_ranks_train_the_model_of_one(run_in_world: Callable[..., list[Any]]) -> None:
    ((whole, loss),) = run_in_world(1, trained)
    for half, half_loss in run_in_world(2, trained):
        assert half_loss == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(half, whole, rtol=0, atol=1e-9)
    start = moe_dist.build_moe_layer(32, example()["GROUPS"], std=0.2)
    moved = [
        not torch.equal(parameter, torch.from_numpy(whole[f"moe.{name}"])) for name, parameter in start.named_parameters()
    ]
    assert all(moved)


@pytest.mark.parametrize(
    ("x", "group", "text"),
    [
        ((2, 3, 8), (6,), r"moe: x is \[2, 3, 8\] and group \[6\], but the layer takes x \[tokens, 8\]"),
        ((6, 4), (6,), r"x is \[6, 4\]"),
        ((6, 8), (5,), r"group \[5\]"),
        ((6, 8), 1, "group has indices from 1 to 1, but the layer has 1 groups; give 0 to 0, or -1 for padding"),
        ((6, 8), -2, "group has indices from -2 to -2"),
    ],
    ids=str,
)
def test_inputs_of_a_wrong_shape_or_group_are_refused(x: tuple[int, ...], group: Any, text: str) -> None:
    layer = moe_dist.build_moe_layer(8, [ExpertGroup("all", 2, 0, 1, 8, 0, ("all",))])
    group_T = torch.zeros(group, dtype=torch.int64) if isinstance(group, tuple) else torch.full((6,), group)
    with pytest.raises(ValueError, match=text):
        layer(torch.zeros(x), group_T)
    layer(torch.zeros(6, 8), torch.tensor([0, -1, 0, 0, -1, 0]))


def own_loss() -> float:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return trained(None)[1]  # pyright: ignore[reportArgumentType]  # not read
    finally:
        dist.destroy_process_group()


def own_loop(rank: RankContext, data: str, changes: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Returns losses and gradient norms of a loop that uses the public API, with the model and batches of moe_dist's
    trainer."""
    with started_run(rank, data, changes) as run:
        model, group, groups = run.training.parallel.model, run.mesh.world, run.placement.groups
        section = run.config.optimizer
        optimizer = torch.optim.AdamW(model.parameters(), betas=section.betas, eps=section.eps, weight_decay=0.0)
        group_of_modality, losses, norms = torch.tensor([0, 1]), [], []
        for step in range(run.config.train.steps):
            (batch,) = run.loader.batches(step * run.config.train.global_batch)
            found, reports = forward(model, batch, group_of_modality, losses=True)
            counted = found[batch.labels_BS >= 0]
            sums = torch.tensor([float(counted.numel()), counted.sum().item()], dtype=torch.float64)
            dist.all_reduce(sums, group=group)
            loss = counted.sum() / sums[0] + run.plan.aux(step).balance * moe_dist.balance_loss(reports, groups, group)
            loss.backward()
            moe_dist.finish_gradients(model, group)
            norms.append(moe_dist.clip_gradients(model, section.clip_norm, group).item())
            for each in optimizer.param_groups:
                each["lr"] = run.plan.lr(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((sums[1] / sums[0]).item())
        return losses, norms


@pytest.mark.parametrize("ranks", [full(1), 2])
def test_a_loop_by_the_api_has_the_losses_of_the_own_trainer(
    ranks: int, tiny_data: Path, run_in_world: Callable[..., list[Any]]
) -> None:
    changes = {
        **{"train.steps": 6, "train.micro_batch": 8 // ranks, "loss.z": 0.0, "optimizer.weight_decay": 0.0},
        **{"optimizer.clip_norm": 0.5, "parallel.ep": ranks, "parallel.edp": 1, "model.moe.shared_gate": False},
    }
    for losses, norms in run_in_world(ranks, own_loop, str(tiny_data), changes):
        steps = run_in_world(ranks, trainer_losses, str(tiny_data), changes)[0]
        assert losses == pytest.approx([each["loss"] for each in steps], rel=1e-6)
        assert norms == pytest.approx([each["norm"] for each in steps], rel=1e-5)
        assert max(norms) > 0.5, "clipped"


@pytest.mark.parametrize("ranks", [exhaustive(1), 2])
@pytest.mark.parametrize(
    "name",
    [
        exhaustive("own_ddp"),
        full("own_fsdp2"),
        exhaustive("own_trainer"),
        exhaustive("own_accelerate"),
        exhaustive("own_lightning"),
    ],
)
def test_frameworks_train_the_model_of_the_plain_loop(name: str, ranks: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*command, str(EXAMPLES / f"{name}.py")], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"^loss ([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(found) == pytest.approx(own_loss(), abs=2e-9)  # the example prints 9 digits


def clipped(_: RankContext, placement: ExpertPlacement | None) -> tuple[float, dict[str, Any], list[int]]:
    """Returns the gradient norm before clipping, the weights after an SGD step, and the lengths of the expert stacks."""
    names, group = example(), dist.group.WORLD
    size = dist.get_world_size()
    model = names["Model"](group if size > 1 else None).to(torch.float64)
    if placement is not None and size > 1:
        model.moe = moe_dist.build_moe_layer(32, names["GROUPS"], ep_group=group, placement=placement, std=0.2).double()
    tokens_BT = names["TOKENS_BT"]
    loss, _ = names["sum_loss"](model, tokens_BT.chunk(size)[dist.get_rank()])
    (loss / tokens_BT.numel()).backward()
    moe_dist.finish_gradients(model, group)
    norm = moe_dist.clip_gradients(model, 0.1, group)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    state = moe_dist.full_state_dict(model)
    fresh = names["Model"](group if size > 1 else None).to(torch.float64)
    moe_dist.load_full_state_dict(fresh, state)  # the fresh model may have another placement
    again = moe_dist.full_state_dict(fresh)
    assert all(torch.equal(state[name], again[name]) for name in state)
    lengths = [len(parameter) for parameter in moe_dist.expert_parameters(model)]
    return norm.item(), {name: tensor.numpy() for name, tensor in state.items()}, lengths


@pytest.mark.parametrize("slots", [None, ((3,), (0, 1, 2)), ((), (0, 1, 2, 3))])
def test_clipping_and_full_weights_do_not_depend_on_ranks_or_placement(
    run_in_world: Callable[..., list[Any]], slots: tuple[tuple[int, ...], ...] | None
) -> None:
    groups = tuple(example()["GROUPS"])
    placement = None if slots is None else ExpertPlacement(groups, slots)
    ((norm, whole, _),) = run_in_world(1, clipped, None)
    assert norm > 0.1
    for half_norm, half, lengths in run_in_world(2, clipped, placement):
        assert half_norm == pytest.approx(norm, abs=1e-12)
        assert slots is None or set(lengths) <= {len(each) for each in slots}
        torch.testing.assert_close(half, whole, rtol=0, atol=1e-12)


def sharded_by_fsdp2(_: RankContext) -> list[str]:
    """Returns the names of full weights that FSDP2 changes when it shards the model, or when it saves and loads it."""
    names, size = example(), dist.get_world_size()
    plain = names["Model"](dist.group.WORLD)
    whole = moe_dist.full_state_dict(plain)
    moe_dist.average_over_ranks(plain, dist.group.WORLD)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(plain, mesh=mesh, ignored_params=set(moe_dist.expert_parameters(plain)))
    found = moe_dist.full_state_dict(plain)
    changed = [name for name in whole if not torch.equal(whole[name], found[name])]
    doubled = {name: 2 * tensor for name, tensor in whole.items()}
    moe_dist.load_full_state_dict(plain, doubled)
    found = moe_dist.full_state_dict(plain)
    return [*changed, *(name for name in doubled if not torch.equal(doubled[name], found[name]))]


def test_full_weights_are_those_of_the_plain_model_under_fsdp2(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, sharded_by_fsdp2) == [[], []]


def with_unused_and_frozen(_: RankContext) -> tuple[float, bool]:
    """Returns an unused parameter after an AdamW step, and whether the frozen experts stayed bit-equal."""
    names, group = example(), dist.group.WORLD
    model = names["Model"](group if dist.get_world_size() > 1 else None)
    model.unused = nn.Parameter(torch.ones(()))
    experts = moe_dist.expert_parameters(model)
    for expert in experts:
        expert.requires_grad_(False)
    before = [expert.detach().clone() for expert in experts]
    moe_dist.average_over_ranks(model, group)  # must not add a hook for a frozen parameter
    names["sum_loss"](model, names["TOKENS_BT"])[0].backward()
    moe_dist.finish_gradients(model, group)
    torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1, weight_decay=0.5).step()
    kept = all(torch.equal(expert, old) for expert, old in zip(experts, before, strict=True))
    return model.unused.item(), kept


def test_parameters_that_nobody_used_keep_their_value(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(1, with_unused_and_frozen) == [(1.0, True)]
    assert run_in_world(2, with_unused_and_frozen) == [(1.0, True)] * 2


def test_a_placement_of_other_groups_is_refused() -> None:
    groups = example()["GROUPS"]
    other = [moe_dist.ExpertGroup("other", num_experts=9, num_null=0, top_k=2, ffn_dim=4)]
    with pytest.raises(ConfigError, match=r"groups differ from placement\.groups"):
        moe_dist.build_moe_layer(8, other, placement=moe_dist.ExpertPlacement.interleaved(groups, 1))


def test_weights_of_another_model_are_refused() -> None:
    layer = moe_dist.build_moe_layer(8, example()["GROUPS"])
    state = moe_dist.full_state_dict(layer)
    short = {name: tensor[:3] if "experts" in name else tensor for name, tensor in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        moe_dist.load_full_state_dict(layer, short)


def test_every_public_name_is_there_and_in_its_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(moe_dist.__all__)
    assert all(callable(getattr(moe_dist, name)) for name in moe_dist.__all__)


def test_importing_the_package_loads_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import moe_dist, sys; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
