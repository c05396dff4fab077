"""Compiled dense parts give the same results as uncompiled ones. They have no graph breaks, and are compiled only once."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from moe_dist.model import compiled
from moe_dist.model.compiled import compile_dense
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.train.build.training import build_model
from tests.support.layouts import Layout, batch_of, config_of, placement_for

STEPS = 200


def model_of(dtype: torch.dtype) -> Transformer:
    layout = Layout()
    model = build_model(config_of(layout), placement_for(layout), ep_rank=0, ep_group=None, compute_dtype=dtype)
    model = model.to(torch.promote_types(dtype, torch.float32))
    initialise(model, placement_for(layout), ep_rank=0, device=torch.device("cpu"), seed=0, std=0.3)
    return model


def passed(model: Transformer, step: int, sequences: int = 2) -> tuple[Tensor, tuple[int, ...]]:
    """Runs forward and backward. Returns the losses, and the number of choices of each expert."""
    batch = batch_of(step, 0, 1, sequences)
    group_BS = torch.where(batch.padding_BS, -1, batch.modality_BS)
    inputs = (batch.tokens_BS, batch.positions_BS, batch.documents_BS, group_BS)
    losses_BS, reports = model(*inputs, labels_BS=batch.labels_BS)
    model.zero_grad()
    losses_BS.sum().backward()
    return losses_BS.detach(), tuple(torch.cat([each.counts.choices_LC[0] for each in reports]).tolist())


@pytest.fixture(autouse=True)
def _no_code_from_before() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.full
def test_no_graph_break_and_no_recompilation_as_the_routing_changes() -> None:
    model, other = model_of(torch.float64), model_of(torch.float64)
    with mock.patch.object(compiled, "BACKEND", "aot_eager"):
        compile_dense(model)
    torch.testing.assert_close(
        (passed(model, 0)[0], *grads(model)), (passed(other, 0)[0], *grads(other)), rtol=0, atol=1e-12
    )
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 4  # all layers share graphs: attention projections, MoE norm, shared expert, loss
    with torch._dynamo.config.patch(error_on_recompile=True):
        choices = {passed(model, step)[1] for step in range(1, STEPS + 1)}
    assert len(choices) > STEPS / 2
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def grads(model: Transformer) -> list[Tensor]:
    return [each.grad for each in model.parameters() if each.grad is not None]


@pytest.mark.full
def test_generated_code_rounds_alike() -> None:
    """fp32 losses and gradients agree to 1e-5 of the largest loss and of each parameter's largest gradient."""
    model, other = model_of(torch.float32), model_of(torch.float32)
    compile_dense(model)
    found, expected = passed(model, 0), passed(other, 0)
    assert found[1] == expected[1]
    tensors = zip((found[0], *grads(model)), (expected[0], *grads(other)), strict=True)
    assert max(relative(each, exact) for each, exact in tensors) <= 1e-5


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def test_without_gradient_nothing_is_compiled() -> None:
    model = model_of(torch.float32)
    with mock.patch.object(compiled, "BACKEND", "eager"):
        compile_dense(model)
    batch = batch_of(0, 0, 1, 2)
    group_BS = torch.where(batch.padding_BS, -1, batch.modality_BS)
    with torch.no_grad():
        model(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group_BS, labels_BS=batch.labels_BS)
    assert "unique_graphs" not in counters["stats"]
