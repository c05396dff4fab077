"""Tests which samples of router tuning count as successful, what they contain, and which text is embedded."""

import pytest

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Codes, Question
from moe_dist.inference.likelihood import Continuation
from moe_dist.inference.multiple_choice import Answered
from moe_dist.inference.router_tuning.scoring import embedded_text, first_tokens, scored_samples
from tests.support.messages import refused

QUESTION = Question("task", "id", "what is it?", ("a", "b", "c", "d"), 2)


def test_success_is_being_right_under_every_rotation_by_the_measure() -> None:
    turns = [[Continuation([number, choice], [choice, 9]) for choice in range(4)] for number in range(4)]
    cases = {(2, 2, 2, 2): True, (2, 2, 2, 0): False, (0, 2, 2, 2): False, (1, 1, 1, 1): False}
    answered = [Answered(QUESTION, {"normalised": taken, "plain": (2, 2, 2, 2)}) for taken in cases]
    found = scored_samples(answered, [turns] * len(cases), "normalised", listed=True)
    assert [each.right for each in found] == list(cases.values())
    assert all(each.right for each in scored_samples(answered, [turns] * len(cases), "plain", listed=True))
    for each in found:  # the question as written, with its right choice
        assert (each.sample.prompt.tolist(), each.sample.answer.tolist()) == ([0, 2], [2, 9])
        assert each.sample.choices.tolist() == [2, 0, 1, 3]
        assert (each.task, each.id, each.text) == ("task", "id", "what is it?; a; b; c; d")


def test_texts_are_embedded_and_pictures_are_not() -> None:
    picture = Codes((1, 2))
    finding = Question("pictures-finding", "id", "a red house", (picture,) * 4, 0)
    naming = Question("pictures-naming", "id", picture, ("a", "b", "c", "d"), 0)
    assert embedded_text(QUESTION, listed=False) == "what is it?"
    assert embedded_text(finding, listed=True) == embedded_text(finding, listed=False) == "a red house"
    assert embedded_text(naming, listed=True) == "a; b; c; d"
    with refused(ConfigError, "--tasks"):
        embedded_text(naming, listed=False)


@pytest.mark.parametrize(
    ("first", "right", "wanted"),
    [
        ([5, 6, 7, 8], 2, [7, 5, 6, 8]),
        ([5, 6, 7, 5], 1, [6, 5, 7]),  # two wrong choices are equal
        ([5, 6, 7, 6], 1, [-1]),  # a wrong choice equals the right one
        ([5, 5, 5, 5], 0, [-1]),
    ],
)
def test_first_tokens_begin_with_the_right_choices_if_it_has_one_of_its_own(
    first: list[int], right: int, wanted: list[int]
) -> None:
    assert first_tokens([Continuation([1], [each, 9]) for each in first], right).tolist() == wanted
