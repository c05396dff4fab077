"""Tests which parameters get a gradient from the cross entropy and from the manifold term, and the targets after a
refresh."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.parameter_names import named_parameters
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from moe_dist.train.objective.loss import MicroLoss, forward
from moe_dist.train.router_tuning.loader import SampleBatch, SampleLoader, SampleMaker
from moe_dist.train.router_tuning.neighbours import NeighbourIndex
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.tuning import Chosen, RouterTuning, RoutingReader, freeze_all_but_routers
from tests.support.layouts import Layout, config_of
from tests.support.manifold import manifold_term_reference
from tests.support.messages import refused
from tests.support.tuned import MANIFEST
from tests.support.tuning_samples import made_samples

GROUPS, CPU = torch.tensor([0, 1]), torch.device("cpu")


def make_model(*tuned: int, top_k: int | None = None) -> Transformer:
    config = config_of(Layout())
    if top_k is not None:
        groups = {
            name: group.model_copy(update={"top_k": top_k, "num_null": 0})
            for name, group in config.model.moe.groups.items()
        }
        moe = config.model.moe.model_copy(update={"groups": groups})
        config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=1, token_mix={})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            model = build_model(config, placement, ep_rank=0, ep_group=None, compute_dtype=torch.float64)
        initialise(model, placement, ep_rank=0, device=CPU, seed=0, std=0.3)
    finally:
        torch.set_default_dtype(before)
    freeze_all_but_routers(model, tuned)
    return model


def make_tuning(folder: Path, model: Transformer, *layers: int, **options: Any) -> RouterTuning:
    samples = Samples(folder)
    reader = RoutingReader(model, SampleMaker(MANIFEST), group_of_modality=GROUPS, places=layers, batch_tokens=20)
    index = NeighbourIndex(samples.embeddings_SE, samples.manifest.right, bandwidth=1.0, k=3)
    return RouterTuning(
        samples, model, Chosen(layers, layers, layers), reader, neighbours=index, **{"weight": 0.5, **options}
    )


def batch_of(folder: Path) -> SampleBatch:
    loader = SampleLoader(
        Samples(folder), SampleMaker(MANIFEST), seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1
    )
    (batch,) = loader.batches(0)
    return batch


def nothing(total: Tensor) -> MicroLoss:
    zero = torch.zeros(())
    return MicroLoss(total, zero, zero, zero, zero)


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.grad for _, name, _, parameter in named_parameters(model) if parameter.grad is not None}


def cross_entropy(model: Transformer, batch: SampleBatch) -> Tensor:
    losses_BS, _ = forward(model, batch, GROUPS, losses=True)
    return losses_BS.sum()


def test_cross_entropy_reaches_the_chosen_routers_and_nothing_else(folder: Path) -> None:
    model = make_model(0)
    cross_entropy(model, batch_of(folder)).backward()
    found = gradients(model)
    assert set(found) == {f"layers.0.moe.router.{group}.{rows}" for group in ("text", "image") for rows in ("true", "null")}
    assert found["layers.0.moe.router.text.true"].abs().max() > 1e-6


def test_with_one_normalised_choice_cross_entropy_gives_none(folder: Path) -> None:
    """If a token has one choice and weights are normalised, its weight is 1 for any logit. Preflight therefore refuses
    such a model if the manifold term has weight=0."""
    model = make_model(0, 1, top_k=1)
    cross_entropy(model, batch_of(folder)).backward()
    assert all((gradient == 0.0).all() for gradient in gradients(model).values())
    assert gradients(model)


def test_the_term_is_the_formula_over_what_a_sample_alone_is_routed_by(folder: Path) -> None:
    """Value and gradient of the manifold term equal its formula, in which the routing r comes from a forward pass over each
    sample's prompt alone."""
    samples, batch, layers = Samples(folder), batch_of(folder), (0, 1)
    model = make_model(*layers)
    tuning = make_tuning(folder, model, *layers)
    (targets,) = tuning.begin([batch], 0, CPU)
    _, reports = forward(model, batch, GROUPS, RoutingRequest(probe_tokens_A=targets.probe_tokens_B))
    loss = tuning.add(nothing(torch.zeros((), dtype=torch.float64)), reports, targets)
    loss.total.backward()
    ours = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for number in batch.numbers:
        sample = samples.sample(number)
        alone = SampleMaker(MANIFEST).make([type(sample)(sample.prompt, sample.answer[:1])])
        _, reports = forward(model, alone, GROUPS, RoutingRequest(probe_tokens_A=torch.tensor([len(sample.prompt) - 1])))
        r_R = torch.cat([report.prob_AC[0] for report in reports if report.prob_AC is not None])
        total = total + 0.5 * manifold_term_reference(samples, number, r_R, 1.0, layers)
    total.backward()
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-6)  # embeddings are fp32
    assert loss.auxiliary.item() == loss.total.item()
    torch.testing.assert_close(ours, gradients(model), rtol=1e-6, atol=1e-12)


def test_a_refresh_reads_the_routers_of_now(folder: Path) -> None:
    batch, model = batch_of(folder), make_model(1)
    tuning = make_tuning(folder, model, 1, refresh_every=2)
    kept = [tuning.begin([batch], step, CPU)[0].target_BKR for step in (0, 1)]
    assert torch.equal(*kept)
    router = model.moe_modules()[1].router
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(1.5)
    fresh = tuning.begin([batch], 2, CPU)[0].target_BKR
    assert not torch.equal(fresh, kept[0])
    number = Samples(folder).manifest
    assert fresh.shape == (4, 3, number.columns)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(0.5)
    now = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert torch.equal(tuning.begin([batch], 3, CPU)[0].target_BKR, fresh), "of step 2, not of now"
    state = tuning.state()
    assert {name.split(".")[4] for name in state["routers"]} == {"text", "image"}, "kept under logical names"
    assert all(torch.equal(parameter, now[name]) for name, parameter in model.named_parameters()), "weights are put back"
    assert model.training


def test_a_state_of_other_samples_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    model = make_model(1)
    tuning = make_tuning(folder, model, 1)
    state = tuning.state()
    tuning.restore(state)
    other = made_samples(tmp_path / "other", ids=(0, 192), layers=(0, 1), columns=13, model={}, seed=1)
    with refused(DataError):
        make_tuning(other, model, 1).restore(state)
    for broken in (None, {}, {**state, "refreshed": 2}, {**state, "refreshed": -1.5}, {**state, "routers": {"x": ""}}):
        with refused(DataError):
            tuning.restore(broken)  # pyright: ignore[reportArgumentType]
    for text in ("A", "AAAA", None):
        with pytest.raises(DataError, match=r"state of router tuning is damaged: layers"):
            tuning.restore({**state, "refreshed": 2, "routers": dict.fromkeys(tuning._routers, text)})
