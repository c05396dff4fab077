"""Facts from files in the packages' formats, their division into training and test, and the questions made of them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.fact import Codes, Fact, Question, lemma_keys
from moe_dist.inference.questions.catalogue import task_names
from moe_dist.inference.questions.pictures import pictures
from moe_dist.inference.questions.split import Side, make_questions, on_side, side_of
from moe_dist.inference.questions.trivia import alternatives, trivia
from moe_dist.inference.questions.wordnet import WordNet
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary
from tests.support.messages import refused
from tests.support.wordnet_files import offset_of, write_wordnet

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kite", "lark", "mole", "newt"]


def test_facts_of_made_up_files(tmp_path: Path) -> None:
    nouns = [["thing"], ["Living Thing", "organism"], ["tool"], ["cat", "big cat"], ["cat"], ["dust"]]
    wordnet = WordNet(write_wordnet(tmp_path, nouns, [("hot", "cold"), ("hot", "cool")], uncounted=["dust"]))
    definitions = {fact.id: fact for fact in wordnet.definitions()}
    # There are no questions about the second sense of "cat", and about "dust", which occurs in no text.
    assert list(definitions) == [f"n{offset_of(number)}" for number in range(4)]
    cat = definitions[f"n{offset_of(3)}"]
    assert (cat.asked, cat.answer) == ("Which word means: gloss number 3?", "cat")
    assert cat.keys == {"lemma:cat", "lemma:big cat"}
    assert cat.wrong == {"cat", "big cat"}
    above = {fact.id: fact for fact in wordnet.hypernyms()}[f"n{offset_of(3)}"]
    assert (above.asked, above.answer) == ('What is "cat" a kind of?', "Living Thing")
    assert above.keys == {"lemma:cat", "lemma:big cat", "lemma:living thing", "lemma:organism"}
    assert above.wrong == {"cat", "big cat", "Living Thing", "organism", "thing"}
    (first, second, *_) = wordnet.antonyms()
    assert (first.asked, first.answer, first.wrong) == ('What is the opposite of "hot"?', "cold", {"hot", "cold", "cool"})
    assert (second.asked, second.answer) == ('What is the opposite of "cold"?', "hot")
    assert {fact.id: fact.answer for fact in wordnet.categories()}[f"n{offset_of(3)}"] == "attribute"


@pytest.mark.parametrize("name", ["data.noun", "index.noun", "data.adj"])
def test_damaged_files_are_named_by_line(tmp_path: Path, name: str) -> None:
    write_wordnet(tmp_path, [["a"], ["b"]], [("c", "d")])
    (tmp_path / name).write_text((tmp_path / name).read_text() + "00000001 n\n")
    wordnet = WordNet(tmp_path)
    with pytest.raises(DataError, match=rf"{name}: line \d is not in WordNet's format"):
        wordnet.antonyms() if name == "data.adj" else wordnet.hypernyms()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nouns=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True), min_size=8, max_size=40),
    pictured=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 9), st.booleans()), max_size=20),
    seed=st.integers(0, 1000),
)
def test_nothing_of_training_is_in_any_test(
    tmp_path: Path, nouns: list[list[str]], pictured: list[tuple[str, int, bool]], seed: int
) -> None:
    """Compares synsets, words and families as written, and not the facts' keys."""
    wordnet = WordNet(write_wordnet(tmp_path, nouns, list(zip(WORDS[::2], WORDS[1::2], strict=True))))
    trained_families = {family for _, family, trained in pictured if trained}
    pictures = [
        Fact(word, word, Codes((number,)), lemma_keys([word]) | {f"family:{family}"}, trained_on=family in trained_families)
        for number, (word, family, _) in enumerate(pictured)
    ]
    used: dict[Side, set[object]] = {}
    for side in Side:
        seen: set[object] = set()
        for fact in on_side([*wordnet.definitions(), *wordnet.categories()], side, seed):
            number = (int(fact.id[1:]) - 1740) // 100
            seen |= {number, *nouns[number]}
        for fact in on_side(wordnet.hypernyms(), side, seed):
            number = (int(fact.id[1:]) - 1740) // 100
            seen |= {number, *nouns[number], (number - 1) // 2, *nouns[(number - 1) // 2]}
        for fact in on_side(wordnet.antonyms(), side, seed):
            seen |= {fact.id, fact.answer}
        for fact in on_side(pictures, side, seed):
            family = pictured[pictures.index(fact)][1]
            assert (side is Side.TRAIN) == (family in trained_families)
            seen |= {fact.asked, ("family", family)}
        used[side] = seen
    assert not used[Side.TRAIN] & used[Side.TEST]
    assert not used[Side.TRAIN] & used[Side.VALID]
    assert not used[Side.VALID] & used[Side.TEST]


def test_questions_have_even_places_and_choices_of_their_own_side(words: Path) -> None:
    facts = WordNet(words).definitions()
    questions = make_questions("definition", facts, Side.TEST, seed=3)
    assert len(questions) > 16
    places = Counter(question.answer for question in questions)
    assert max(places.values()) - min(places.values()) <= 1
    side = {fact.answer: side_of(fact, 3) for fact in facts}
    right = {fact.id: fact.answer for fact in facts}
    for question in questions:
        assert len(set(question.choices)) == 4
        assert question.choices[question.answer] == right[question.id]
        assert all(side[choice] is Side.TEST for choice in question.choices if isinstance(choice, str))
    assert make_questions("definition", facts, Side.TEST, seed=3, limit=7) == questions[:7]
    assert make_questions("definition", facts, Side.TEST, seed=4) != questions


def test_wrong_answers_are_wrong() -> None:
    """Of five answers two are as right as the answer. Too few wrong ones are left for the first fact, and the second takes
    the rest."""
    everything = [Fact(str(number), str(number), f"answer {number}", frozenset()) for number in range(5)]
    keyed = [Fact(f.id, f.asked, f.answer, lemma_keys(["x"]), frozenset({"answer 1", "answer 2"} if f.id == "0" else ()))
             for f in everything]  # fmt: skip
    side = side_of(keyed[1], 0)
    assert side is not None
    questions = make_questions("t", keyed, side, seed=0)
    assert {question.id for question in questions} == {"1", "2", "3", "4"}


def test_rotations_keep_the_right_choice() -> None:
    question = Question("t", "1", "?", ("a", "b", "c", "d"), 2)
    assert question.rotated(1).choices == ("b", "c", "d", "a")
    assert [question.rotated(by).answer for by in range(5)] == [2, 1, 0, 3, 2]


def test_quiz_files(tmp_path: Path) -> None:
    for file in ("africa", "america", "asia", "europe"):
        (tmp_path / file).write_text(f"Land of {file}|L:City{{ of}} {file}\n")
    (tmp_path / "state").write_text("Alaska|AK:June{au}:AK:forget{-| }me{-| }not\nTexas:Aus\\\ntin:TX\nBad:San Jos['\\be\n")
    facts = trivia(tmp_path, "capitals")
    assert [(fact.id, fact.asked, fact.answer) for fact in facts[3:]] == [
        ("europe:Land of europe", "What is the capital of Land of europe?", "City of europe"),
        ("state:Alaska", "What is the capital of Alaska?", "Juneau"),
        ("state:Texas", "What is the capital of Texas?", "Austin"),
    ]
    assert facts[4].keys == {"lemma:alaska", "lemma:juneau"}
    assert facts[4].pool == facts[5].pool != facts[3].pool
    assert alternatives("M[iddle{-}Earth|E]|forget{-| }me") == ["Middle-Earth", "forget-me"]
    with refused(DataError):
        trivia(tmp_path, "elements")


def test_tasks_by_name_and_family() -> None:
    assert task_names("trivia-words,wordnet,wordnet-antonym") == [
        "trivia-words", "wordnet-definition", "wordnet-hypernym", "wordnet-antonym", "wordnet-category",
    ]  # fmt: skip
    with refused(ConfigError, "--tasks"):
        task_names("wordnet-antonyms,trivia")


class Pictured:
    """Stands in for a run's data: documents of each split as (caption, picture number)."""

    def __init__(self, train: list[tuple[str, int]], valid: list[tuple[str, int]]) -> None:
        self._sides = {"train": train, "valid": valid}

    def pictured(self, side: str, *, most: int | None = None) -> Iterator[HeldoutPicture]:
        for caption, number in self._sides[side]:
            yield HeldoutPicture(caption, np.array([number]))


def test_of_a_family_that_is_trained_on_no_picture_is_asked_about_elsewhere() -> None:
    families = {"en: elf": "elf", "en: elf dark skin tone": "elf", "en: cat": "cat"}
    train = [("en: elf", 1), ("en: house", 2)]
    held_out = [("en: elf dark skin tone", 3), ("en: cat", 4), ("en: house", 5)]
    for facts in pictures(cast(Vocabulary, Pictured(train, held_out)), families, Side.TEST):
        assert [fact.id for fact in facts] == ["en: cat"]
    for facts in pictures(cast(Vocabulary, Pictured(train, held_out)), families, Side.TRAIN):
        assert [fact.id for fact in facts] == ["en: elf", "en: house"]
    with refused(ConfigError):
        pictures(cast(Vocabulary, Pictured(train, held_out[:1])), families, Side.VALID)
