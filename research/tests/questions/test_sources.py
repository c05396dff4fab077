"""Tests the facts that are read from files in the packages' formats, and the split to which each fact belongs."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.fact import Codes, Fact, lemma_keys
from moe_dist.inference.questions.files import read_facts
from moe_dist.inference.questions.split import Side, on_side
from research.questions.__main__ import main
from research.questions.sources import make_facts, text_tasks
from research.questions.trivia import alternatives, trivia
from research.questions.wordnet import WordNet
from research.tests.wordnet_files import offset_of, write_wordnet
from tests.support.invoked import invoke
from tests.support.messages import refused

WORDS = [f"word{number}" for number in range(16)]


def test_facts_of_made_up_files(tmp_path: Path) -> None:
    nouns = [["thing"], ["Living Thing", "organism"], ["tool"], ["cat", "big cat"], ["cat"], ["dust"]]
    wordnet = WordNet(write_wordnet(tmp_path, nouns, [("hot", "cold"), ("hot", "cool")], uncounted=["dust"]))
    definitions = {fact.id: fact for fact in wordnet.definitions()}
    # There are no questions about the second sense of "cat" and the uncounted "dust".
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
    """Compares the synsets, words and families that the test wrote, because the facts' keys could be wrong."""
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
    assert text_tasks(["trivia-words", "pictures", "wordnet"]) == [
        "trivia-words", "wordnet-definition", "wordnet-hypernym", "wordnet-antonym", "wordnet-category",
    ]  # fmt: skip


def test_the_file_of_a_family_has_its_facts(words: Path, tmp_path: Path) -> None:
    done = invoke(main, "wordnet", "--wordnet", words, "--out", tmp_path / "facts.jsonl")
    assert done.exit_code == 0, done.output
    assert read_facts([tmp_path / "facts.jsonl"]) == make_facts(text_tasks(["wordnet"]), wordnet=words)


def test_packages_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tasks = text_tasks(["wordnet-antonym", "trivia", "reasoning-gcd"])
    with refused(ConfigError, "--wordnet", "data.noun, index.noun, data.adj not there", "--quiz", "reasoning-gym"):
        make_facts(tasks, wordnet=tmp_path, quiz=tmp_path / "none")
