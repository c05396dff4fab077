"""Mixture of depths agrees with the slow reference in the choice of tokens, the block's output, and causal evaluation
with and without a cache."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.model.attention import dense_mask
from moe_dist.model.layers import rotary_table
from moe_dist.model.mixture_of_depths import DepthRouter
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers import selection
from moe_dist.moe.routers.selection import Causal, tokens_of_share
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.placement.parameter_names import named_parameters
from moe_dist.train.objective.loss import depth_auxiliary
from tests.reference.mixture_of_depths import choose, depth_forward
from tests.support.counts import depth_counts_with
from tests.support.transformers import DIM, make_transformer

VOCAB = 64
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1], [0] * 8], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5], list(range(8))])


def make_model(capacity: float, causal: Causal = "auxiliary", **args: Any) -> Transformer:
    def make_depths(layer: int) -> DepthRouter:
        return DepthRouter(DIM, capacity=capacity, causal=causal, threshold_decay=0.5, name=f"layers.{layer}")

    model = make_transformer(
        moe_layers=(0, 1, 2), dtype=torch.float64, depth_layers=(0, 2), make_depths=make_depths, **args
    )
    if causal == "threshold":
        for router in model.depth_routers():
            router.threshold.fill_(0.5)
    return model


def draw_tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns tokens and their groups. The first two sequences end with padding."""
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(seed))
    group = (tokens >= 48).to(torch.int64)
    group[0, 7], group[1, 6:] = -1, -1
    return tokens, group


def take_best(score_U: Tensor, capacity: float) -> tuple[Tensor, float]:
    """Returns which tokens one selection scope takes, bool [U], and the lowest score of a taken token."""
    score_U1, share_1 = score_U[:, None], torch.tensor([capacity], dtype=torch.float64)
    choice = selection.choose(score_U1, score_U1, share_1, slice(None))
    return choice.taken_TE[:, 0], choice.kth_score_E.item()


@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    real=st.lists(st.booleans(), min_size=12, max_size=12),
    capacity=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
)
def test_the_best_are_those_of_the_loop(scores: list[int], real: list[bool], capacity: float) -> None:
    real = real[: len(scores)]
    score_U = torch.tensor(scores, dtype=torch.float64).masked_fill(~torch.tensor(real), float("-inf"))
    taken, kth_score = take_best(score_U, capacity)
    expected = choose(scores, real, capacity, [range(len(scores))])
    assert set(taken.nonzero().flatten().tolist()) == expected
    last = torch.tensor([scores[token] for token in expected], dtype=torch.float64).sigmoid()
    assert kth_score == (min(last.tolist()) if expected else 0.0)
    assert len(expected) <= tokens_of_share(capacity, len(scores))


