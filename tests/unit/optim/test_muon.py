"""Muon takes the same steps as its slow reference and as torch's Muon."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moe_dist.checkpoint.verify import verify
from moe_dist.optim.muon import Muon, orthogonalise
from moe_dist.optim.optimizer import materialise_moments, set_step_count, split_parameters, step_count
from moe_dist.placement.parameter_names import Role
from moe_dist.plan.memory import checkpoint_bytes, rank_memory
from moe_dist.train.build.training import state_specs
from tests.reference import muon as reference
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config, tiny_dataset
from tests.unit.optim.test_param_groups import model_of

SHAPES = [(5, 8), (8, 5), (6, 6), (1, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stack_is_orthogonalised_matrix_by_matrix(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1e-4  # like the gradient of an expert with few tokens
    stack[2] = 0.0  # like the gradient of an expert without tokens
    got = orthogonalise(stack, torch.float64)
    for matrix, expected in zip(got, stack, strict=True):
        np.testing.assert_allclose(matrix, reference.orthogonalised(expected.numpy()), rtol=0, atol=1e-12)
    empty = torch.empty(0, *shape)
    assert orthogonalise(empty, torch.bfloat16).shape == empty.shape


def test_steps_follow_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    model = model_of(q=(Role.DENSE, (4, 6)), experts=(Role.EXPERT, (2, 6, 4)), norm=(Role.NORM, (4,))).double()
    groups = split_parameters(model, weight_decay=0.1, orthogonal=True)
    optimizer = Muon(groups, momentum=0.9, dtype=torch.bfloat16, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    q, experts, norm = (model.get_parameter(f"{name}.weight") for name in ("q", "experts", "norm"))
    alone = nn.Parameter(norm.detach().clone())
    adamw = torch.optim.AdamW([alone], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    expected = [each.detach().numpy().copy() for each in (q, *experts)]
    means = [np.zeros_like(each) for each in expected]
    for _ in range(3):
        for parameter in (q, experts, norm):
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        alone.grad = norm.grad
        gradients = [each.numpy() for each in (q.grad, *experts.grad)]  # pyright: ignore
        steps = [
            reference.step(*each, lr=0.1, weight_decay=0.1, momentum=0.9)
            for each in zip(expected, means, gradients, strict=True)
        ]
        expected, means = map(list, zip(*steps, strict=True))
        optimizer.step()
        adamw.step()
    for got, value in zip((q, *experts), expected, strict=True):
        np.testing.assert_allclose(got.detach(), value, rtol=0, atol=1e-12)
    assert torch.equal(norm, alone)
    assert step_count(optimizer) == 3
    set_step_count(optimizer, 7)
    assert step_count(optimizer) == 7
    assert set(optimizer.state[q]) == {"exp_avg"}


def test_it_is_torchs_muon_in_bf16() -> None:
    """torch's Muon also iterates in bf16, but its operations have a different order."""
    values = torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    group = {"params": [ours], "weight_decay": 0.1, "moments": ("exp_avg",)}
    optimizer = Muon([group], momentum=0.95, dtype=torch.bfloat16, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        ours.grad = theirs.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        other.step()
    moved = (theirs - values).abs().max()
    assert (ours - theirs).abs().max() < 0.05 * moved


def test_only_matrices_of_layers_are_orthogonalised() -> None:
    model = model_of(
        q=(Role.DENSE, (4, 4)),
        experts=(Role.EXPERT, (2, 6, 4)),
        q_bias=(Role.DENSE, (4,)),
        shared_scale=(Role.DENSE, (1, 4)),
        output=(Role.DENSE, (8, 4)),
        embedding=(Role.EMBEDDING, (8, 4)),
        router=(Role.ROUTER, (2, 4)),
        adapter=(Role.ADAPTER, (2, 4, 4)),
        constant=(Role.ZERO_COMPUTATION, (2, 4)),
    )
    groups = split_parameters(model, weight_decay=0.1, orthogonal=True)
    name_of = {parameter: name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    assert {name_of[p] for group in groups if "moments" in group for p in group["params"]} == {"q", "experts"}
    assert {name_of[p] for group in groups for p in group["params"]} == set(name_of.values())


def test_a_rank_without_parameters_steps() -> None:
    optimizer = Muon([], momentum=0.9, dtype=torch.float32, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    materialise_moments(optimizer)
    optimizer.step()
    assert step_count(optimizer) == 0


def test_it_is_refused_where_no_matrix_is_trained(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, {"optimizer.kind": "muon", "train.only": "adapters"})
    (violation,) = config.optimizer.violations_in(config)
    assert violation.keys == ("optimizer.kind", "train.only")
    assert "or set optimizer.kind=adamw" in violation.problem
    trained = tiny_config(tmp_path, tmp_path, {"optimizer.kind": "muon"})
    assert not list(trained.optimizer.violations_in(trained))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_has_the_planned_moments(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    tiny_dataset(data)
    with world_of_one():
        saved = OneRank(data, tmp_path, optimizer__kind=kind)
        saved.train_and_save()
    config = tiny_config(data, tmp_path, {"optimizer.kind": kind, "parallel.ep": 1, "placement.policy": "interleaved"})
    specs = state_specs(config)
    assert verify(saved.folder / "step_2", specs)[1] == []
    squares = {name.removeprefix("optimizer.exp_avg_sq.") for name in specs if name.startswith("optimizer.exp_avg_sq.")}
    matrices = {"layers.0.attention.q.weight", "layers.0.moe.experts.text.0.gate"}
    assert "output.weight" in squares
    assert matrices & squares == (set() if kind == "muon" else matrices)
    sizes = {name: spec.dtype.itemsize * np.prod(spec.shape) for name, spec in specs.items()}
    assert checkpoint_bytes(config) == sum(sizes.values())
    memory = rank_memory(config, saved.plan.placement, rank=0, rows=1.0, pairs=1.0)
    assert memory.optimizer == sum(size for name, size in sizes.items() if name.startswith("optimizer."))
