"""Optimizers that keep their moments in bf16 between steps take the same steps as a slow reference, for any division
into slices. `verify` accepts checkpoints with bf16 moments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from moe_dist.checkpoint.verify import verify
from moe_dist.errors import ConfigError
from moe_dist.optim import adamw
from moe_dist.optim.adamw import AdamW
from moe_dist.optim.muon import Muon
from moe_dist.optim.optimizer import make_optimizer, step_count
from moe_dist.plan.memory import checkpoint_bytes, rank_memory
from moe_dist.train.build.training import state_specs
from tests.reference import muon as reference
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config, tiny_dataset

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
STEPS = 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().to(values.dtype)


def test_adamw_rounds_its_moments_after_each_step() -> None:
    parameter = nn.Parameter(drawn(3, 40, seed=0).double())
    untouched = nn.Parameter(torch.ones(2).double())  # gets no gradient
    optimizer = AdamW([{"params": [parameter, untouched], "weight_decay": 0.5}], moments="bf16", **SETTINGS)
    weight, mean, square = parameter.detach().clone(), torch.zeros(3, 40).double(), torch.zeros(3, 40).double()
    for step in range(1, STEPS + 1):
        parameter.grad = drawn(3, 40, seed=step).double()
        mean, square = 0.9 * mean + 0.1 * parameter.grad, 0.95 * square + 0.05 * parameter.grad**2
        unbiased = mean / (1 - 0.9**step), square / (1 - 0.95**step)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        mean, square = rounded(mean), rounded(square)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=0)
    state = optimizer.state[parameter]
    assert torch.equal(state["exp_avg"], mean.bfloat16())
    assert torch.equal(state["exp_avg_sq"], square.bfloat16())
    assert torch.equal(untouched, torch.ones(2))
    assert step_count(optimizer) == STEPS


def test_muon_rounds_its_mean() -> None:
    parameter = nn.Parameter(drawn(4, 6, seed=0).double())
    group = {"params": [parameter], "weight_decay": 0.1, "moments": ("exp_avg",)}
    optimizer = Muon([group], momentum=0.9, dtype=torch.float64, moments="bf16", **SETTINGS)
    weight, mean = parameter.detach().numpy().copy(), np.zeros((4, 6))
    for step in range(1, STEPS + 1):
        parameter.grad = drawn(4, 6, seed=step).double()
        weight, mean = reference.step(weight, mean, parameter.grad.numpy(), lr=0.1, weight_decay=0.1, momentum=0.9)
        mean = rounded(torch.from_numpy(mean)).numpy()
        optimizer.step()
    np.testing.assert_allclose(parameter.detach(), weight, rtol=0, atol=1e-12)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], torch.from_numpy(mean).bfloat16())


def test_any_cut_of_a_parameter_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cuts: list[int], wide_bytes: int) -> list[Tensor]:
        monkeypatch.setattr(adamw, "WIDE_BYTES", wide_bytes)
        parts = [nn.Parameter(each.clone()) for each in drawn(64, 33, seed=0).split(cuts)]
        optimizer = AdamW([{"params": parts}], moments="bf16", **SETTINGS)
        for step in range(1, STEPS + 1):
            for part, gradient in zip(parts, drawn(64, 33, seed=step).split(cuts), strict=True):
                part.grad = gradient.clone()
            optimizer.step()
        moments = [torch.cat([optimizer.state[part][name] for part in parts]) for name in adamw.MOMENTS]
        return [torch.cat([part.detach() for part in parts]), *moments]

    whole = run([64], 1 << 20)
    for cuts, wide_bytes in (([1, 40, 23], 1 << 20), ([1, 40, 23], 1), ([32, 32], 9000)):
        assert all(torch.equal(*pair) for pair in zip(whole, run(cuts, wide_bytes), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_has_moments_of_two_bytes(tmp_path: Path, kind: str) -> None:
    data, section = tmp_path / "data", {"optimizer.kind": kind, "optimizer.moments": "bf16"}
    tiny_dataset(data)
    changes: Any = {key.replace(".", "__"): value for key, value in section.items()}
    with world_of_one():
        saved = OneRank(data, tmp_path, **changes)
        saved.train_and_save()
        for state in saved.training.optimizer.state.values():
            assert {state[key].dtype for key in state if key != "step"} == {torch.bfloat16}
        with pytest.raises(ConfigError, match="exp_avg"):
            OneRank(data, tmp_path, optimizer__kind=kind).resumable.restore()
    config = tiny_config(data, tmp_path, {**section, "parallel.ep": 1, "placement.policy": "interleaved"})
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


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    def config(**changes: Any) -> Any:
        named = {f"optimizer.{key}": value for key, value in changes.items()}
        return tiny_config(tmp_path, tmp_path, {"optimizer.moments": "bf16", **named})

    for changes in ({"betas": [0.9, 0.999]}, {"kind": "muon", "momentum": 0.995}):
        with pytest.raises(
            ValidationError, match=r"rounding to bf16 loses .* above 0\.99; take rates up to 0\.99, or moments="
        ):
            config(**changes)
    with pytest.raises(ValueError, match="backend=apex, moments=bf16: Apex keeps its moments in fp32"):
        config(backend="apex")
    with pytest.raises(ConfigError, match=r"its moments are fp32; set optimizer\.moments=fp32"):
        make_optimizer([], backend="apex", moments="bf16", **SETTINGS)
