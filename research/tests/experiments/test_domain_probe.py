"""Measures on hand-made cases how much hidden states and the routers' choices reveal of a token's domain."""

import math

import numpy as np
import pytest
import torch

from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.moe.routing.counts import AuxSums, RoutingCounts
from moe_dist.moe.routing.types import ABSENT, Assignments, Routing
from moe_dist.train.objective.loss import forward
from research.experiments.domain_probe import domains, first_choice, mutual_information, probe
from research.experiments.tokens import TokenPairs, accuracy, answers, evaluate
from research.tests.experiments.test_oracle import GROUPS, LAYERS, VOCAB, make_model


def drawn(seed: int, tokens: int, *, apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws tokens of three domains. Each domain's mean is `apart` standard deviations from zero, on an axis of its own."""
    generator = torch.Generator().manual_seed(seed)
    domain_N = torch.arange(tokens) % 3
    x_ND = torch.randn(tokens, 6, generator=generator) * 4.0 + 7.0
    x_ND[torch.arange(tokens), domain_N] += 4.0 * apart
    return x_ND, domain_N


@pytest.mark.parametrize(("apart", "low", "high"), [(8.0, 0.995, 1.0), (0.0, 0.25, 0.42)])
def test_a_probe_tells_what_is_there_and_no_more(apart: float, low: float, high: float) -> None:
    found = probe(*drawn(1, 600, apart=apart), *drawn(2, 600, apart=apart), 3)
    assert low <= found <= high


def test_a_probe_is_judged_on_the_other_tokens() -> None:
    """A plane fitted to 40 tokens in 60 dimensions separates even random labels, so only other tokens may be judged."""
    generator = torch.Generator().manual_seed(0)
    x_ND, domain_N = torch.randn(40, 60, generator=generator), torch.randint(3, (40,), generator=generator)
    other_ND, other_N = torch.randn(300, 60, generator=generator), torch.randint(3, (300,), generator=generator)
    assert probe(x_ND, domain_N, x_ND, domain_N, 3) == 1.0
    assert probe(x_ND, domain_N, other_ND, other_N, 3) < 0.45


@pytest.mark.parametrize(
    ("experts", "bits"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 2.0),
        ([0, 0, 0, 0, 0, 0, 0, 0], 0.0),
        ([0, 1, 0, 1, 0, 1, 0, 1], 0.0),
        ([0, 0, 0, 0, 1, 1, 1, 1], 1.0),
        ([ABSENT, ABSENT, 0, 0, 0, 0, 0, 0], 2 - 0.75 * math.log2(3)),
    ],
)
def test_bits_by_hand(experts: list[int], bits: float) -> None:
    domain_N = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert mutual_information(torch.tensor(experts), domain_N) == pytest.approx(bits)


def test_the_expert_with_the_largest_weight_comes_first() -> None:
    """Token 0 has experts 3 (0.2) and 1 (0.7), token 1 has only a null choice, and token 2 has expert 2."""
    pairs = Assignments(torch.tensor([0, 0, 1, 2]), torch.tensor([3, 1, ABSENT, 2]), torch.tensor([0.2, 0.7, 0.9, 0.1]))
    zeros_LC, zeros_LG = torch.zeros(1, 4), torch.zeros(1, 1)
    counts = RoutingCounts(zeros_LC, torch.tensor([[3]]), zeros_LG, zeros_LC.to(torch.int64))
    seen = TokenPairs(Routing(pairs, counts, AuxSums(zeros_LC, zeros_LG)), torch.arange(3))
    assert first_choice(seen, 3).tolist() == [1, ABSENT, 2]


def batch_of(ids: range, *, seed: int, sequences: int = 100) -> Batch:
    """Draws documents from `ids`, with three prompt tokens and one scored token. Each sequence ends with padding."""
    rng, prompt = np.random.default_rng(seed), np.array([True, True, True, False])
    maker = BatchMaker(seq_len=10, pad_id=0, modalities=(((0, VOCAB),),))

    def segment() -> Segment:
        return Segment(rng.integers(ids.start, ids.stop, 4), np.zeros(4, bool), 4, prompt)

    return maker.make([[segment(), segment()] for _ in range(sequences)])


def test_routers_see_alphabets_apart_and_not_a_domain_that_no_token_shows() -> None:
    model = make_model(std=0.1)
    apart = domains(model, {"a": [batch_of(range(1, 16), seed=1)], "b": [batch_of(range(16, 32), seed=2)]}, GROUPS)
    same = domains(model, {"a": [batch_of(range(1, 32), seed=1)], "b": [batch_of(range(1, 32), seed=2)]}, GROUPS)
    assert isinstance(apart["by_layer"], list)
    assert len(apart["by_layer"]) == LAYERS
    assert apart["least"] == min(apart["by_layer"]) > 0.9
    assert isinstance(same["least"], float)
    assert same["least"] < 0.6
    for found in (apart, same):
        assert isinstance(found["bits_by_layer"], list)
        assert found["bits"] == pytest.approx(sum(found["bits_by_layer"]) / LAYERS)
        assert all(0 <= each <= 1 for each in found["bits_by_layer"])


def test_nats_of_an_answer_are_those_of_its_scored_tokens() -> None:
    model, batch = make_model(), batch_of(range(1, 32), seed=5)
    found = answers(model, {"a": [batch], "b": [batch, batch]}, GROUPS)
    with torch.no_grad():
        logits_BSV, _ = forward(model, batch, GROUPS)
    scored_BS = batch.labels_BS >= 0
    nats_N = -logits_BSV.log_softmax(-1)[scored_BS].gather(1, batch.labels_BS[scored_BS][:, None])
    assert len(nats_N) == 200
    assert found["by_source"]["a"]["nats"] == pytest.approx(float(nats_N.mean()), rel=1e-5)
    assert found["nats"] == pytest.approx(found["by_source"]["b"]["nats"])


def test_only_the_named_modality_counts_as_pictures() -> None:
    maker = BatchMaker(seq_len=4, pad_id=0, modalities=(((0, 8),), ((8, 16),), ((16, VOCAB),)))
    ids = np.array([1, 9, 17, 18])
    batch, groups = maker.make([[Segment(ids, np.zeros(4, bool), 4)]]), torch.tensor([0, 0, 0])
    model = make_model()
    for image, kinds in ((1, [True, False, False]), (2, [False, True, True]), (-1, [False] * 3)):
        found = evaluate(model, [batch], groups, image=image)
        assert found.label_image_N.tolist() == kinds
        assert found.input_image_N.tolist() == [False, *kinds[:2]]
    shares = accuracy(model, [batch], groups, image=-1)
    assert set(shares) == {"all", "text"}
