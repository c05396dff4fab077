"""A model answers questions by the likelihoods of the choices' first tokens."""

import pytest

from moe_dist.inference.likelihood import Continuation, Likelihood
from moe_dist.inference.multiple_choice import likeliest
from moe_dist.train.router_tuning.loader import SampleMaker
from research.experiments import first_tokens
from research.experiments.first_tokens import FirstTokens, has_own_first_token, shortened
from research.tests.experiments.test_oracle import GROUPS, MANIFEST, QUESTIONS, make_model

pytestmark = pytest.mark.slow


def test_the_choice_with_the_likeliest_first_token_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers by first tokens agree with their log-likelihoods, for prompts of several lengths in several batches."""
    monkeypatch.setattr(first_tokens, "_BATCH_TOKENS", 12)
    model = make_model()
    questions = [
        [Continuation((1, *range(2, 2 + n % 5), 9), choice.tokens) for choice in choices]
        for n, choices in enumerate(QUESTIONS)
    ]
    likelihood = Likelihood(model, MANIFEST, group_of_modality=[0], max_seq_len=16)
    wanted = [likeliest(likelihood(shortened(each)), shortened(each), "plain") for each in questions]
    assert FirstTokens(model, SampleMaker(MANIFEST), GROUPS)(questions) == wanted
    assert len(set(wanted)) > 1


def test_a_right_choice_needs_a_first_token_of_its_own() -> None:
    choices = [Continuation((1,), tokens) for tokens in ((5, 6), (7,), (7, 8), (5, 9))]
    assert not any(has_own_first_token(choices, answer) for answer in range(4))
    choices[0] = Continuation((1,), (4, 6))
    assert [has_own_first_token(choices, answer) for answer in range(4)] == [True, False, False, True]
    assert [each.tokens for each in shortened(choices)] == [(4,), (7,), (7,), (5,)]
