"""Scores equal those of a slow method: one forward pass per prefix, without padding, batches or labels."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from moe_dist.inference.fact import Question
from moe_dist.inference.likelihood import Continuation, Likelihood, Score
from moe_dist.inference.multiple_choice import ask, likeliest
from moe_dist.model.transformer import Transformer
from tests.support.messages import refused
from tests.support.tiny import IMAGE_IDS
from tests.support.transformers import make_transformer


@torch.no_grad()
def next_token(model: Transformer, prefix: list[int]) -> list[float]:
    """Computes the log-probabilities of the token after a prefix from their definition."""
    tokens = torch.tensor([prefix])
    group = (tokens >= IMAGE_IDS[0]).to(torch.int64)
    logits, _ = model(tokens, torch.arange(len(prefix))[None], torch.zeros_like(tokens, dtype=torch.int32), group)
    last = logits[0, -1].to(torch.float64).tolist()
    return [value - math.log(sum(math.exp(other) for other in last)) for value in last]


def slow(model: Transformer, continuation: Continuation) -> Score:
    nats, greedy, prefix = 0.0, True, list(continuation.context)
    for token in continuation.tokens:
        chances = next_token(model, prefix)
        nats += chances[token]
        greedy = greedy and chances[token] == max(chances)
        prefix.append(token)
    return Score(nats, greedy)


@pytest.mark.parametrize("batch_tokens", [1, 24, 4096])
def test_scores_are_the_slow_ones(tiny_data: Path, batch_tokens: int) -> None:
    model = make_transformer(moe_layers=(0, 1, 2), dtype=torch.float64).eval()
    draw = torch.Generator().manual_seed(5)
    sizes = [(3, 4), (1, 1), (7, 2), (2, 9), (5, 5), (1, 6)]
    asked = [Continuation(*(torch.randint(0, 64, (size,), generator=draw).tolist() for size in both)) for both in sizes]
    likeliest_tokens: list[int] = []
    for _ in range(3):
        chances = next_token(model, [4, 9, *likeliest_tokens])
        likeliest_tokens.append(chances.index(max(chances)))
    asked += [Continuation([4, 9], likeliest_tokens), Continuation([4, 9], [*likeliest_tokens[:2], 0])]
    score = Likelihood(model, load_manifest(tiny_data), group_of_modality=[0, 1], max_seq_len=64, batch_tokens=batch_tokens)
    got, expected = score(asked), [slow(model, each) for each in asked]
    assert [each.nats for each in got] == pytest.approx([each.nats for each in expected], rel=1e-10)
    assert [each.greedy for each in got] == [each.greedy for each in expected]
    assert got[-2].greedy


def test_what_does_not_fit_is_refused(tiny_data: Path) -> None:
    model = make_transformer(moe_layers=(0,))
    score = Likelihood(model, load_manifest(tiny_data), group_of_modality=[0, 1], max_seq_len=8)
    assert len(score([Continuation([1] * 4, [5] * 5)])) == 1  # the last token is scored, but is no input
    with refused(ConfigError, "model.max_seq_len"):
        score([Continuation([1] * 5, [5] * 5)])
    with refused(ConfigError):
        score([Continuation([], [5])])
    assert score([]) == []


def test_the_two_measures() -> None:
    choices = [Continuation([1], [2] * length) for length in (1, 4, 2)]
    scores = [Score(-3.0, False), Score(-4.0, False), Score(-5.0, False)]
    assert likeliest(scores, choices, "plain") == 0
    assert likeliest(scores, choices, "normalised") == 1
    assert likeliest([Score(-3.0, False)] * 2, choices[:1] * 2, "plain") == 0  # takes the first of equal scores


def test_a_choice_is_told_by_its_place_before_the_rotation() -> None:
    """The model always prefers the choice that stands second in the question before any rotation."""
    question = Question("task", "id", "asked", ("a", "b", "c"), answer=1)
    turns = [[Continuation([0], [ord(choice)]) for choice in question.rotated(by).choices] for by in range(3)]

    def likelihood(asked: Sequence[Continuation]) -> list[Score]:
        return [Score(0.0 if each.tokens == [ord("b")] else -1.0, True) for each in asked]

    (answered,) = ask([question], [turns], likelihood)  # pyright: ignore[reportArgumentType]
    assert set(answered.taken.values()) == {(1, 1, 1)}