def by_reference(model: Transformer, tokens: Tensor, group: Tensor) -> Tensor:
    """Runs the whole model. The reference computes layers with mixture of depths, and the model's code computes all
    other layers."""
    masks = {layer.window: dense_mask(DOCUMENTS, POSITIONS, layer.window) for layer in model.layers}
    rotary = rotary_table(POSITIONS, model.args.head_dim, model.args.rope_base)
    x = model.embedding.weight[tokens]
    for number, layer in enumerate(model.layers):
        attention, moe = layer.attention, layer.moe
        if number not in model.args.depth_layers:
            x = x + attention(x, rotary, masks[layer.window])
            x = x + moe(x.flatten(0, 1), group.flatten())[0].view_as(x)
            continue

        def block(x_1nD: Tensor, positions: Tensor, members: Sequence[int], layer=layer) -> Tensor:
            attention, moe = layer.attention, layer.moe
            mask = dense_mask(torch.zeros_like(positions), positions, layer.window)
            a = attention(x_1nD, rotary_table(positions, model.args.head_dim, model.args.rope_base), mask)
            y, _ = moe((x_1nD + a)[0], group.flatten()[list(members)])
            return a + y

        mixture_of_depths = layer.depths
        x_TD, documents = x.flatten(0, 1), [(b, d) for b, row in enumerate(DOCUMENTS.tolist()) for d in row]
        router = mixture_of_depths.router[0]
        normed = x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        scores = (normed @ router).tolist()
        if model.training:
            taken = choose(scores, (group.flatten() >= 0).tolist(), mixture_of_depths.token_share, [range(24)])
        else:
            takes = mixture_of_depths.takes(x_TD)[0]
            taken = {token for token in range(24) if takes[token] and group.flatten()[token] >= 0}
        x = depth_forward(x_TD, router, taken, documents, POSITIONS.flatten().tolist(), block).view_as(x)
    return torch.nn.functional.linear(model.norm(x), model.output.weight)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("capacity", "windows"), [(0.05, ()), (0.3, ()), (0.7, ()), (1.0, ()), (0.3, (2, 3, 2)), (0.7, (None, 3, 2))]
)
@pytest.mark.slow
def test_values_and_gradients_are_those_of_the_slow_form(
    capacity: float, windows: tuple[int | None, ...], training: bool
) -> None:
    """With capacity 0.05 two tokens are taken, and some documents have no taken token. With capacity 1.0 all tokens
    except padding are taken."""
    model = make_model(capacity, windows=windows).train(training)
    tokens, group = draw_tokens()
    real = (group >= 0)[..., None]
    weight = torch.randn(3, 8, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * real
    results = []
    for form in (lambda: model(tokens, POSITIONS, DOCUMENTS, group)[0], lambda: by_reference(model, tokens, group)):
        model.zero_grad()
        logits = form()
        (logits * weight).sum().backward()
        results.append((logits * real, {n: p.grad for _, n, _, p in named_parameters(model) if "auxiliary" not in n}))
    (got, gradients), (expected, slow) = results
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for name, gradient in slow.items():
        found = gradients[name]
        torch.testing.assert_close(found, torch.zeros_like(found) if gradient is None else gradient, rtol=0, atol=1e-10)
    if training:
        assert slow["layers.0.depths.router"].abs().max() > 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", ["threshold", "auxiliary"])
def test_counts_are_those_of_a_loop(causal: Causal, training: bool) -> None:
    """In the first layer, whose input is the embedding, a loop gives the same counts of tokens by group, the same agreement
    with the causal decision, and the same weights."""
    model = make_model(0.3, causal).train(training)
    tokens, group = draw_tokens()
    depth = model(tokens, POSITIONS, DOCUMENTS, group)[1][0].counts.depth
    mixture_of_depths = model.layers[0].depths
    x_TD, groups = model.embedding.weight[tokens].detach().flatten(0, 1), group.flatten().tolist()
    scores = [torch.dot(mixture_of_depths.router[0], x / (x.square().mean() + 1e-6).sqrt()).item() for x in x_TD]
    causally = {token for token in range(24) if groups[token] >= 0 and bool(mixture_of_depths.takes(x_TD[token][None])[0])}
    taken = choose(scores, [each >= 0 for each in groups], 0.3, [range(24)]) if training else causally
    members, computed, agreed, weight = [0, 0], [0, 0], 0, 0.0
    for token in range(24):
        if groups[token] >= 0:
            members[groups[token]] += 1
            agreed += (token in taken) == (token in causally)
            if token in taken:
                computed[groups[token]] += 1
                weight += 1 / (1 + math.exp(-scores[token]))
    assert sum(computed) > 0
    assert (depth.tokens_PG[0].tolist(), depth.taken_PG[0].tolist()) == (members, computed)
    assert (depth.tokens_P.item(), depth.agreed_P.item()) == (21, agreed)
    assert depth.weight_P.item() == pytest.approx(weight, rel=1e-12)
    assert depth.weight_P.requires_grad is False


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_padding_computes_nothing_and_has_zero_gradients(training: bool) -> None:
    model = make_model(0.3).train(training)
    tokens, group = draw_tokens()
    logits, reports = model(tokens, POSITIONS, DOCUMENTS, torch.full_like(group, -1))
    auxiliary = [report.aux.depth_auxiliary_P.sum() for report in reports if report.aux.depth_auxiliary_P is not None]
    (logits.sum() + sum(auxiliary)).backward()
    assert logits.isfinite().all()
    assert model.layers[0].depths.router.grad.abs().max() == 0
    assert [report.counts.depth.taken_P.item() for report in (reports[0], reports[2])] == [0, 0]


@pytest.mark.parametrize("parts", [[1] * 8, [5, 1, 1, 1], [8]], ids=str)
@pytest.mark.parametrize("causal", ["threshold", "auxiliary"])
@torch.no_grad()
def test_cached_logits_are_the_whole_ones_and_skipped_tokens_leave_no_entry(causal: Causal, parts: list[int]) -> None:
    model = make_model(0.3, causal).eval()
    tokens, _ = draw_tokens(1)
    group = (tokens >= 48).to(torch.int64)
    positions = torch.arange(8).expand(3, 8)
    expected, reports = model(tokens, positions, torch.zeros_like(tokens, dtype=torch.int32), group)
    cache = model.make_cache(3, 8)
    logits, at = [], 0
    for length in parts:
        part = slice(at, at + length)
        logits.append(model.forward_cached(tokens[:, part], positions[:, part], group[:, part], cache))
        at += length
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)
    for layer, report in zip(cache, reports, strict=True):
        depth = report.counts.depth
        taken = 24 if depth is None else depth.taken_P.item()
        assert int(layer.lengths.sum()) == taken
        assert depth is None or 0 < taken < 24


