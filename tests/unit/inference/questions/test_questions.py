"""Facts are divided into a training and a held-out side, become questions, and are written to and read from files."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.fact import Fact, Question, lemma_keys
from moe_dist.inference.questions.catalogue import pictures, task_names
from moe_dist.inference.questions.files import fact_lines, read_facts
from moe_dist.inference.questions.split import Side, make_questions, on_side, side_of
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary
from tests.support.messages import refused

KEYS = "abcdefghij"


@given(
    keys=st.lists(st.frozensets(st.sampled_from(KEYS), min_size=1, max_size=3), min_size=8, max_size=40),
    families=st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 9), st.booleans()), max_size=20),
    seed=st.integers(0, 1000),
)
def test_no_key_or_family_is_on_two_sides(
    keys: list[frozenset[str]], families: list[tuple[str, int, bool]], seed: int
) -> None:
    trained = {family for _, family, was in families if was}
    facts = [Fact(str(n), "?", "!", each) for n, each in enumerate(keys)]
    facts += [
        Fact(f"p{n}", "?", "!", frozenset({key, f"family:{family}"}), trained_on=family in trained)
        for n, (key, family, _) in enumerate(families)
    ]
    sides = {side: on_side(facts, side, seed) for side in Side}
    used = [{key for fact in of_side for key in fact.keys} for of_side in sides.values()]
    assert len(set.union(*used)) == sum(map(len, used))
    assert all((fact.trained_on is not False) == (side is Side.TRAIN) for side, of_side in sides.items() for fact in of_side
               if fact.trained_on is not None)  # fmt: skip


def test_questions_have_even_places_and_choices_of_their_own_side() -> None:
    facts = [Fact(f"{n}", f"Which word has number {n}?", f"noun{n}", lemma_keys([f"noun{n}"])) for n in range(120)]
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
    """For fact 0, two of the four other answers are right too. Too few wrong answers are left, so fact 0 becomes no
    question. Every other fact becomes a question."""
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


def test_tasks_by_name_and_family() -> None:
    facts = {name: () for name in ("capitals", "words-latin", "words-greek")}
    assert task_names("words,pictures-finding,words-latin", facts) == ["words-latin", "words-greek", "pictures-finding"]
    assert task_names("", facts) == list(facts)
    with refused(ConfigError, "--tasks words-grek", "did you mean words-greek?", "--tasks word:"):
        task_names("words-grek,word,capitals", facts)
    with refused(ConfigError, "pictures-naming"):
        task_names("", {"pictures-naming": ()})


def test_a_file_gives_back_the_facts_that_were_written(tmp_path: Path) -> None:
    facts = {
        "a": [
            Fact("1", "Wer?", "der Rüde", frozenset({"x", "y"}), frozenset({"Hund"}), "tiere", ("a", "b"), side="valid"),
            Fact("2", "Who?", "the dog", frozenset({"y"})),
        ],
        "b": [Fact("1", "What?", "it", frozenset({"z"}))],
    }
    path = tmp_path / "facts.jsonl"
    path.write_text(fact_lines(facts))
    assert read_facts([path]) == facts
    assert side_of(facts["a"][0], 0) is Side.VALID


def test_a_line_needs_a_question_and_an_answer_only(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"asked": "1 + 1?", "answer": "2"}\n{"asked": "1 + 2?", "answer": "3", "task": "sums"}\n')
    found = read_facts([path])
    assert found["own"] == [Fact("own:1", "1 + 1?", "2", frozenset({"asked:1 + 1?"}))]
    assert list(found) == ["own", "sums"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("", "line 2: the line: "),
        ('{"asked": "a"}', "line 2: answer: "),
        ('{"asked": "a", "answer": 2}', "line 2: answer: "),
        ('{"asked": "a", "answer": "b", "side": "all"}', "line 2: side: "),
        ('{"asked": "a", "answer": "b", "hint": "c"}', "line 2: hint: "),
        ('{"asked": "a", "answer": "b", "id": "x"}', "line 2: id='x'"),
        ('{"asked": "a", "answer": "b", "wrong": [1, 2]}', "line 2: wrong.0: "),
    ],
)
def test_lines_that_are_no_facts_are_named(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"asked": "a", "answer": "b", "id": "x"}\n' + line + "\n")
    with refused(DataError, key, golden=False) as error:
        read_facts([path])
    assert "wrong.1: " not in str(error.value)  # of many faults in a list, only the first is named


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused(ConfigError, "--questions"):
        read_facts([tmp_path / "missing.jsonl"])


class Pictured:
    """Stands in for a run's data. A document of a split is (caption, picture number)."""

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