def test_auxiliary_routers_learn_the_choice_and_move_nothing_else() -> None:
    model = make_model(0.3)
    tokens, group = draw_tokens()
    reports = model(tokens, POSITIONS, DOCUMENTS, group)[1]
    shallow = (reports[0], reports[2])
    auxiliary_P = torch.cat([report.aux.depth_auxiliary_P for report in shallow])
    depth_auxiliary(auxiliary_P, torch.cat([report.counts.depth.tokens_P for report in shallow])).backward()
    for _, name, _, parameter in named_parameters(model):
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (".depths.auxiliary." in name), name
    # The first layer's loss by hand: the mean over real tokens of -log of the probability of the router's decision.
    x = model.embedding.weight[tokens].flatten(0, 1)
    mixture_of_depths, real = model.layers[0].depths, group.flatten() >= 0
    h = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    taken = choose((h @ mixture_of_depths.router[0]).tolist(), real.tolist(), 0.3, [range(24)])
    hidden = h @ mixture_of_depths.auxiliary.inner.T
    chance = ((hidden * hidden.sigmoid()) @ mixture_of_depths.auxiliary.outer[0]).sigmoid()
    terms = [-(chance[t] if t in taken else 1 - chance[t]).log() for t in range(24) if real[t]]
    torch.testing.assert_close(auxiliary_P[0], torch.stack(terms).sum())
    assert reports[0].counts.depth.agreed_P.item() == sum((chance[t] > 0.5) == (t in taken) for t in range(24) if real[t])


def test_thresholds_follow_the_last_score_taken() -> None:
    router = DepthRouter(DIM, capacity=0.5, causal="threshold", threshold_decay=0.75)
    updater, expected = ThresholdUpdater([[router]], 0.75, mixture_of_depths=True), 0.0
    for step, (score, tokens) in enumerate([(0.4, 10.0), (0.8, 20.0), (0.0, 0.0), (0.2, 4.0), (0.6, 8.0), (0.9, 1.0)]):
        seen_P = torch.tensor([tokens], dtype=torch.float64)
        updater.after_step(depth_counts_with(kth_score_P=score * seen_P, tokens_P=seen_P))
        if tokens:
            seen = step + 1 - (step > 2)
            expected += max(1 / seen, 0.25) * (score - expected)
        correction = 0.0 if step < 3 else -0.15
        np.testing.assert_allclose(router.threshold.item(), expected + correction, rtol=1e-6)
        if step == 2:  # a calibration's correction must stay
            router.threshold.sub_(0.15)
    assert router.steps.item() == 5
    x = torch.randn(40, DIM)
    torch.nn.init.normal_(router.router)
    takes, weight = router.eval().takes(x)
    assert torch.equal(takes, weight > router.threshold)
    assert torch.equal(router(x, torch.ones(40, dtype=torch.bool)).full_C.sum(), takes.sum())
